"""Views on the CPU: DALI decodes the windows, PyTorch resizes them, Pillow carries out the operations.

DALI's own resize takes three quarters of its time on a CPU; PyTorch's uint8 one (vectorised, antialiased, bicubic, the
arithmetic of Pillow) is several times faster and within a level of Pillow. Pillow's operations are the very ones that
define timm's RandAugment. All three let go of the interpreter's lock, so plain threads share the work.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from . import pillow
from .augmentation import Views
from .crop import PADDING
from .decode import window_graph
from .plan import Plan


class CpuViews:
    """Submit plans, collect their images in the same order; decoding runs ahead of the collecting."""

    def __init__(self, index, batch_size: int, size: int, num_threads: int, fill: tuple[int, int, int]):
        self.graph = window_graph(index, batch_size, num_threads)
        self.size, self.num_threads, self.fill = size, num_threads, fill
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="fastdeit-views")

    def submit(self, plan: Plan) -> None:
        self.graph.submit(plan)

    def collect(self, plan: Plan) -> torch.Tensor:
        """(B, size, size, 3) uint8, memory of its own. Raises DecodeError, having consumed the batch."""
        (windows,) = self.graph.collect()
        B = len(plan.indices)
        images = torch.empty(B, self.size, self.size, 3, dtype=torch.uint8)
        parts = np.array_split(np.arange(B), self.num_threads)
        list(self.pool.map(lambda rows: self._finish(rows, windows, plan.views, images), parts))
        return images

    def _finish(self, rows: np.ndarray, windows, views: Views, images: torch.Tensor) -> None:
        for row in rows:
            window = torch.from_dlpack(windows[int(row)])
            view = resized_view(window, views.geometry.resized[row], views.geometry.corner[row], self.size)
            images[row] = view.flip(1) if views.flip[row] else view
            if views.ops.shape[1] and views.ops[row].any():
                pillow.apply(images[row].numpy(), views.ops[row], views.args[row], self.fill)


def resized_view(window: torch.Tensor, resized: np.ndarray, corner: np.ndarray, size: int) -> torch.Tensor:
    """window (h, w, 3) uint8 to (size, size, 3) uint8: see crop.Geometry."""
    image = window.permute(2, 0, 1)[None]
    if image.shape[2:] != tuple(resized):
        image = F.interpolate(image, size=tuple(map(int, resized)), mode="bicubic", antialias=True)
    (height, width), (top, left) = resized, corner
    if top < 0 or left < 0 or top + size > height or left + size > width:
        image = F.pad(image, (PADDING,) * 4, mode="reflect")
        top, left = top + PADDING, left + PADDING
    return image[0, :, top : top + size, left : left + size].permute(1, 2, 0)
