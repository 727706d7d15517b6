"""From encoded images to pixels, in DALI.

Nothing here is random: which window, which flip, which operations come in with each batch, drawn on the host, so the
pixels of a sample do not depend on the batch around it, on threads or on processes.
"""

from collections.abc import Callable

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import Pipeline

from .plan import Plan


class DecodeError(Exception):
    """A batch could not be decoded: at least one of its images is bad. Later batches are not touched."""


class Graph:
    """A DALI pipeline that is handed its inputs batch by batch and runs ahead of whoever collects them."""

    def __init__(
        self, define: Callable[[], tuple], inputs: Callable[[Plan], dict], batch_size: int, num_threads: int, device_id
    ):
        # Batches queue up by being submitted; DALI's own queue would want the first few all at once.
        self.pipeline = Pipeline(batch_size, num_threads, device_id, prefetch_queue_depth=1)
        with self.pipeline:
            self.pipeline.set_outputs(*define())
        self.pipeline.build()
        self.inputs = inputs

    def submit(self, plan: Plan) -> None:
        for name, value in self.inputs(plan).items():
            self.pipeline.feed_input(name, value)
        self.pipeline.schedule_run()

    def collect(self, cuda_stream=None) -> tuple:
        """The outputs of the oldest batch that was submitted; it is consumed even when this raises DecodeError."""
        try:
            return self.pipeline.outputs(cuda_stream=cuda_stream)
        except RuntimeError as error:
            raise DecodeError(str(error)) from error


def encoded_images(from_files: bool):
    """Encoded bytes, from files that DALI reads itself or as they come from the shards of the index."""
    source = fn.external_source(name="source", dtype=types.UINT8, ndim=1)
    return fn.io.file.read(source) if from_files else source


def decoded_windows(encoded, device: str):
    """uint8 HWC; only the window is decoded. EXIF rotation is not applied, as in Pillow and timm."""
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    return fn.decoders.image_slice(encoded, start, shape, axes=[0, 1], device=device, adjust_orientation=False)


def window_inputs(index, plan: Plan) -> dict:
    """What `encoded_images` and `decoded_windows` ask for."""
    window = plan.views.geometry.window.astype(np.int32)
    return {"source": _sources(index, plan), "start": window[:, :2].copy(), "shape": window[:, 2:].copy()}


def _sources(index, plan: Plan) -> list[np.ndarray]:
    if index.path(0) is None:
        return [index.encoded(int(i)) for i in plan.indices]
    return [np.frombuffer(index.path(int(i)).encode("utf-8", "surrogateescape"), np.uint8) for i in plan.indices]


def window_graph(index, batch_size: int, num_threads: int) -> Graph:
    """Decoding alone, on the CPU: outputs one uint8 HWC image a sample, each of its own size."""
    from_files = index.path(0) is not None
    return Graph(
        lambda: (decoded_windows(encoded_images(from_files), "cpu"),),
        lambda plan: window_inputs(index, plan),
        batch_size,
        num_threads,
        None,
    )
