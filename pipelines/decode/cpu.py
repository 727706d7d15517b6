"""Views on the CPU: DALI decodes the windows, PyTorch resizes them, Pillow carries out the operations.

DALI's own resize takes two thirds of its time on a CPU; PyTorch's uint8 one (vectorised, antialiased, bicubic, after
Pillow's) is several times faster and closer to Pillow. Pillow's operations are the very ones that define timm's
RandAugment. All three let go of the interpreter's lock, so plain threads share the work.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from fastdeit.pipelines.augment.crop import PADDING
from fastdeit.pipelines.augment.plan import Plan

from . import pillow
from .graph import window_graph, window_inputs

SHARE = 4  # samples a thread takes at a time: operations differ so much in cost that equal parts would not end together
PYTORCH_GRAIN = 32768  # elements up to which PyTorch keeps an operation in one thread (at::internal::GRAIN_SIZE)


class CpuViews:
    """Submit plans, collect their images in the same order; decoding runs ahead of the collecting."""

    def __init__(self, index, batch_size: int, size: int, num_threads: int, fill: tuple[int, int, int]):
        self.index, self.graph = index, window_graph(index, batch_size, num_threads)
        self.size, self.fill = size, fill
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastdeit-views")

    def submit(self, plan: Plan) -> None:
        self.graph.submit(window_inputs(self.index, plan.indices, plan.views.geometry.window))

    def collect(self, plan: Plan) -> torch.Tensor:
        """(B, size, size, 3) uint8, memory of its own. Raises DecodeError, having consumed the batch."""
        (windows,) = self.graph.collect()
        B, views = len(plan.indices), plan.views
        images = torch.empty(B, self.size, self.size, 3, dtype=torch.uint8)
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
        list(self.pool.map(self._finish, (rows[i : i + SHARE] for i in range(0, B, SHARE))))
        return images

    def _finish(self, rows) -> None:
        for image, window, resized, corner, flip, ops, args in rows:
            view = resized_view(torch.from_numpy(np.asarray(window)), resized, corner, self.size)
            image[:] = view.numpy()
            if flip:
                mirror(image)
            if any(ops):
                image[:] = pillow.apply(image, ops, args, self.fill)


def mirror(image: np.ndarray) -> None:
    """Left to right, in place. In pieces so small that PyTorch does not call its own threads to help, which would be
    waiting for a core that ours are using."""
    rows = max(1, PYTORCH_GRAIN // image[0].size)
    for part in torch.from_numpy(image).split(rows):
        part.copy_(part.flip(1))


def resized_view(window: torch.Tensor, resized: list[int], corner: list[int], size: int) -> torch.Tensor:
    """window (h, w, 3) uint8 to (size, size, 3) uint8: see crop.Geometry."""
    image = window[None].permute(0, 3, 1, 2)  # in this order it counts as channels_last, which is resized twice as fast
    if list(image.shape[2:]) != resized:
        image = F.interpolate(image, size=resized, mode="bicubic", antialias=True)
    (height, width), (top, left) = resized, corner
    if top < 0 or left < 0 or top + size > height or left + size > width:
        image = F.pad(image, (PADDING,) * 4, mode="reflect")
        top, left = top + PADDING, left + PADDING
    return image[0, :, top : top + size, left : left + size].permute(1, 2, 0)
