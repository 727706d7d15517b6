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

from fastdeit.config import Config, height_width
from fastdeit.data import compiles, precision_of
from fastdeit.distributed import parallel
from fastdeit.kernels import attention_qkvpacked
from fastdeit.kernels.attention import tiles
from fastdeit.kernels.backend import architecture, use_triton
from fastdeit.kernels.mlp.api import has_kernels as mlp_has_kernels
from fastdeit.models import implementation
from fastdeit.models.deit import DeiT
from fastdeit.models.implementation import Implementation
from fastdeit.models.patch_drop import number_kept
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


def kernel_tiles(tuner: Tuner, model: nn.Module, config: Config, arrangement: Arrangement) -> None:
    """The tiles of our attention kernels, each direction by itself: beside the rest of a block they would drown."""
    device, dtype = tuner.world.device, precision_of(config, tuner.world.device)
    probe = torch.empty(0, device=device)
    if not isinstance(model, DeiT) or config.speed.attention not in ("auto", "fused"):
        return
    if dtype == torch.float32 or not use_triton(probe):
        return
    batch, tokens, width = _tokens(model, config)
    heads = model.arch.heads
    shape = tiles.Shape(architecture(probe), tokens, tokens, width // heads, dtype)
    key = {"batch": batch, "tokens": tokens, "heads": heads, "head_dim": shape.head_dim}

    @cache
    def tensors() -> tuple[Tensor, ...]:
        """qkv, its attention and lse, the gradient of the attention; on the rank that measures."""
        qkv = torch.randn(batch, tokens, 3, heads, shape.head_dim, device=device, dtype=dtype)
        out, lse = attention_qkvpacked(qkv, return_lse=True)
        return qkv, out, lse, torch.randn_like(out)

    def forward(candidate: tiles.ForwardConfig) -> Callable:
        def call() -> tuple[Tensor, ...]:
            tiles.use(shape, forward=candidate)
            return attention_qkvpacked(tensors()[0], return_lse=True)

        return call

    def backward(candidate: tiles.BackwardConfig) -> Callable:
        def call() -> Tensor:
            tiles.use(shape, backward=candidate)
            qkv, out, lse, grad_out = tensors()
            return torch.ops.fastdeit.attention_qkvpacked_backward(grad_out, qkv, out, lse, shape.head_dim**-0.5, None)

        return call

    answers: dict = {}
    questions: tuple = (
        ("forward", forward, tiles.forward_candidates(shape)),
        ("backward", backward, tiles.backward_candidates(shape, batch * heads)),
    )
    for direction, build, found in questions:
        choice = tuner.choose(
            f"tiles of fused attention, {direction}", {name: partial(build, one) for name, one in found.items()},
            default=next(iter(found)), key=key, dtype=dtype, cold=True,
        )  # fmt: skip
        answers[direction] = found[choice.chosen]
    tiles.use(shape, **answers)


# PyTorch's own choice minds --deterministic, and its flash backend does.
NONDETERMINISTIC = ("cudnn", "efficient", "xformers", "fa3", "fa4")


def attention(tuner: Tuner, model: nn.Module, config: Config, arrangement: Arrangement) -> None:
    """One block, forward and backward; then the last one, where a few tokens look at all."""
    if config.speed.attention != "auto" or not isinstance(model, DeiT):
        return
    names = implementation.candidates(tuner.world.device)
    last = [name for name in names if name not in ("fa3", "fa4")]  # they stand in for flash in the whole process
    _choose_block(
        tuner, model, config, arrangement, "attention",
        {name: model.implementation._replace(attention=name) for name in names}, "sdpa", None,
    )  # fmt: skip
    _choose_block(
        tuner, model, config, arrangement, "attention of the last block",
        {name: model.implementation._replace(last_attention=name) for name in last}, "sdpa", model.num_prefix_tokens,
    )  # fmt: skip


def fusions(tuner: Tuner, model: nn.Module, config: Config, arrangement: Arrangement) -> None:
    """Our kernels for what stands between the matrix products, and for the whole MLP where its width has one, against
    what Inductor makes of it."""
    device = tuner.world.device
    if not isinstance(model, DeiT) or not use_triton(torch.empty(0, device=device)):
        return
    questions = {"add_layer_norm": "fused_norm", "bias_gelu": "fused_gelu"}
    x = torch.empty(0, model.embed_dim, device=device, dtype=precision_of(config, device))
    if mlp_has_kernels(x, model.blocks[0].mlp.fc1.weight):
        questions["mlp"] = "fused_mlp"
    for question, attribute in questions.items():
        ways = {name: model.implementation._replace(**{attribute: name == "ours"}) for name in ("plain", "ours")}
        _choose_block(tuner, model, config, arrangement, question, ways, "plain", None)


def _choose_block(
    tuner: Tuner, model: DeiT, config: Config, arrangement: Arrangement, question: str, ways: dict[str, Implementation],
    default: str, first: int | None,
) -> None:  # fmt: skip
    """By one block, forward and backward; applied to the model. first: Block.forward's."""
    shape = _tokens(model, config)

    def build(way: Implementation) -> Callable:
        block = copy.deepcopy(model.blocks[0])
        block.implement(way)
        branches = _Branches(block, shape[0], model.drop_path, first)
        call = forward_backward(branches, [torch.randn(shape, requires_grad=True)], tuner, config, arrangement)

        def active() -> Sequence[Tensor]:
            implementation.activate(way.attention)
            return call()

        return active

    compiled = compiles(config, tuner.world.device)
    key = {"tokens": list(shape), "heads": model.arch.heads, "queries": first, "drop path": model.drop_path > 0}
    key |= {"layer scale": model.arch.deit3, "compiled": compiled, "implementation": model.implementation._asdict()}
    choice = tuner.choose(
        question, {name: partial(build, way) for name, way in ways.items()}, default=default, cold=True, key=key,
        dtype=precision_of(config, tuner.world.device), nondeterministic=[n for n in NONDETERMINISTIC if n in ways],
    )  # fmt: skip
    model.implement(ways[choice.chosen])


class _Branches(nn.Module):
    """A block as the model calls it: with a factor for each sample's branches, where it has a drop path."""

    def __init__(self, block: nn.Module, batch: int, drop_path: float, first: int | None):
        super().__init__()
        self.block, self.first = block, first
        self.register_buffer("scale", torch.full((batch, 2), 1 / (1 - drop_path)) if drop_path else None)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.block(x_BND, self.scale, self.first)


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
QUESTIONS = (threads, memory_format, patch_embedding, kernel_tiles, attention, fusions, combo_kernels)


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
        # Each candidate is another specialisation of the same code, which Dynamo would soon leave uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        parallel.compile_model(module, tuner.world, config.speed.sharding, arrangement.inductor)
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


def _tokens(model: DeiT, config: Config) -> tuple[int, int, int]:
    """Shape of what a block is given: (batch, tokens, width); with --patch-drop as in most of the steps."""
    patches = number_kept(model.grid_size[0] * model.grid_size[1], config.model.patch_drop)
    return config.data.batch_size, patches + model.num_prefix_tokens, model.embed_dim


def _images(config: Config) -> Tensor:
    """As `prepare` makes them."""
    images = torch.randn(config.data.batch_size, config.data.in_chans, *height_width(config.data.input_size))
    return images.to(memory_format=torch.channels_last)


def _short(model: nn.Module) -> nn.Module:
    """A copy, of a DeiT with two blocks, whose others are like them, and without drop path, which is random."""
    model = copy.deepcopy(model)
    if isinstance(model, DeiT):
        del model.blocks[2:]
        model.drop_path = 0.0
    return model


def _key(tuner: Tuner, model: nn.Module, config: Config) -> dict:
    images = [config.data.batch_size, config.data.in_chans, *height_width(config.data.input_size)]
    compiled = compiles(config, tuner.world.device)
    frozen = sum(not parameter.requires_grad for parameter in model.parameters())
    return {
        "model": config.model.model, "images": images, "patch": config.model.patch_size, "frozen": frozen or None,
        "compiled": compiled,
    }  # fmt: skip


@cache
def _threads_at_first() -> int:
    return torch.get_num_threads()
