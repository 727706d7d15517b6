"""Which decoding a GPU can be trusted with, found before a loader is built on it.

Some of the run's own images are decoded by the GPU in a process of its own and compared with the CPU's pixels. If that
process ends by a signal, does not finish in time or disagrees, the next decoding is tried. Why: regions of ordinary
JPEGs end the process on some GPUs with nvImageCodec 0.9 (NVIDIA/nvImageCodec#55), and no exception says so.

    choice = trusted(index, 0, num_threads=8)      # in one process of a job; the others take its word
    train_loader(index, device="cuda:0", decoding=choice.decoding)
"""

import ctypes
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdeit.pipelines.augment.crop import full_windows
from fastdeit.pipelines.bad_files import DecodeError
from fastdeit.pipelines.child import Call, Outcome, outcomes

from . import DECODINGS, Decoding
from .graph import window_graph, window_inputs

IMAGES = 32  # each decoded twice: a random window of training, and all of it as in evaluation
BYTES = 2**28  # of pixels at most, of large images fewer
SECONDS = 120.0  # for one decoding, with the start of its process on a cold disk
# Mean difference of an image in levels of 255. The same image with other roundings: up to 1.3; with chroma repeated in
# place of interpolated: 1.1 and 0.8 on two photographs; a smooth photograph moved by one pixel: 3.
BOUND = 2.5
ROI_NVJPEG = (13, 2)  # from here on nvJPEG's regions with interpolated chroma are right at the edges
NAMES = {
    "regions": "decoding of regions on the GPU",
    "whole": "decoding of whole images on the GPU",
    "cpu": "decoding on the CPU",
}
REAL = {decoding: f"{__name__}:decode" for decoding in DECODINGS}
ALONE = "the GPU lets no second process in, so its decoder cannot be tried"
ISSUE = "https://github.com/NVIDIA/nvImageCodec/issues/55"


class Choice(NamedTuple):
    decoding: Decoding
    sentence: str | None  # what the user should know of it; None for the fastest


_found: dict[tuple[int, str], Choice] = {}


def trusted(index, device_id: int, num_threads: int | None = None) -> Choice:
    """`probe` of the images of this index on this GPU, once in a process. num_threads: 4 if None."""
    key = (device_id, index.fingerprint)
    if key not in _found:
        _found[key] = probe(index, device_id, num_threads or 4)
    return _found[key]


def probe(
    index,
    device_id: int | None,
    num_threads: int,
    *,
    decoders: Mapping[Decoding, str] = REAL,
    seconds: float = SECONDS,
) -> Choice:
    """The fastest decoding that agrees with the CPU's.

    device_id: the GPU. decoders: what decodes, "module:function" as `decode`; "cpu" is taken without being tried.
    seconds: limit for each
    """
    with tempfile.TemporaryDirectory(prefix="fastdeit-probe-") as folder:
        samples = Path(folder) / "samples.npz"
        expected = write_samples(index, samples)
        reasons: list[str] = []
        for decoding in DECODINGS[:-1]:
            if not expected:
                return Choice("regions", None)  # nothing to be seen; the run reports its bad files
            pixels = Path(folder) / f"{decoding}.npz"
            call = Call(decoders[decoding], (decoding, str(samples), str(pixels), device_id, num_threads))
            (outcome,) = outcomes([call], seconds=seconds)
            reason = _what_became(outcome) or reason_against(decoding, outcome.value, read_images(pixels), expected)
            if reason is None:
                return Choice(decoding, _sentence(reasons, decoding))
            if ALONE in reason:
                return Choice("whole", f"{NAMES[decoding]} is not used: {ALONE}; {_taken('whole')}")
            reasons.append(f"{NAMES[decoding]} {reason}")
    return Choice("cpu", _sentence(reasons, "cpu"))


def _what_became(outcome: Outcome) -> str | None:
    if outcome.failure is None:
        return None
    if outcome.ended and outcome.failure.startswith("SIG"):
        return f"ends its process with {outcome.failure}"
    return f"fails ({outcome.failure})"


def reason_against(
    decoding: Decoding, nvjpeg: list[int] | None, found: list[np.ndarray], expected: list[np.ndarray]
) -> str | None:
    """Why this decoding, by nvJPEG of this version, is not to be used; None if it may be."""
    if [image.shape for image in found] != [image.shape for image in expected]:
        return "gives images of other sizes than the CPU's"
    differences = [np.abs(a.astype(np.int16) - b).mean() for a, b in zip(found, expected)]
    if (worst := max(differences)) > BOUND:
        return f"differs from the CPU's pixels by {worst:.1f} levels on average in an image ({BOUND} are tolerated)"
    version = tuple(nvjpeg or ())
    if decoding == "regions" and version and version < ROI_NVJPEG:
        return (
            f"is not what nvJPEG {'.'.join(map(str, version))} does itself with interpolated chroma "
            "(`pip install -U nvidia-nvjpeg` brings one that does, 13.2 or later)"
        )
    return None


