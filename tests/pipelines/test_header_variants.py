"""Whatever a header says, the process survives, and what is not named as bad shows the right picture."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import decode_variants
import numpy as np
import pytest
from header_variants import H, W, by_pillow, variants
from odd_images import encoded, write
from PIL import Image

from fastdeit.pipelines import reencode

pytest.importorskip("nvidia.dali")

GOOD = 100
LEVELS = 2  # mean difference; other libraries round otherwise


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """What DALI made of all variants among good images, in batches of 64, in a process of its own."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of the workers of this run
    out = shared / "header_variants.npz"
    with open(shared / "header_variants.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one worker decodes, the others wait for it
        if not out.exists():
            decode_all(tmp_path_factory.mktemp("variants"), out)
    with np.load(out) as stored:
        return dict(stored)


def decode_all(folder: Path, out: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (GOOD, H, W, 3), dtype=np.uint8)
    write(folder, {f"{n:03d}.png": encoded(Image.fromarray(pixels), "PNG") for n, pixels in enumerate(noise)})
    write(folder, {file_name(name): variant.contents for name, variant in variants().items()})
    line = [sys.executable, decode_variants.__file__, str(folder), str(out)]
    subprocess.run(line, check=True, stderr=subprocess.DEVNULL)


def file_name(name: str) -> str:
    return name.replace(" ", "_") + ".png"  # the format is told from the content


def test_the_process_survives_and_the_good_images_are_right(decoded):
    noise = np.random.default_rng(0).integers(0, 256, (GOOD, H, W, 3), dtype=np.uint8)
    for n in range(GOOD):
        assert np.array_equal(decoded[f"whole/{n:03d}.png"], noise[n])


@pytest.mark.parametrize("kind", sorted({name.split()[0] for name in variants()}))
def test_a_variant_is_right_or_named_as_bad(decoded, kind):
    causes = json.loads(str(decoded["causes"]))
    wrong = {}
    for name, variant in variants().items():
        file = file_name(name)
        if name.split()[0] != kind or file in causes:
            continue
        pixels = by_pillow(variant.contents) if variant.pixels is None else variant.pixels
        if pixels is None:
            wrong[name] = "was decoded, though nobody can say what it shows"
            continue
        top, left, height, width = decoded[f"window/{file}"]
        for what, expected in (
            ("whole", pixels),
            ("part", pixels[top : top + height, left : left + width]),
        ):
            found = decoded[f"{what}/{file}"]
            error = np.abs(found.astype(int) - expected).mean() if found.shape == expected.shape else 255
            if error > LEVELS:
                wrong[name] = f"{what}: {error} levels off"
    assert not wrong


def test_prepare_decodes_to_the_same_pixels(decoded):
    for name, variant in variants().items():
        if (whole := decoded.get(f"whole/{file_name(name)}")) is not None:
            ours = np.asarray(reencode.decoded(variant.contents, 10_000).image)
            assert ours.shape == whole.shape and np.abs(ours.astype(int) - whole).max() <= 1, name


# What people have, and must not lose.
COMMON = [
    *(f"jpeg {kind}" for kind in ("444", "422", "420", "grey", "progressive", "rgb", "cmyk", "cmyk transform 2")),
    *(f"png colour {c} bits {b} interlace {i}" for c in (0, 2, 4, 6) for b in (8, 16) for i in (0, 1)),
    *(f"png colour 3 bits {bits} interlace 0" for bits in (1, 2, 4, 8)),
    *("png animation", "png palette alpha", "png gamma", "png colour 2 bits 8 interlace 0 key"),
    *(f"bmp header 40 depth {depth} compression 0" for depth in (1, 4, 8, 24, 32)),
    *("bmp header 40 depth 8 compression 1", "bmp header 124 depth 32 compression 3", "bmp 16 colours"),
    *("webp lossy", "webp lossless", "webp alpha lossy", "webp animation"),
    *(f"tiff by pillow {kind}" for kind in ("tiff_lzw RGB", "jpeg RGB", "packbits L", "zstd RGB", "group4")),
    *(f"tiff by pillow mode {mode}" for mode in ("CMYK", "YCbCr", "P", "RGBA", "I;16")),
    *(f"tiff order {o} big {b} bits {bits} samples 3" for o in "<>" for b in (False, True) for bits in (8, 16)),
    *(f"tiff orientation {o} samples 3" for o in range(1, 9)),
    *("pnm P4", "pnm P5 up to 255", "pnm P6 up to 255", "pnm P6 up to 65535", "pnm comments"),
]


@pytest.mark.parametrize("name", COMMON)
def test_common_kinds_are_decoded(decoded, name):
    assert file_name(name) not in json.loads(str(decoded["causes"]))


CAUSES = {
    "jpeg cmyk bare": "a CMYK JPEG without an Adobe marker",
    "jpeg 444 precision 12": "JPEG of 12 bits a sample",
    "jpeg 444 precision 136": "JPEG of 136 bits a sample",
    "jpeg 444 SOF3": "frame SOF3",
    "jpeg 444 size 65535 x 65535": "65535 x 65535 pixels, more than the 178,956,970 allowed",
    "png animation hidden": "an animated PNG whose default image is not one of its frames",
    "png cgbi": "Apple's variant of PNG (CgBI)",
    "png no end": "DALI cannot decode although Pillow can",
    "png size 2147483648 x 48": "damaged header: 48 x 2147483648 pixels",
    "bmp header 40 depth 16 compression 0": "BMP of 16 bits a pixel",
    "bmp 32 bit masks ff alpha 0 header 40": "BMP of 32 bits a pixel, compression 3",
    "bmp size (400, 48)": "truncated file",
    "tiff bits 8 samples 2 photometric 1 planar 1": "TIFF with 2 channels of 8 bits",
    "tiff bits 8 samples 3 photometric 2 planar 2": "planar",
    "tiff float f4 up to 255 samples 1": "floating-point",
    "tiff photometric 8 samples 3": "photometric interpretation 8",
    "tiff premultiplied": "multiplied by alpha",
    "tiff by pillow mode 1": "TIFF of mode 1, which DALI cannot decode although Pillow can",
    "tiff compression 50001": "TIFF with compression 50001",
    "webp exif": "WEBP of mode RGB, which DALI cannot decode although Pillow can",
    "webp short riff": "damaged",
    "pnm P5 up to 4095": "PNM with a maximum of 4095",
    "pnm P3 up to 255": "PNM of kind P3",
    "gif": "unsupported format GIF: convert it",
    "jpeg2000": "unsupported format JPEG 2000: convert it",
    "jpeg2000 tiles of width 0 bare": "unsupported format JPEG 2000",
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_the_true_one(decoded, name):
    cause = json.loads(str(decoded["causes"]))[file_name(name)]
    assert CAUSES[name] in cause and "object at 0x" not in cause


def test_no_cause_is_noise(decoded):
    for name, cause in json.loads(str(decoded["causes"])).items():
        assert cause and "0x" not in cause and "\n" not in cause and len(cause) < 200, name
