"""Decoding on the CPU: DALI decodes the crop windows, PyTorch resizes them, Pillow applies the operations.

    in    Plan: indices (B,) int64, views
    out   images (B, height, width, 3) uint8

DALI's resize takes two thirds of its time on a CPU; PyTorch's for uint8 (vectorised, antialiased bicubic, modelled on
Pillow's) is several times faster and closer to Pillow. The operations are those of Pillow itself, which define timm's
RandAugment and torchvision's ColorJitter. All three release the GIL, so threads share the work.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fastdeit.pipelines.augment.crop import PADDING, Size, height_width
from fastdeit.pipelines.augment.operations import GEOMETRIC, Operation, affine_matrices
from fastdeit.pipelines.augment.plan import Plan

from .graph import window_graph, window_inputs

CHUNK = 4  # samples a thread takes at a time: operations differ so much in cost that equal shares would be unbalanced
PYTORCH_GRAIN = 32768  # elements up to which PyTorch runs an operation in one thread (at::internal::GRAIN_SIZE)


class CpuDecoder:
    """A prefetch.Decoder."""

    def __init__(self, index, batch_size: int, size: tuple[int, int], num_threads: int, fill: tuple[int, int, int]):
        self.index, self.graph = index, window_graph(index, batch_size, num_threads)
        self.size, self.fill = size, fill
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastdeit-views")

    def feed(self, plan: Plan) -> None:
        self.graph.feed(window_inputs(self.index, plan.indices, plan.views.geometry.window))

    def start(self) -> None:
        self.graph.start()

    def collect(self, plan: Plan) -> torch.Tensor:
        """(B, height, width, 3) uint8, newly allocated. After a DecodeError, the batch counts as collected."""
        (windows,) = self.graph.collect()
        B, views = len(plan.indices), plan.views
        images = torch.empty(B, *self.size, 3, dtype=torch.uint8)
        rows = list(
            zip(
                images.numpy(),
                windows,
                views.geometry.resized.tolist(),
                views.geometry.corner.tolist(),
                views.flip.tolist(),
                views.ops.tolist(),
                views.args.tolist(),
            )
        )
        list(self.pool.map(self._finish, (rows[i : i + CHUNK] for i in range(0, B, CHUNK))))
        return images

    def _finish(self, rows) -> None:
        for image, window, resized, corner, flip, ops, args in rows:
            view = resized_view(torch.from_numpy(np.asarray(window)), resized, corner, self.size)
            image[:] = view.numpy()
            if flip:
                mirror(image)
            if any(ops):
                image[:] = apply_operations(image, ops, args, self.fill)


def mirror(image: np.ndarray) -> None:
    """Flip left to right, in place. In chunks small enough for PyTorch to use one thread: its own thread pool would
    compete with ours for the cores."""
    rows = max(1, PYTORCH_GRAIN // image[0].size)
    for part in torch.from_numpy(image).split(rows):
        part.copy_(part.flip(1))


def resized_view(window: torch.Tensor, resized: list[int], corner: list[int], size: Size) -> torch.Tensor:
    """window (h, w, 3) uint8 to (*size, 3) uint8, as augment/crop.py's Geometry says."""
    image = window[None].permute(0, 3, 1, 2)  # channels_last, which resizes twice as fast
    if list(image.shape[2:]) != resized:
        image = F.interpolate(image, size=resized, mode="bicubic", antialias=True)
    (height, width), (top, left), (rows, columns) = resized, corner, height_width(size)
    if top < 0 or left < 0 or top + rows > height or left + columns > width:
        image = F.pad(image, (PADDING,) * 4, mode="reflect")
        top, left = top + PADDING, left + PADDING
    return image[0, :, top : top + rows, left : left + columns].permute(1, 2, 0)


def _affine(image: Image.Image, op: int, arg: float, fill: tuple[int, int, int]) -> Image.Image:
    matrix = affine_matrices(np.array(op), np.array(arg), (image.height, image.width)).ravel().tolist()
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)


def _solarize_add(image: Image.Image, add: float) -> Image.Image:
    table = [min(255, value + int(add)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


PILLOW_OPERATIONS = {
    Operation.AUTO_CONTRAST: lambda image, arg: ImageOps.autocontrast(image),
    Operation.EQUALIZE: lambda image, arg: ImageOps.equalize(image),
    Operation.INVERT: lambda image, arg: ImageOps.invert(image),
    Operation.POSTERIZE: lambda image, arg: image if arg >= 8 else ImageOps.posterize(image, int(arg)),
    Operation.SOLARIZE: lambda image, arg: ImageOps.solarize(image, int(arg)),
    Operation.SOLARIZE_ADD: _solarize_add,
    Operation.COLOR: lambda image, arg: ImageEnhance.Color(image).enhance(arg),
    Operation.CONTRAST: lambda image, arg: ImageEnhance.Contrast(image).enhance(arg),
    Operation.BRIGHTNESS: lambda image, arg: ImageEnhance.Brightness(image).enhance(arg),
    Operation.SHARPNESS: lambda image, arg: ImageEnhance.Sharpness(image).enhance(arg),
    Operation.BLUR: lambda image, arg: image.filter(ImageFilter.GaussianBlur(arg)),
}


def apply_operations(
    image_HWC: np.ndarray, ops: list[int], args: list[float], fill: tuple[int, int, int]
) -> np.ndarray:
    """A uint8 image (height, width, 3) after `ops` with their `args`, in order; a new array."""
    image = Image.fromarray(image_HWC)
    for op, arg in zip(ops, args):
        if op in GEOMETRIC:
            image = _affine(image, op, arg, fill)
        elif op != Operation.IDENTITY:
            image = PILLOW_OPERATIONS[op](image, arg)
    return np.asarray(image)