def _sentence(reasons: list[str], taken: Decoding) -> str | None:
    if not reasons:
        return None
    crashed = any(" SIG" in reason or "nvImageCodec" in reason for reason in reasons)
    return f"{'; '.join(reasons)}; {_taken(taken)}" + (f"; see {ISSUE}" if crashed else "")


def _taken(decoding: Decoding) -> str:
    return f"{NAMES[decoding]} is used, which is slower"


# ---------------------------------------------------------------------------------------------------------------------
# Samples and pixels on their way between the processes


class Samples:
    """Encoded images as an index has them, from the file of `write_samples`."""

    def __init__(self, file: Path):
        with np.load(file) as saved:
            self.blob, self.encoded_bytes, self.windows = saved["blob"], saved["encoded_bytes"], saved["windows"]
        self.ends = np.cumsum(self.encoded_bytes)

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, i: int) -> str | None:
        return None

    def encoded(self, i: int) -> np.ndarray:
        return self.blob[self.ends[i] - self.encoded_bytes[i] : self.ends[i]]


def write_samples(index, file: Path) -> list[np.ndarray]:
    """Write images from all over the index, each twice, with its windows; return what the CPU makes of them. Those
    that it cannot decode are left out."""
    chosen = np.unique(np.linspace(0, len(index) - 1, min(IMAGES, len(index))).round().astype(int))
    heights, widths = index.heights[chosen].astype(np.int64), index.widths[chosen].astype(np.int64)
    random, sides = np.random.default_rng(0), np.stack([heights, widths], 1)
    shape = np.maximum(1, (sides * random.uniform(0.3, 1, sides.shape)).astype(np.int64))
    corner = ((sides - shape) * random.uniform(size=sides.shape)).astype(np.int64)
    windows = np.concatenate([np.concatenate([corner, shape], 1), full_windows(heights, widths)])
    graph, kept, pixels, room = window_graph(index, 1, 1), [], [], BYTES
    for row, i in enumerate(np.tile(chosen, 2).tolist()):
        try:
            encoded = index.encoded(i)
            graph.submit(window_inputs(index, np.array([i]), windows[row : row + 1]))
            (decoded,) = graph.collect()
        except (OSError, DecodeError):
            continue
        room -= (image := np.array(decoded[0])).nbytes
        if room >= 0 or not pixels:
            kept.append((encoded, windows[row]))
            pixels.append(image)
    if kept:
        blobs, kept_windows = zip(*kept)
        lengths = np.array([len(blob) for blob in blobs])
        np.savez(file, blob=np.concatenate(blobs), encoded_bytes=lengths, windows=np.stack(kept_windows))
    return pixels


def write_images(file: Path, images: list[np.ndarray]) -> None:
    np.savez(file, *images)


def read_images(file: Path) -> list[np.ndarray]:
    with np.load(file) as saved:
        return [saved[f"arr_{i}"] for i in range(len(saved.files))]


# ---------------------------------------------------------------------------------------------------------------------
# In the process of its own


def decode(decoding: Decoding, samples: str, pixels: str, device_id: int | None, num_threads: int) -> list[int] | None:
    """Decode the samples as one batch, three times over, and write the last one's pixels. Returns nvJPEG's version."""
    if device_id is not None:
        _enter_gpu(device_id)
    index = Samples(Path(samples))
    graph = window_graph(index, len(index), num_threads, device_id, decoding)
    for _ in range(3):
        graph.submit(window_inputs(index, np.arange(len(index)), index.windows))
        (windows,) = graph.collect()
    windows = windows.as_cpu() if device_id is not None else windows
    write_images(Path(pixels), [np.array(window) for window in windows])
    return nvjpeg_version()


def _enter_gpu(device_id: int) -> None:
    """Refused where the GPU's compute mode keeps a second process out, which says nothing of its decoder."""
    cuda = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), device_id)
        or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    ):
        raise RuntimeError(ALONE)


def nvjpeg_version() -> list[int] | None:
    """Of the library that this process has loaded, such as [13, 3]; None where it has loaded none."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    path = next((line.split()[-1] for line in lines if "/libnvjpeg.so" in line), None)
    return None if path is None else version_of_nvjpeg(path)


def version_of_nvjpeg(path: str) -> list[int] | None:
    library, number, found = ctypes.CDLL(path), ctypes.c_int(), []
    for which in (0, 1):  # libraryPropertyType: MAJOR_VERSION, MINOR_VERSION
        if library.nvjpegGetProperty(which, ctypes.byref(number)):
            return None
        found.append(number.value)
    return found
