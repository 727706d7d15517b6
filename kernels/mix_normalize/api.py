"""uint8 images to the normalised, erased and mixed batch the student reads, in one launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdeit.kernels.backend import use_triton

from .reference import empty_output, mix_normalize_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_NEEDS = (
    ("partner", "lam"),
    ("lam", "partner"),
    ("box", "partner"),
    ("erase_box", "erase_seed"),
    ("erase_seed", "erase_box"),
)


def mix_normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    partner: Tensor | None = None,
    lam: Tensor | None = None,
    box: Tensor | None = None,
    erase_box: Tensor | None = None,
    erase_seed: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Tensor:
    """Normalises uint8 images, erases a rectangle of each, and mixes each with its partner: mixup or cutmix.

    clean[i] = (images[i] / 255 - mean) / std, with standard normal noise in the rectangle erase_box[i]; then
    out[i]   = lam[i] * clean[i] + (1 - lam[i]) * clean[partner[i]]          where box[i] is empty (mixup), or
    out[i]   = clean[partner[i]] inside box[i], clean[i] outside             where it is not (cutmix; lam unused).

    This is timm's order of the DeiT recipe (timm/data/loader.py PrefetchLoader, random_erasing.py mode "pixel", then
    mixup.py), with the random draws as arguments. The noise is a pure function of (erase_seed, y, x, channel), see
    noise.py, so a sample's numbers depend on itself and its partner alone, whatever else is in the batch.

    Args:
        images: (B, H, W, 3) uint8, contiguous.
        mean, std: three floats each, in units of [0, 1] pixel values.
        partner: (B,) int64, position in the batch of the sample mixed in. Needs lam.
        lam: (B,) float32, weight of the sample itself; 1 where nothing is mixed.
        box: (B, 4) int32, the cutmix rectangles y0, x0, y1, x1 (ends excluded); None for mixup everywhere.
        erase_box: (B, 4) int32, the rectangles to erase, empty for none. Needs erase_seed.
        erase_seed: (B,) int64, keys of the noise.
        dtype: float32, float16 or bfloat16 of the result; the arithmetic is in float32 and rounded once.
        channels_last: memory format of the result.

    Returns: (B, 3, H, W). There is no gradient: the images are integers and the draws are data.

    Raises: ValueError for wrong shapes, dtypes, devices, or (on the CPU, where looking costs nothing) a partner outside
        the batch; on a GPU such a sample comes out as NaN.
    """
    _check(images, mean, std, dtype)
    draws = {"partner": partner, "lam": lam, "box": box, "erase_box": erase_box, "erase_seed": erase_seed}
    _check_draws(images, draws)
    return _mix_normalize(images, list(mean), list(std), partner, lam, box, erase_box, erase_seed, dtype, channels_last)


@torch.library.custom_op("fastdeit::mix_normalize", mutates_args=())
def _mix_normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    erase_box: Tensor | None,
    erase_seed: Tensor | None,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    B = images.shape[0]
    if partner is not None and images.device.type == "cpu" and B and not 0 <= partner.min() <= partner.max() < B:
        raise ValueError(f"partner must lie in 0..{B - 1}, the positions of this batch, got {partner.tolist()}")
    arguments = (images, mean, std, partner, lam, box, erase_box, erase_seed, dtype, channels_last)
    if use_triton(images):
        from .triton_kernels import mix_normalize_triton

        return mix_normalize_triton(*arguments)
    return mix_normalize_reference(*arguments)


@_mix_normalize.register_fake
def _(images, mean, std, partner, lam, box, erase_box, erase_seed, dtype, channels_last):
    return empty_output(images, dtype, channels_last)


def _check(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be (batch, height, width, 3), got {tuple(images.shape)}")
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 pixels, got {images.dtype}; normalised images need no mix_normalize")
    if not images.is_contiguous():
        raise ValueError("images must be contiguous in memory; call .contiguous() first")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean and std must hold three floats, one per channel, got {mean} and {std}")
    if min(std) <= 0 or max(*mean, *std) > 2:
        raise ValueError(
            f"mean and std are in units of [0, 1] pixels, std above 0, got {mean} and {std}; divide by 255"
        )
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")


def _check_draws(images: Tensor, draws: dict[str, Tensor | None]) -> None:
    for name, needed in _NEEDS:
        if draws[name] is not None and draws[needed] is None:
            raise ValueError(f"{name} was given without {needed}: pass both, or neither")
    expected = {
        "partner": ((), torch.int64),
        "lam": ((), torch.float32),
        "box": ((4,), torch.int32),
        "erase_box": ((4,), torch.int32),
        "erase_seed": ((), torch.int64),
    }
    for name, (tail, dtype) in expected.items():
        tensor, shape = draws[name], (images.shape[0], *tail)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.device != images.device:
            raise ValueError(f"{name} is on {tensor.device} and images on {images.device}: move them to one device")
