"""What an index learns from a header, how much it reads for it, and what it says where DALI is missing."""

import logging
import os
import random
import subprocess
import sys

import odd_images
import pytest
from header_variants import variants
from odd_images import encoded, picture, write
from PIL import Image

from fastdeit.pipelines import open_folder
from fastdeit.pipelines.index import inspection
from fastdeit.pipelines.index.inspection import HEAD_BYTES, BadHeader, inspect, inspect_bytes

pytest.importorskip("nvidia.nvimgcodec")


def exif(orientation: int, padding: int = 0) -> Image.Exif:
    data = Image.Exif()
    data[0x010E] = "x" * padding
    data[0x0112] = orientation
    return data


class Reading:
    """A file in memory that counts what is read of it."""

    def __init__(self, contents: bytes):
        self.contents, self.end = contents, 0

    def __call__(self, offset: int, count: int) -> bytes:
        part = self.contents[offset:] if count < 0 else self.contents[offset : offset + count]
        self.end = max(self.end, offset + len(part))
        return part


@pytest.mark.parametrize("padding, most", [(0, HEAD_BYTES), (20_000, 16 * HEAD_BYTES)])
def test_of_a_jpeg_only_the_header_is_read(padding, most):
    contents = encoded(picture(), exif=exif(6, padding)) + bytes(1_000_000)
    read = Reading(contents)
    assert inspect(read) == (odd_images.HEIGHT, odd_images.WIDTH, True)
    assert read.end <= most


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_is_seen_and_the_size_is_that_of_the_stored_pixels(format, orientation):
    options = {"tiffinfo": {274: orientation}} if format == "TIFF" else {"exif": exif(orientation)}
    header = inspect_bytes(encoded(picture(), format, **options))
    assert header == (odd_images.HEIGHT, odd_images.WIDTH, orientation != 1)


def test_how_many_are_rotated_is_said_once_for_an_index(tmp_path, caplog):
    files = {f"{n}.jpg": encoded(picture(), exif=exif(1 + n % 2)) for n in range(10)}
    write(tmp_path / "images", files)
    for _ in range(2):  # built, and from the cache
        with caplog.at_level(logging.WARNING):
            open_folder(tmp_path / "images", cache_dir=tmp_path / "cache")
        said = [message for message in caplog.messages if "orientation" in message]
        assert said == [
            f"the folder {tmp_path / 'images'}: the EXIF orientation of 5 images is not applied, as in timm"
        ]
        caplog.clear()


def test_files_are_released(tmp_path):
    bad = {name: contents for name, (contents, _) in odd_images.bad_by_header().items()}
    write(tmp_path, odd_images.odd_but_good() | bad)
    open_folder(tmp_path)  # whatever is opened once
    before = len(os.listdir("/proc/self/fd"))
    open_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
    with open("/proc/self/maps") as maps:
        assert str(tmp_path) not in maps.read()


def test_without_dali_the_index_says_what_is_missing(tmp_path, monkeypatch):
    write(tmp_path, {"a.jpg": encoded(picture())})
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)  # importing it raises
    inspection._parser.cache_clear()
    try:
        with pytest.raises(ModuleNotFoundError) as raised:
            open_folder(tmp_path)
    finally:
        inspection._parser.cache_clear()
    said = str(raised.value)
    assert said.startswith("images are checked and decoded by NVIDIA DALI, which is not installed")
    assert said.endswith("pip install 'fastdeit[train]'")


def mutated(numbers: random.Random, contents: bytes) -> bytes:
    """With one to three places of the header overwritten, or cut off."""
    changed = bytearray(contents)
    for _ in range(numbers.choice([1, 1, 2, 3])):
        place = numbers.randrange(min(len(changed), numbers.choice([64, 160, 600])))
        values = numbers.choice(
            [b"\0", b"\xff", b"\0\0", b"\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80", b"\1"]
        )
        changed[place : place + len(values)] = values
    return bytes(changed[: numbers.choice([len(changed), len(changed), numbers.randrange(4, 600)])])


def inspect_mutations(seed: int, count: int) -> None:
    numbers = random.Random(seed)
    contents = [variant.contents for variant in variants().values() if variant.pixels is not None]
    for _ in range(count):
        try:
            inspect_bytes(mutated(numbers, numbers.choice(contents)))
        except BadHeader as cause:
            assert str(cause) and "0x" not in str(cause)


def test_no_header_ends_the_process_or_raises_anything_else():
    """In a process of its own, for the parser is not ours."""
    here = os.path.dirname(__file__)
    line = f"import sys; sys.path.insert(0, {here!r}); import test_inspection as t; t.inspect_mutations(0, 3000)"
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", line], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
