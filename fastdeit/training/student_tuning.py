"""What is chosen by measurement for a student, question by question, before anything of it is compiled.

A question is a function in QUESTIONS: it times candidates on copies of the model, or of a part, at the run's shapes,
and carries out the answer, on the model or in the Arrangement. `forward_backward` makes the callable of a candidate.
"""

import copy
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastdeit.config import Config
from fastdeit.data import compiles, precision_of
from fastdeit.distributed import parallel
from fastdeit.models.deit import ATTENTION, DeiT
from fastdeit.tuning import Tuner

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass
class Arrangement:
    """What the Trainer carries out. memory_format: of the weights. inductor: options of torch.compile."""

    memory_format: torch.memory_format
    inductor: dict = field(default_factory=dict)

    @classmethod
    def default(cls, device: torch.device) -> "Arrangement":
        return cls(torch.channels_last if device.type == "cuda" else torch.contiguous_format)


def ask(tuner: Tuner, model: nn.Module, config: Config) -> Arrangement:
    """model: the student on the CPU, the same on all ranks; answers that concern it are applied to it."""
    arrangement = Arrangement.default(tuner.world.device)
    for question in QUESTIONS:
        question(tuner, model, config, arrangement)
    return arrangement


def threads(tuner: Tuner, model: nn.Module, config: Config, arrangement: Arrangement) -> None:
    """On a CPU: of how many threads an operation makes use. Small models are slower on many. Other numbers give other
    sums, and so other bits. They are measured without the threads that decode; OMP_NUM_THREADS, which torchrun sets for
    several processes, is left as it is."""
    most = _threads_at_first()
    if tuner.world.device.type != "cpu" or most == 1 or "OMP_NUM_THREADS" in os.environ:
        return

    def build(number: int) -> Callable:
        call = forward_backward(_short(model), [_images(config)], tuner, config, arrangement)

        def limited():
            torch.set_num_threads(number)
            return call()

        return limited

    numbers = [most]
    while numbers[-1] > 1:
        numbers.append(numbers[-1] // 2)
    choice = tuner.choose(
        "threads", {str(number): partial(build, number) for number in numbers}, default=str(most),
        key=_key(tuner, model, config), dtype=precision_of(config, tuner.world.device),
    )  # fmt: skip
    torch.set_num_threads(int(choice.chosen))


def memory_format(tuner: Tuner, model: nn.Module, config: Config, arrangement: Arrangement) -> None:
    """Of a convolutional network's weights, the images being channels_last."""
    if sum(isinstance(module, nn.Conv2d) for module in model.modules()) < 2:
        return
    default = next(name for name, value in FORMATS.items() if value == arrangement.memory_format)

    def build(name: str) -> Callable:
        return forward_backward(
            copy.deepcopy(model), [_images(config)], tuner, config, Arrangement(FORMATS[name], arrangement.inductor)
        )

    choice = tuner.choose(
        "student's memory format", {name: partial(build, name) for name in FORMATS}, default=default,
        key=_key(tuner, model, config), dtype=precision_of(config, tuner.world.device),
    )  # fmt: skip
    arrangement.memory_format = FORMATS[choice.chosen]


def patch_embedding(tuner: Tuner, model: nn.Module, config: Config, arrangement: Arrangement) -> None:
    """As a matrix product, or as the convolution it is."""
    if not isinstance(model, DeiT):
        return

    def build(name: str) -> Callable:
        embedding = copy.deepcopy(model.patch_embed)
        embedding.as_convolution = name == "convolution"
        return forward_backward(embedding, [_images(config)], tuner, config, arrangement)

    choice = tuner.choose(
        "patch embedding", {name: partial(build, name) for name in ("product", "convolution")}, default="product",
        key=_key(tuner, model, config), dtype=precision_of(config, tuner.world.device), cold=True,
    )  # fmt: skip
    model.patch_embed.as_convolution = choice.chosen == "convolution"


def attention(tuner: Tuner, model: nn.Module, config: Config, arrangement: Arrangement) -> None:
    """One block, forward and backward."""
    if config.speed.attention != "auto" or not isinstance(model, DeiT):
        return
    shape = (config.data.batch_size, model.grid_size[0] * model.grid_size[1] + model.num_prefix_tokens, model.embed_dim)

    def build(name: str) -> Callable:
        block = copy.deepcopy(model.blocks[0])
        block.attn.attend = ATTENTION[name]
        return forward_backward(block, [torch.randn(shape, requires_grad=True)], tuner, config, arrangement)

    names = ("sdpa",) if tuner.world.device.type == "cuda" else ("sdpa", "math")
    choice = tuner.choose(
        "attention", {name: partial(build, name) for name in names}, default="sdpa", cold=True,
        key={"tokens": list(shape), "heads": model.arch.heads, "compiled": compiles(config, tuner.world.device)},
        dtype=precision_of(config, tuner.world.device),
    )  # fmt: skip
    model.set_attention(choice.chosen)


def combo_kernels(tuner: Tuner, model: nn.Module, config: Config, arrangement: Arrangement) -> None:
    """Whether Inductor merges kernels that do not depend on each other into one launch; it has none to merge on a
    CPU."""
    device = tuner.world.device
    if device.type != "cuda" or not compiles(config, device):
        return

    def build(name: str) -> Callable:
        options = {**arrangement.inductor, "combo_kernels": name == "on"}
        return forward_backward(
            _short(model), [_images(config)], tuner, config, Arrangement(arrangement.memory_format, options)
        )

    choice = tuner.choose(
        "combo kernels", {name: partial(build, name) for name in ("off", "on")}, default="off",
        key=_key(tuner, model, config), dtype=precision_of(config, device), cold=True,
    )  # fmt: skip
    if choice.chosen == "on":
        arrangement.inductor = {**arrangement.inductor, "combo_kernels": True}


# In this order: the later ones are measured as the earlier have been answered.
QUESTIONS = (threads, memory_format, patch_embedding, attention, combo_kernels)


# ---------------------------------------------------------------------------------------------------------------------
# What candidates are made of


def forward_backward(
    module: nn.Module, inputs: Sequence[Tensor], tuner: Tuner, config: Config, arrangement: Arrangement
) -> Callable[[], Sequence[Tensor]]:
    """A call that computes `module` on `inputs` and back, as a step does: in autocast, and compiled where the run is.
    It returns the outputs, and the gradients of parameters and of inputs that require one. Both are moved to the run's
    device."""
    device, precision = tuner.world.device, precision_of(config, tuner.world.device)
    module = module.to(device).to(memory_format=arrangement.memory_format).train()
    if compiles(config, device):
        parallel.compile_model(module, tuner.world, arrangement.inductor)
    inputs = [tensor.detach().to(device).requires_grad_(tensor.requires_grad) for tensor in inputs]
    wanted = [tensor for tensor in (*inputs, *module.parameters()) if tensor.requires_grad]
    gradients: list[Tensor] = []

    def call() -> Sequence[Tensor]:
        with nullcontext() if precision == torch.float32 else torch.autocast(device.type, precision):
            outputs = tree_leaves(module(*inputs))
        if not gradients:
            gradients.extend(map(torch.randn_like, outputs))
        return [*outputs, *(torch.autograd.grad(outputs, wanted, gradients) if wanted else [])]

    return call


def _images(config: Config) -> Tensor:
    """As `prepare` makes them."""
    images = torch.randn(config.data.batch_size, 3, config.data.input_size, config.data.input_size)
    return images.to(memory_format=torch.channels_last)


def _short(model: nn.Module) -> nn.Module:
    """A copy, of a DeiT with two blocks, whose others are like them, and without drop path, which is random."""
    model = copy.deepcopy(model)
    if isinstance(model, DeiT):
        del model.blocks[2:]
        model.drop_path = 0.0
    return model


def _key(tuner: Tuner, model: nn.Module, config: Config) -> dict:
    images = [config.data.batch_size, 3, config.data.input_size, config.data.input_size]
    compiled = compiles(config, tuner.world.device)
    frozen = sum(not parameter.requires_grad for parameter in model.parameters())
    return {
        "model": config.model.model, "images": images, "patch": config.model.patch_size, "frozen": frozen or None,
        "compiled": compiled,
    }  # fmt: skip


@cache
def _threads_at_first() -> int:
    return torch.get_num_threads()
