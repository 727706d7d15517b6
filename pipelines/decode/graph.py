"""DALI graphs from encoded images to pixels: one definition for the GPU and the CPU.

    read -> decode the window -> resize -> crop -> flip -> operations, one a layer

    in    encoded bytes or paths, windows, sizes, flips and operations of a batch (`window_inputs`, `view_inputs`)
    out   uint8 HWC images: decoded windows (`window_graph`), or finished views (`view_graph`)

Nothing here is random: windows, flips and operations are drawn on the host (augment/) and fed with each batch, so the
pixels of a sample do not depend on the rest of its batch, on threads or on processes. Training on the CPU uses only the
first two steps (cpu.py does the rest faster); the others run there in tests.
"""

from collections.abc import Callable

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from nvidia.dali import math, pipeline_def

from fastdeit.pipelines.augment.augmentation import Views
from fastdeit.pipelines.augment.crop import PADDING
from fastdeit.pipelines.augment.operations import GEOMETRIC, Operation, affine_matrices
from fastdeit.pipelines.bad_files import DecodeError

from . import Decoding
from .dali_operations import layer

ON_GPU = {
    # Otherwise chroma is upsampled by repetition, where libjpeg interpolates.
    "jpeg_fancy_upsampling": True,
    # The hardware decoder's pixels differ from the CUDA decoder's. Which images of a batch it gets depends on the
    # other images and on timing, unless it gets all that it can decode.
    "hw_decoder_load": 1.0,
}


class Graph:
    """A DALI pipeline whose inputs are fed batch by batch: feed() hands over a batch, start() starts the oldest fed,
    collect() waits for the oldest started. start() and collect() count batches in Python without a lock: one thread
    calls both. feed() may be called in another one."""

    def __init__(self, define: Callable[[], tuple], batch_size: int, num_threads: int, device_id: int | None):
        # The queue is made of submitted batches; with its own, DALI would require the first few at once.
        build = pipeline_def(define, enable_conditionals=True)
        self.pipeline = build(
            batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=1
        )
        self.pipeline.build()

    def feed(self, inputs: dict[str, np.ndarray | list[np.ndarray]]) -> None:
        for name, value in inputs.items():
            self.pipeline.feed_input(name, value)

    def start(self) -> None:
        self.pipeline.schedule_run()

    def submit(self, inputs: dict[str, np.ndarray | list[np.ndarray]]) -> None:
        """feed() and start()."""
        self.feed(inputs)
        self.start()

    def collect(self, cuda_stream=None) -> tuple:
        """The outputs of the oldest started batch, which counts as collected even after a DecodeError."""
        try:
            return self.pipeline.outputs(cuda_stream=cuda_stream)
        except RuntimeError as error:
            raise DecodeError(str(error)) from error


def window_graph(
    index, batch_size: int, num_threads: int, device_id: int | None = None, decoding: Decoding = "regions"
) -> Graph:
    """Decoding only: one uint8 HWC image a sample, of varying size. Inputs: `window_inputs`."""
    from_files = index.path(0) is not None

    def define():
        return _decoded_windows(from_files, device_id is not None, decoding)

    return Graph(define, batch_size, num_threads, device_id)


def window_inputs(index, indices: np.ndarray, window: np.ndarray) -> dict:
    window = window.astype(np.int32)
    return {
        "source": _sources(index, indices),
        "encoded_bytes": index.encoded_bytes[indices],
        "start": window[:, :2].copy(),
        "shape": window[:, 2:].copy(),
    }


