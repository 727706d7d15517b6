"""Re-encoding for prepare.py: one image, one shard, and the worker process that writes shards."""

import io
import multiprocessing as mp
import os
import signal
import tarfile
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .bad_files import BadFile
from .index.image_index import Index
from .index.inspection import refusal

# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is at least this many times the target size, the margin of
# Pillow's thumbnail(). Measured on noisy photos, 1200 x 1600 and 3000 x 4000 to 288: 2.0 and
# 3.4 times as fast as a full decode, 1.3 levels of mean difference.
DECODE_MARGIN = 2
PNG = b"\x89PNG\r\n\x1a\n"


class Decoded(NamedTuple):
    image: Image.Image  # RGB
    stored: tuple[int, int]  # width, height in the file
    extension: str  # of formats whose bytes may be copied; "" for others


class Small(NamedTuple):
    encoded: bytes
    extension: str


def shrink(encoded: bytes, size: int, quality: int) -> Small:
    """An RGB JPEG whose shorter side is `size` pixels, bicubic with antialiasing.

    Smaller images are not scaled up; a grey or RGB JPEG, an 8-bit PNG without alpha and a WebP are then copied byte by
    byte: a second lossy encoding would cost quality and save nothing. Any other PNG of that size becomes an RGB PNG.
    Every image is decoded, so that all output can be read. EXIF data is dropped when an image is encoded again; its
    orientation is not applied either way.

    Raises OSError, SyntaxError, ValueError or Image.DecompressionBombError for a file that is truncated or no image.
    """
    image, stored, extension = decoded(encoded, size)
    target = _target(*stored, size)
    fits = target == stored
    if fits and extension:
        return Small(encoded, extension)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BICUBIC)
    return _encode(image, quality, lossless=fits and encoded.startswith(PNG))


def decoded(encoded: bytes, size: int) -> Decoded:
    """With the decoder of training, except JPEGs: Pillow decodes them to the same pixels, and can decode at a fraction
    of the size. size: of the shorter side, pixels. Raises as `shrink` does."""
    if not encoded.startswith(b"\xff\xd8"):
        image = Image.fromarray(decode_one(encoded))
        return Decoded(image, image.size, _extension(encoded))
    with Image.open(io.BytesIO(encoded)) as image:
        stored, plain = image.size, image.format == "JPEG" and image.mode in ("RGB", "L")
        width, height = _target(*stored, size)
        image.draft("RGB", (DECODE_MARGIN * width, DECODE_MARGIN * height))
        return Decoded(image.convert("RGB"), stored, "jpg" if plain else "")


def _extension(encoded: bytes) -> str:
    if encoded.startswith(PNG):
        bits, colour = encoded[24], encoded[25]
        return "png" if bits == 8 and colour in (0, 2) else ""  # grey, RGB
    return "webp" if encoded.startswith(b"RIFF") else ""


def _encode(image: Image.Image, quality: int, lossless: bool) -> Small:
    stream = io.BytesIO()
    if lossless:
        image.save(stream, "PNG")
    else:
        image.save(stream, "JPEG", quality=quality, comment=b"")
    return Small(stream.getvalue(), "png" if lossless else "jpg")


def _target(width: int, height: int, size: int) -> tuple[int, int]:
    shorter = min(width, height)
    if shorter <= size:
        return width, height
    return max(1, round(width * size / shorter)), max(1, round(height * size / shorter))


class Stopped(Exception):
    """The command that started this worker failed or was interrupted."""


def start_worker(images_done, stop) -> None:
    """Initialise a worker: `images_done` counts the images of all workers, the event `stop` ends them."""
    global _images_done, _stop
    _images_done, _stop = images_done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_die_with_parent, daemon=True).start()


_images_done = _stop = None


def _die_with_parent() -> None:
    mp.parent_process().join()  # a killed parent cannot set `stop`
    os._exit(1)


def _count_image() -> None:
    if _stop is not None:
        if _stop.is_set():
            raise Stopped
        with _images_done.get_lock():
            _images_done.value += 1


def write_shard(index: Index, first: int, path: Path, size: int, quality: int) -> list[BadFile]:
    """Write all readable images of `index` to the tar `path`; returns the bad ones.

    first: number of the first image, part of its name. The bytes depend only on the images and the arguments.
    """
    bad = []
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for i in range(len(index)):
                try:
                    members = _members(index, i, first + i, size, quality)
                except Exception as error:  # Pillow's decoders raise many types
                    bad.append(BadFile(index.name(i), str(error) or type(error).__name__))
                else:
                    for name, contents in members:
                        _add(tar, name, contents)
                _count_image()
        file.flush()
        os.fsync(file.fileno())
    return bad


def _members(index: Index, i: int, number: int, size: int, quality: int) -> list[tuple[str, bytes]]:
    small = shrink(index.encoded(i).tobytes(), size, quality)
    stem = os.path.splitext(os.path.basename(index.records.names[i]))[0]
    key = f"{number:08d}-{stem.replace('.', '_')}"  # WebDataset cuts a key at its first dot
    return [(f"{key}.{small.extension}", small.encoded), (f"{key}.cls", str(index.labels[i]).encode())]


def _add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    info = tarfile.TarInfo(name)  # without time and owner: the same bytes each time
    info.size = len(contents)
    tar.addfile(info, io.BytesIO(contents))


def decode_one(encoded: bytes) -> np.ndarray:
    """One image with nvImageCodec, DALI's decoder: (height, width, 3) uint8, as stored (no orientation applied).

    Only for images that passed `inspect`. Raises ValueError with the cause if it cannot be decoded.
    """
    decoder, parse, parameters = _decoder()
    try:
        image = decoder.decode(parse(encoded), params=parameters)
    except RuntimeError:
        image = None
    if image is None:
        raise ValueError(refusal(encoded))
    return np.asarray(image.cpu())


@cache
def _decoder() -> tuple:
    from nvidia import nvimgcodec

    decoder = nvimgcodec.Decoder(
        device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
        max_num_cpu_threads=1,
        backends=[nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)],
    )
    parameters = nvimgcodec.DecodeParams(
        apply_exif_orientation=False, allow_any_depth=False, color_spec=nvimgcodec.ColorSpec.SRGB
    )
    return decoder, nvimgcodec.CodeStream, parameters
