"""How many images a step sees where --batch-size does not say it: on a GPU as many as in the recipe's paper, in
micro-batches that fit its memory; on a CPU, which gains nothing from many at once, few.

What a forward pass keeps for the backward pass is counted by PyTorch's autograd on tensors without memory (FakeTensor),
eagerly: compiled, a step keeps less.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdeit import recipes
from fastdeit.config import Config, height_width
from fastdeit.data import precision_of
from fastdeit.distributed.world import World

FEW = 64  # images a process: on a CPU, and where no paper says more
STEPS = 100  # an epoch should have: below, of a small data set, a smaller batch is taken
BYTES = {"adamw": 8, "lamb": 8, "sgd": 4, "muon": 8}  # of an optimizer's state for each parameter; Muon's at most
RESERVED = 2 << 30  # bytes: CUDA's context, libraries, the decoder
BACKWARD = 1.06  # what lives at the peak over what the forward pass has kept: 1.03 to 1.05 for DeiT-Ti, S and B
USABLE = 0.85  # of the rest: fragmentation, a teacher's weights and activations, what the estimate omits


def settle(config: Config, world: World, model: nn.Module, images: int) -> tuple[Config, list[str]]:
    """The settings with --batch-size, and --accumulate where that is needed, and a sentence about them. Settings that
    have a --batch-size stay as they are, without a sentence. All processes come to the same.

    model: the student. images: of the training set.
    """
    if config.data.batch_size is not None:
        return config, []
    config, paper = copy.deepcopy(config), recipes.paper_batch(config.run.recipe)
    data, optimization, processes = config.data, config.optimization, world.world_size
    if world.device.type != "cuda" or paper is None:
        data.batch_size = FEW
        total = FEW * optimization.accumulate * processes
        papers = "" if paper is None else f"; in the recipe's paper {paper:,}"
        return config, [f"--batch-size {FEW}: {total:,} images a step{papers}"]
    wanted = paper
    while images // wanted < STEPS and wanted > FEW:
        wanted //= 2
    own = even(wanted / processes)
    memory = min(world.gather(torch.cuda.get_device_properties(world.device).total_memory))
    data.batch_size, optimization.accumulate = micro_batches(
        own, optimization.accumulate, limit=fitting(config, world, model, memory)
    )
    return config, [_told(config, processes, paper, images, memory)]


def _told(config: Config, processes: int, paper: int, images: int, memory: int) -> str:
    size, parts = config.data.batch_size, config.optimization.accumulate
    assert size is not None
    total = size * parts * processes
    flags = f"--batch-size {size}" + (f" --accumulate {parts}" if parts > 1 else "")
    if 2 * total <= paper:
        why = f"the {paper:,} of the recipe's paper would make {images // paper} steps an epoch"
    else:
        why = "as in the recipe's paper" if total == paper else f"about the {paper:,} of the recipe's paper"
    fits = f"; this many at once fit {memory / 2**30:.0f} GiB, by an estimate" if parts > 1 else ""
    return f"{flags}: {total:,} images a step, {why}{fits}"


def even(number: float) -> int:
    """The nearest even number, at least 2: mixing pairs the samples of a batch."""
    return max(2, 2 * round(number / 2))


def micro_batches(own: int, accumulate: int, *, limit: int) -> tuple[int, int]:
    """(--batch-size, --accumulate) of a process whose steps see `own` images, an even number: as few micro-batches as
    have an even size of at most `limit`; as many as `accumulate` says if that is not 1."""
    if accumulate > 1:
        return even(own / accumulate), accumulate
    parts = next(n for n in range(1, own // 2 + 1) if own % n == 0 and own // n % 2 == 0 and own // n <= max(limit, 2))
    return own // parts, parts


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def fitting(config: Config, world: World, model: nn.Module, memory: int) -> int:
    """How many images at once a training step can have in so many bytes, by estimate; FEW where it cannot be made."""
    size, precision = (config.data.in_chans, *height_width(config.data.input_size)), precision_of(config, world.device)
    try:
        each = kept_bytes(model, size, precision)
    except Exception:  # a model that does not run on fake tensors; whatever it raises, the run itself may still work
        return FEW
    channels, height, width = size
    # Three bytes a pixel, of the batches decoded ahead too; floats.
    each = BACKWARD * each + height * width * (3 * 4 + channels * precision.itemsize)
    return int(((memory - RESERVED) * USABLE - fixed_bytes(config, model)) / each)


def fixed_bytes(config: Config, model: nn.Module) -> int:
    """Of weights, gradients, optimizer, moving average, and the weights' copies in half precision."""
    each = 4 + 4 + BYTES[config.optimization.opt] + 4 * config.model.model_ema + 2
    return each * sum(parameter.numel() for parameter in model.parameters())


def kept_bytes(model: nn.Module, size: int | tuple[int, int, int], precision: torch.dtype) -> float:
    """Bytes for each image that autograd keeps of a forward pass in train(), under autocast to `precision`.

    size: channels, height and width of the images, or the side of coloured squares. Weights and their copies, which do
    not grow with the batch, are no part of it.
    """
    size = (3, size, size) if isinstance(size, int) else size
    few, more = (sum(_kept(model, batch, size, precision)) for batch in (2, 4))
    return (more - few) / 2


def _kept(model: nn.Module, batch: int, size: tuple[int, int, int], precision: torch.dtype) -> Iterator[int]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Tensor] = {}
    model = copy.deepcopy(model).train()
    if hasattr(model, "set_attention"):
        model.set_attention("sdpa")  # what the others keep is the same, but they may not run on a CPU

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        weights = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        images = torch.empty(batch, *size, dtype=precision)
        half = nullcontext() if precision == torch.float32 else torch.autocast("cpu", precision)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), half:
            result = functional_call(model, weights, (images,))
        yield from (tensor.untyped_storage().nbytes() for tensor in kept.values())
        del result