def view_graph(
    index,
    batch_size: int,
    num_threads: int,
    device_id: int | None,
    *,
    size: tuple[int, int],
    layers: tuple[frozenset[Operation], ...] = (),
    crop: str = "window",
    fill: tuple[int, int, int] = (0, 0, 0),
    decoding: Decoding = "regions",
) -> Graph:
    """Finished views, (*size, 3) uint8 a sample, on the GPU `device_id` or, if None, on the CPU. Inputs:
    `view_inputs`.

    layers: the operations that may come first, second, ... (Augmentation.layers)
    crop: "window" if the resized window is the view, "centre" if the view is cropped from it, "padded" if that crop may
        extend beyond the border
    """
    from_files = index.path(0) is not None

    def define():
        image = _decoded_windows(from_files, device_id is not None, decoding)
        image = _resized(image)
        if crop == "padded":
            image = _reflected(_reflected(image, axis=0), axis=1)
        if crop != "window":
            corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
            image = fn.slice(image, start=corner, shape=size, axes=[0, 1])
        image = fn.flip(image, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
        for number, possible in enumerate(layers):
            op = fn.external_source(name=f"op{number}", dtype=types.INT32, ndim=0)
            arg = fn.external_source(name=f"arg{number}", dtype=types.FLOAT, ndim=0)
            matrix = None
            if not possible.isdisjoint(GEOMETRIC):
                matrix = fn.external_source(name=f"matrix{number}", dtype=types.FLOAT, ndim=2)
            image = layer(image, op, arg, matrix, possible, fill)
        return image

    return Graph(define, batch_size, num_threads, device_id)


def view_inputs(index, indices: np.ndarray, views: Views, size: tuple[int, int], layers, crop: str) -> dict:
    inputs = window_inputs(index, indices, views.geometry.window)
    inputs["resized"] = views.geometry.resized.astype(np.float32)
    if crop != "window":
        inputs["corner"] = (views.geometry.corner + (PADDING if crop == "padded" else 0)).astype(np.int32)
    inputs["flip"] = views.flip.astype(np.int32)
    # One row a layer. The geometric operations share a branch; they differ in their matrix.
    ops, args = np.ascontiguousarray(views.ops.T), np.ascontiguousarray(views.args.T)
    matrices = affine_matrices(ops, args, size)
    ops = np.where((ops[..., None] == GEOMETRIC).any(-1), np.int32(Operation.ROTATE), ops)
    for number, possible in enumerate(layers):
        inputs[f"op{number}"], inputs[f"arg{number}"] = ops[number], args[number]
        if not possible.isdisjoint(GEOMETRIC):
            inputs[f"matrix{number}"] = matrices[number]
    return inputs


def _sources(index, indices: np.ndarray) -> np.ndarray | list[np.ndarray]:
    """The paths or the encoded bytes of the images. Paths as one array (B, longest), padded with zeros: DALI takes that
    in an eighth of the time of a list, and a path ends at its first zero."""
    if index.path(0) is not None:
        paths = np.array([index.path(i).encode("utf-8", "surrogateescape") for i in indices.tolist()])
        return paths.view(np.uint8).reshape(len(paths), -1)
    return [_encoded(index, i) for i in indices.tolist()]


def _encoded(index, i: int) -> np.ndarray:
    try:
        # Of shards these are pages of a file. They are read here, where NumPy releases the GIL, not when DALI copies
        # the batch, which holds it: other threads would stand still for as long as the disk takes.
        return index.encoded(i).copy()
    except OSError:
        return np.zeros(1, np.uint8)  # fails the check of its length, where bad images are handled


def _decoded_windows(from_files: bool, to_gpu: bool, decoding: Decoding):
    """uint8 HWC. EXIF rotation is not applied, as in Pillow and timm."""
    encoded = fn.external_source(name="source", dtype=types.UINT8, ndim=1)
    if from_files:
        encoded = fn.io.file.read(encoded)
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
    fault = _fault(encoded, start, shape)
    on_gpu = to_gpu and decoding != "cpu"
    options = {"device": "mixed", **ON_GPU} if on_gpu else {"device": "cpu"}
    if decoding == "whole":
        # The encoded image, which is what the decoder has to wait for here. A negative start is refused.
        length = fn.cast(encoded.shape(device="cpu"), dtype=types.INT32)
        encoded = fn.slice(encoded, start=fault, shape=length, axes=[0])
        image = fn.decoders.image(encoded, adjust_orientation=False, **options)
        image = fn.slice(image, start=start, shape=shape, axes=[0, 1])
    else:
        start = fn.slice(start, start=fault, shape=[2], axes=[0])
        image = fn.decoders.image_slice(encoded, start, shape, axes=[0, 1], adjust_orientation=False, **options)
    return image.gpu() if to_gpu and not on_gpu else image


def _fault(encoded, start, shape):
    """(1,) int32: 0 if the image has the length it was indexed with, its header can be read and the window lies within
    it; negative otherwise. To be the start of a slice before the decoder, which refuses it then.

    DALI 2.4's decoders read the headers and windows of 32 images or more in several threads, one of which is the
    operator's own: an error raised there destroys what the others still use, and the process ends in a segmentation
    fault. Raised before the decoder, it is an ordinary error. Headers that pass here and are refused there are not in
    an index (index/inspection.py); the length shows what changed since.
    """
    expected = fn.external_source(name="encoded_bytes", dtype=types.INT64, ndim=0)
    unchanged = fn.cast(encoded.shape(device="cpu")[0] == expected, dtype=types.INT32)
    size = fn.cast(fn.peek_image_shape(encoded, adjust_orientation=False)[:2], dtype=types.INT32)
    room = fn.reductions.min(size - start - shape)
    return math.min(math.min(room, 0), unchanged - 1)


def _resized(image):
    size = fn.external_source(name="resized", dtype=types.FLOAT, ndim=1)
    return fn.resize(image, size=size, interp_type=types.INTERP_CUBIC, antialias=True, subpixel_scale=False)


def _reflected(image, axis: int):
    """PADDING pixels of reflection (without the border pixel itself) before and after, along one axis."""
    flips = {"vertical" if axis == 0 else "horizontal": 1, "vertical" if axis == 1 else "horizontal": 0}
    length = fn.cast(image.shape(device="cpu")[axis], dtype=types.INT32)
    before = fn.slice(image, start=[1], shape=[PADDING], axes=[axis])
    after = fn.slice(image, start=length - (PADDING + 1), shape=[PADDING], axes=[axis])
    return fn.cat(fn.flip(before, **flips), image, fn.flip(after, **flips), axis=axis)
