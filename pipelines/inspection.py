"""Height and width of an encoded image from its first bytes, without decoding it.

JPEG, PNG, WebP and BMP are read here, in a sixth of the time of Pillow's lazy open; the rarer formats that DALI decodes
(TIFF, PNM, JPEG 2000) and JPEGs with an odd header go through Pillow. The format is told from the content, so
a PNG named .jpg is a PNG. Only what a header can tell is found: a body that breaks off shows when it is decoded.

Sizes are those of the stored pixels: an EXIF rotation is not applied, as in Pillow, torchvision and timm.
"""

import io
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

# read(offset, count): up to `count` bytes of the encoded image, fewer at its end; all the rest if count is -1.
Read = Callable[[int, int], bytes]

HEAD_BYTES = 4096  # one page; holds the frame header of most JPEGs, behind a short EXIF block

_UNSUPPORTED = {b"GIF8": "GIF", b"8BPS": "PSD", b"\xff\x0a": "JPEG XL", b"\x00\x00\x00\x0cJXL ": "JPEG XL"}
_FTYP_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}
_PNM = (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6")
_LEFT_TO_PILLOW = (b"II*\x00", b"MM\x00*", *_PNM, b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")


class BadHeader(ValueError):
    """The bytes are no image that can be decoded; the message is the cause, in a few words."""


class Inspected(NamedTuple):
    """What an index keeps of a header."""

    height: int  # pixels as stored
    width: int
    rotated: bool  # EXIF asks for a turn or a reflection, which is not applied


def columns(inspected: Sequence[Inspected]) -> dict[str, np.ndarray]:
    """heights, widths (n,) int32 and rotated (n,) bool, as Records has them."""
    heights, widths, rotated = np.array(inspected, np.int32).reshape(-1, 3).T
    return {"heights": heights.copy(), "widths": widths.copy(), "rotated": rotated.astype(bool)}


def inspect(read: Read) -> Inspected:
    """Raises BadHeader with the cause."""
    head = read(0, HEAD_BYTES)
    try:
        height, width = _size_by_format(head, read)
    except (struct.error, IndexError):
        raise BadHeader("truncated header") from None
    if height < 1 or width < 1:
        raise BadHeader(f"damaged header: {width} x {height} pixels")
    return Inspected(height, width, False)


def inspect_bytes(encoded: bytes | memoryview) -> Inspected:
    """`inspect` an image that is in memory."""
    return inspect(lambda offset, count: bytes(encoded[offset:] if count < 0 else encoded[offset : offset + count]))


def _size_by_format(head: bytes, read: Read) -> tuple[int, int]:
    if not head:
        raise BadHeader("empty file")
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(head, read)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return struct.unpack_from(">II", head, 16)[::-1]
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _webp_size(head)
    if head.startswith(b"BM"):
        return _bmp_size(head)
    if head.startswith(_LEFT_TO_PILLOW):
        return _pillow_size(read)
    raise BadHeader(_name_the_format(head))


def _jpeg_size(head: bytes, read: Read) -> tuple[int, int]:
    """Walk the marker segments up to the frame header (SOF0 to SOF15: ITU-T T.81, table B.1)."""
    position = 2
    while True:
        segment = head[position : position + 9]
        if len(segment) < 9:
            segment = read(position, 9)
        if segment[0] != 0xFF or segment[1] in (0x00, 0xD9, 0xDA):  # garbage, or image data before a frame header
            return _pillow_size(read)
        marker, length = segment[1], segment[2] << 8 | segment[3]
        if marker == 0xFF:  # a fill byte
            position += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # not DHT, JPG, DAC
            return struct.unpack_from(">HH", segment, 5)
        else:
            position += 2 + length


def _webp_size(head: bytes) -> tuple[int, int]:
    """The three kinds of first chunk: lossy (RFC 6386, 9.1), lossless, extended (RFC 9649, 2.5 to 2.7)."""
    chunk = head[12:16]
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", head, 26)
        return height & 0x3FFF, width & 0x3FFF
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", head, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if chunk == b"VP8X":
        if len(head) < 30:
            raise BadHeader("truncated header")
        return int.from_bytes(head[27:30], "little") + 1, int.from_bytes(head[24:27], "little") + 1
    raise BadHeader("damaged WebP header")


def _bmp_size(head: bytes) -> tuple[int, int]:
    (header_bytes,) = struct.unpack_from("<I", head, 14)
    width, height = struct.unpack_from("<HH" if header_bytes == 12 else "<ii", head, 18)
    return abs(height), width  # a negative height means that the rows are stored from the top


def _pillow_size(read: Read) -> tuple[int, int]:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read(0, -1))) as image:
            size, kind = (image.height, image.width), (image.format, image.mode)
    except Exception as error:  # Pillow's plugins raise whatever their parsers run into
        raise BadHeader(f"damaged header ({type(error).__name__})") from None
    if kind == ("TIFF", "I"):  # in a large batch DALI 2.4's decoder crashes on it, see decode.py
        raise BadHeader("unsupported format TIFF of 32-bit integers")
    return size


def _name_the_format(head: bytes) -> str:
    for magic, name in _UNSUPPORTED.items():
        if head.startswith(magic):
            return f"unsupported format {name}"
    if head[4:8] == b"ftyp":
        return f"unsupported format {_FTYP_BRANDS.get(head[8:12], 'MP4 or HEIF')}"
    return "not an image"
