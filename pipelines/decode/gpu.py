"""Views on a GPU: DALI does everything, from the encoded bytes to the finished view, and no pixel passes the host."""

import torch
from nvidia.dali.plugin.pytorch import feed_ndarray

from fastdeit.pipelines.augment.augmentation import Augmentation
from fastdeit.pipelines.augment.plan import Plan

from .graph import view_graph, view_inputs


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
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # later, in another thread, it may be another
        self.index, self.size, self.device = index, size, device
        self.layers = augmentation.layers if augmentation else ()
        self.crop = "centre" if augmentation is None else "padded" if augmentation.src else "window"
        self.graph = view_graph(
            index,
            batch_size,
            num_threads,
            device.index,
            size=size,
            layers=self.layers,
            crop=self.crop,
            fill=augmentation.fill if augmentation else (0, 0, 0),
        )

    def submit(self, plan: Plan) -> None:
        self.graph.submit(view_inputs(self.index, plan.indices, plan.views, self.size, self.layers, self.crop))

    def collect(self, plan: Plan) -> torch.Tensor:
        """(B, size, size, 3) uint8 on the device, ready on PyTorch's current stream.

        Copied on the device (77 MB read and written for 256 views of 224): memory that DALI shares by DLPack it takes
        back only after a cudaDeviceSynchronize for each batch, in a thread of its own (DLTensorGraveyard in its
        dltensor.cc). That is a core that spins, and a call that CUDA forbids while a graph is captured.

        Raises DecodeError, having consumed the batch.
        """
        if self.device.type == "cpu":
            return self._copied(plan, None)
        with torch.cuda.device(self.device):  # or DALI takes its default stream for another device's
            return self._copied(plan, torch.cuda.current_stream())

    def _copied(self, plan: Plan, stream) -> torch.Tensor:
        (views,) = self.graph.collect(stream)
        images = torch.empty(len(plan.indices), self.size, self.size, 3, dtype=torch.uint8, device=self.device)
        return feed_ndarray(views.as_tensor(), images, stream)
