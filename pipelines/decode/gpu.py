"""Decoding on a GPU: DALI does everything, from the encoded bytes to the finished view; no pixel passes the host.

in    Plan: indices (B,) int64, views
out   images (B, height, width, 3) uint8 on the GPU
"""

from contextlib import nullcontext

import torch
from nvidia.dali.plugin.pytorch import feed_ndarray

from fastdeit.pipelines.augment.augmentation import Augmentation
from fastdeit.pipelines.augment.plan import Plan

from . import Decoding
from .graph import view_graph, view_inputs


class GpuDecoder:
    """A prefetch.Decoder.

    augmentation: None for evaluation
    decoding: one that probe.py trusts
    """

    def __init__(
        self,
        index,
        batch_size: int,
        size: tuple[int, int],
        num_threads: int,
        device: torch.device,
        augmentation: Augmentation | None,
        decoding: Decoding = "regions",
    ):
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())  # in another thread it may be another one
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
            decoding=decoding,
        )

    def feed(self, plan: Plan) -> None:
        inputs = view_inputs(self.index, plan.indices, plan.views, self.size, self.layers, self.crop)
        with self._on_device():  # or a thread that has no device yet would begin to use the first
            self.graph.feed(inputs)

    def start(self) -> None:
        self.graph.start()

    def collect(self, plan: Plan) -> torch.Tensor:
        """(B, height, width, 3) uint8 on the device, ready on PyTorch's current stream.

        A copy on the device (77 MB for 256 views of 224 x 224): DALI reclaims memory shared by DLPack only after a
        cudaDeviceSynchronize for each batch, in a thread of its own (DLTensorGraveyard in its dltensor.cc). That keeps
        a core busy, and CUDA forbids the call while a graph is captured.

        After a DecodeError, the batch counts as collected.
        """
        with self._on_device():  # otherwise DALI assumes its default stream is another device's
            stream = torch.cuda.current_stream() if self.device.type == "cuda" else None
            (views,) = self.graph.collect(stream)
            images = torch.empty(len(plan.indices), *self.size, 3, dtype=torch.uint8, device=self.device)
            return feed_ndarray(views.as_tensor(), images, stream)

    def _on_device(self):
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
