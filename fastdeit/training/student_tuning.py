"""What is chosen by measurement for a student, question by question, before anything of it is compiled.

A question is a function in QUESTIONS: it times candidates at the run's shapes, on copies, and applies the answer to the
model. `forward_backward` makes the callable of a candidate.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from fastdeit.config import Config
from fastdeit.data import compiles, precision_of
from fastdeit.models.deit import ATTENTION, DeiT
from fastdeit.tuning import Tuner


def ask(tuner: Tuner, model: nn.Module, config: Config) -> None:
    """model: the student on the CPU, of all ranks the same; the answers are applied to it."""
    for question in QUESTIONS:
        question(tuner, model, config)


def attention(tuner: Tuner, model: nn.Module, config: Config) -> None:
    """One block, forward and backward."""
    if config.speed.attention != "auto" or not isinstance(model, DeiT):
        return

    shape = (config.data.batch_size, model.grid_size[0] * model.grid_size[1] + model.num_prefix_tokens, model.embed_dim)

    def build(name: str) -> Callable:
        block = copy.deepcopy(model.blocks[0])
        block.attn.attend = ATTENTION[name]
        return forward_backward(block, [torch.randn(shape)], tuner, config)

    names = ("sdpa",) if tuner.world.device.type == "cuda" else ("sdpa", "math")
    choice = tuner.choose(
        "attention", {name: partial(build, name) for name in names}, default="sdpa", cold=True,
        key={"tokens": list(shape), "heads": model.arch.heads, "compiled": compiles(config, tuner.world.device)},
        dtype=precision_of(config, tuner.world.device),
    )  # fmt: skip
    model.set_attention(choice.chosen)


QUESTIONS = (attention,)


def forward_backward(
    module: nn.Module, inputs: Sequence[Tensor], tuner: Tuner, config: Config
) -> Callable[[], Sequence[Tensor]]:
    """A call that computes `module`, of one output, on `inputs` and back, as a step does (autocast; compiled where
    the run is), and returns the output and the gradients of floating-point inputs and parameters. Both are moved
    to the run's device."""
    device, precision = tuner.world.device, precision_of(config, tuner.world.device)
    module = module.to(device).train()
    if compiles(config, device):
        module.compile(dynamic=False)
    inputs = [tensor.to(device).requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    wanted = [tensor for tensor in (*inputs, *module.parameters()) if tensor.requires_grad]
    gradient = None

    def call() -> Sequence[Tensor]:
        nonlocal gradient
        with nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision):
            output = module(*inputs)
        if gradient is None:
            gradient = torch.randn_like(output)
        return output, *torch.autograd.grad(output, wanted, gradient)

    return call
