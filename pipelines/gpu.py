"""Views on a GPU: DALI does everything, from the encoded bytes to the finished view, and no pixel passes the host."""

import torch

from .augmentation import Augmentation
from .decode import view_graph, view_inputs
from .plan import Plan


class GpuViews:
    """Submit plans, collect their images in the same order.

    augmentation: None for evaluation
    """

    def __init__(
        self,
        index,
        batch_size: int,
        size: int,
        num_threads: int,
        device: torch.device,
        augmentation: Augmentation | None,
    ):
        self.index, self.size, self.device = index, size, device
        self.layers = augmentation.layers if augmentation else ()
        self.crop = "centre" if augmentation is None else "padded" if augmentation.src else "window"
        self.graph = view_graph(
            index,
            batch_size,
            num_threads,
            _device_id(device),
            size=size,
            layers=self.layers,
            crop=self.crop,
            fill=augmentation.fill if augmentation else (0, 0, 0),
        )

    def submit(self, plan: Plan) -> None:
        self.graph.submit(view_inputs(self.index, plan.indices, plan.views, self.size, self.layers, self.crop))

    def collect(self, plan: Plan) -> torch.Tensor:
        """(B, size, size, 3) uint8 on the device, ready on PyTorch's current stream. DALI's own memory: DALI does not
        use it again while the tensor, or anything made from it without copying, exists.

        Raises DecodeError, having consumed the batch.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        (images,) = self.graph.collect(stream)
        return torch.from_dlpack(images.as_tensor())


def _device_id(device: torch.device) -> int | None:
    if device.type == "cpu":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
