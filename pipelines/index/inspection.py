"""Inspection of image headers: the size of an image, or why it cannot be decoded.

Every file goes through the parser of DALI's own decoder (nvidia.nvimgcodec, which is installed with it). What that
refuses must never reach DALI: in a batch of 32 images or more, DALI's decoder refuses it in one of several threads, and
the process ends. Of the rest, what DALI would silently decode to wrong pixels is refused here with the reason.
tests/pipelines/test_header_variants.py checks both against the decoder.

The format is detected from the content, so a PNG named .jpg is a PNG. Of a JPEG only the header is read; other files
are read to their end, because the parser of PNGs needs it and they are rarer. Damaged pixels are found by decoding.

Sizes are those of the stored pixels: an EXIF or TIFF orientation is not applied.
"""

import io
import os
import re
import struct
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

# read(offset, count): up to `count` bytes of the encoded image, fewer at its end; all the rest if count is -1.
Read = Callable[[int, int], bytes]

HEAD_BYTES = 4096  # one page; contains the full header of most JPEGs
MOST_PIXELS = 178_956_970  # half a gigabyte when decoded; twice Pillow's warning limit, where it raises
CONVERT = "convert it to an RGB JPEG or PNG"

# JPEG 2000: DALI 2.4's CPU decoder ends the process on many damaged files, also with an intact header.
_UNSUPPORTED = {
    b"GIF8": "GIF",
    b"8BPS": "PSD",
    b"\xff\x0a": "JPEG XL",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
_FTYP_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIF", b"msf1": "HEIF"}
_PNM = {b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"P7", b"PF", b"Pf"}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # baseline, extended, progressive; the latter two also arithmetic
_PNG_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type
# None, CCITT, LZW, JPEG, deflate (two numbers), PackBits, Zstandard: those of the libtiff in DALI 2.4. With any
# other, the pixels are uninitialised memory.
_TIFF_COMPRESSIONS = {1, 2, 3, 4, 5, 7, 8, 32773, 32946, 50000}


class BadHeader(ValueError):
    """The bytes are not an image that can be decoded; the message is the cause."""


class Inspected(NamedTuple):
    """What the index keeps of a header."""

    height: int  # pixels as stored
    width: int
    rotated: bool  # has an EXIF or TIFF orientation, which is not applied


def columns(inspected: Sequence[Inspected]) -> dict[str, np.ndarray]:
    """heights, widths (n,) int32 and rotated (n,) bool, as in Records."""
    heights, widths, rotated = np.array(inspected, np.int32).reshape(-1, 3).T
    return {"heights": heights.copy(), "widths": widths.copy(), "rotated": rotated.astype(bool)}


def inspect(read: Read) -> Inspected:
    """Raises BadHeader with the cause, ModuleNotFoundError where DALI is not installed. Thread-safe."""
    head = read(0, HEAD_BYTES)
    check = _check_of(head)
    try:
        header, rotated = check(head, read)
        height, width = _size_by_decoder(header)
    except (struct.error, IndexError):
        raise BadHeader("truncated header") from None
    except OverflowError:  # an offset beyond 64 bits
        raise BadHeader("damaged header") from None
    except (RuntimeError, TypeError):  # nvimgcodec refuses it
        raise BadHeader(refusal(read(0, -1))) from None
    if height < 1 or width < 1:
        raise BadHeader(f"damaged header: {width} x {height} pixels")
    if height * width > MOST_PIXELS:
        raise BadHeader(f"{width} x {height} pixels, more than the {MOST_PIXELS:,} allowed: make it smaller")
    return Inspected(height, width, rotated)


def inspect_bytes(encoded: bytes | memoryview | np.ndarray) -> Inspected:
    """`inspect` an image in memory."""
    return inspect(lambda offset, count: bytes(encoded[offset:] if count < 0 else encoded[offset : offset + count]))


def _size_by_decoder(header: bytes) -> tuple[int, int]:
    stream = _parser()(header)
    dtype = stream.dtype  # raises for what the parser accepts but DALI's decoder does not
    if dtype not in (np.uint8, np.uint16):
        raise _unsupported(f"{stream.codec_name.upper()} of {dtype}")
    return stream.height, stream.width


@cache
def _parser() -> type:
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # otherwise each refusal is printed
    try:
        from nvidia.nvimgcodec import CodeStream
    except ImportError as error:
        raise ModuleNotFoundError(
            "images are checked and decoded by NVIDIA DALI, which is not installed (nvidia.nvimgcodec comes with it): "
            "pip install 'fastdeit[train]'",
            name="nvidia.nvimgcodec",
        ) from error
    return CodeStream


def refusal(encoded: bytes) -> str:
    """Why DALI's decoder refuses an image whose format it knows."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            kind = f"{image.format} of mode {image.mode}"
            image.load()
    except UnidentifiedImageError:  # its message is the address of the BytesIO
        return "damaged header"
    except Exception as error:  # Pillow's plugins raise many types
        return f"damaged: {error or type(error).__name__}"
    return f"{kind}, which DALI cannot decode although Pillow can: {CONVERT}"


def _unsupported(what: str) -> BadHeader:
    return BadHeader(f"unsupported kind of image, {what}: {CONVERT}")


# --- by format: the bytes to give to the parser, and whether there is an orientation


def _check_of(head: bytes) -> Callable[[bytes, Read], tuple[bytes, bool]]:
    if not head:
        raise BadHeader("empty file")
    if head.startswith(b"\xff\xd8\xff"):
        return _check_jpeg
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return _check_png
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return _check_webp
    if head.startswith(b"BM"):
        return _check_bmp
    if head.startswith(_TIFF):
        return _check_tiff
    if head[:2] in _PNM and head[2:3].isspace():
        return _check_pnm
    raise BadHeader(_name_the_format(head))


def _name_the_format(head: bytes) -> str:
    for magic, name in _UNSUPPORTED.items():
        if head.startswith(magic):
            return f"unsupported format {name}: {CONVERT}"
    if head[4:8] == b"ftyp":
        return f"unsupported format {_FTYP_BRANDS.get(head[8:12], 'MP4 or HEIF')}: {CONVERT}"
    return "not an image"


def _check_jpeg(head: bytes, read: Read) -> tuple[bytes, bool]:
    """Walks the marker segments up to the first scan, as the parser does (ITU-T T.81, table B.1)."""
    position, rotated, adobe, components = 2, False, False, 0
    while True:
        head = _at_least(position + 20, head, read)
        marker = head[position + 1]
        if head[position] != 0xFF or marker in (0x00, 0xD9):  # garbage, or the end of the image
            raise BadHeader(refusal(read(0, -1)))
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        if marker == 0xDA:
            break
        (length,) = struct.unpack_from(">H", head, position + 2)
        body = position + 4
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # not DHT, JPG, DAC
            precision, _, _, components = struct.unpack_from(">BHHB", head, body)
            if precision != 8:
                raise _unsupported(f"JPEG of {precision} bits a sample")
            if marker not in _JPEG_FRAMES:
                raise _unsupported(f"JPEG with the frame SOF{marker - 0xC0} (lossless or hierarchical)")
        elif marker == 0xE1 and head[body : body + 6] == b"Exif\0\0":
            head = _at_least(position + 2 + length, head, read)
            rotated = _orientation(head[body + 6 : position + 2 + length]) != 1
        elif marker == 0xEE and head[body : body + 5] == b"Adobe":
            adobe = True
        position += 2 + length
    if components == 4 and not adobe:
        raise _unsupported("a CMYK JPEG without an Adobe marker, which does not say whether its colours are inverted")
    return head[: position + 2], rotated


def _at_least(count: int, head: bytes, read: Read) -> bytes:
    """The first `count` bytes or more; fewer if the image ends before."""
    while len(head) < count and len(longer := read(0, 16 * len(head))) > len(head):
        head = longer
    return head


def _check_png(head: bytes, read: Read) -> tuple[bytes, bool]:
    if head[12:16] == b"CgBI":
        raise _unsupported("Apple's variant of PNG (CgBI)")
    width, height, bits, colour, interlace = struct.unpack_from(">IIBBxxB", head, 16)
    if max(width, height) >= 2**31:  # which the decoder reads as negative
        raise BadHeader(f"damaged header: {width} x {height} pixels")
    if bits not in _PNG_BITS.get(colour, ()) or interlace > 1:
        raise BadHeader(f"damaged header: PNG of {bits} bits, colour type {colour}, interlace {interlace}")
    encoded, position, rotated, seen = read(0, -1), 8, False, set()
    while position + 8 <= len(encoded) and b"IEND" not in seen:  # anything may follow it
        length, kind = struct.unpack_from(">I4s", encoded, position)
        if kind == b"IDAT" and b"IDAT" not in seen and b"acTL" in seen and b"fcTL" not in seen:
            raise _unsupported("an animated PNG whose default image is not one of its frames")
        if kind == b"eXIf":
            rotated = _orientation(encoded[position + 8 : position + 8 + length]) != 1
        seen.add(kind)
        position += 12 + length
    return encoded, rotated


def _check_webp(head: bytes, read: Read) -> tuple[bytes, bool]:
    encoded, position, length, rotated = read(0, -1), 12, 0, False
    while position + 8 <= len(encoded):
        kind, length = struct.unpack_from("<4sI", encoded, position)
        if kind == b"EXIF":
            exif = encoded[position + 8 : position + 8 + length]
            rotated = _orientation(exif.removeprefix(b"Exif\0\0")) != 1
        position += 8 + length + length % 2
    if position - length % 2 > len(encoded):
        raise BadHeader("truncated file")
    return encoded, rotated


def _check_bmp(head: bytes, read: Read) -> tuple[bytes, bool]:
    start, header_bytes = struct.unpack_from("<II", head, 10)
    old = header_bytes == 12
    width, height, _, depth = struct.unpack_from("<HHHH" if old else "<iiHH", head, 18)
    compression = 0 if old else struct.unpack_from("<I", head, 30)[0]
    standard_masks = compression == 3 and struct.unpack_from("<III", head, 54) == (0xFF0000, 0xFF00, 0xFF)
    plain = compression == 0 and depth in (1, 4, 8, 24, 32)
    if not (plain or (compression == 1 and depth == 8) or (standard_masks and depth == 32)):
        raise _unsupported(f"BMP of {depth} bits a pixel, compression {compression}")
    if width <= 0 or height == 0:
        raise BadHeader(f"damaged header: {width} x {height} pixels")
    size = (width * depth + 31) // 32 * 4 * abs(height) if compression != 1 else 1
    if start < 14 + header_bytes or not read(start + size - 1, 1):
        raise BadHeader("truncated file" if start >= 14 + header_bytes else "damaged header")
    return read(0, -1), False


def _check_tiff(head: bytes, read: Read) -> tuple[bytes, bool]:
    encoded = read(0, -1)
    found = _tiff_tags(encoded)

    def of(tag: int, default: int) -> int:
        return (*found.get(tag, ()), default)[0]

    bits, compression = set(found.get(BITS, (1,))), of(COMPRESSION, 1)
    photometric, samples = of(PHOTOMETRIC, -1), of(SAMPLES, 1)
    if compression not in _TIFF_COMPRESSIONS:
        raise _unsupported(f"TIFF with compression {compression}")
    if of(PLANAR, 1) != 1:
        raise _unsupported("TIFF whose channels are stored one after the other (planar)")
    if set(found.get(SAMPLE_FORMAT, ())) - {1}:
        raise _unsupported("TIFF of floating-point or signed numbers")
    if of(EXTRA_SAMPLES, 0) == 1:
        raise _unsupported("TIFF with colours multiplied by alpha")
    if not any(
        photometric in kinds and samples in counts and bits <= depths
        for kinds, counts, depths in (
            ({0}, {1}, {1, 8}),  # grey, white is 0
            ({1}, {1}, {1, 8, 10, 12, 14, 16}),  # grey
            ({2}, {3, 4}, {8, 10, 12, 14, 16}),  # RGB and alpha
            ({3} if COLOUR_MAP in found else (), {1}, {4, 8}),  # palette
            ({5}, {4}, {8}),  # CMYK
            ({6} if compression == 7 or found.get(SUBSAMPLING) == (1, 1) else (), {3}, {8}),  # YCbCr
        )
    ):
        depth = "/".join(map(str, sorted(bits)))
        raise _unsupported(f"TIFF with {samples} channels of {depth} bits, photometric interpretation {photometric}")
    return encoded, _orientation(encoded) != 1


def _check_pnm(head: bytes, read: Read) -> tuple[bytes, bool]:
    kind, header = head[:2], re.sub(rb"#[^\n\r]*", b"", head).split(maxsplit=4)
    if kind not in (b"P1", b"P4", b"P5", b"P6"):
        raise _unsupported(f"PNM of kind {kind.decode()}")
    if kind in (b"P5", b"P6") and header[3] not in (b"255", b"65535"):
        raise _unsupported(f"PNM with a maximum of {header[3].decode('ascii', 'replace')} instead of 255 or 65535")
    return read(0, -1), False


# --- TIFF tags (TIFF 6.0, section 2; BigTIFF as in libtiff), which are also how EXIF is written

WIDTH, BITS, COMPRESSION, PHOTOMETRIC, ORIENTATION, SAMPLES, PLANAR = 256, 258, 259, 262, 274, 277, 284
COLOUR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT, SUBSAMPLING = 320, 338, 339, 530

_LETTERS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # BYTE, SHORT, LONG, LONG8: types of the tags above
_LONGEST = 16  # values; of longer tags (strip offsets, colour maps) only the first are read


def _tiff_tags(encoded: bytes) -> dict[int, tuple[int, ...]]:
    """{tag: values} of the integer tags of the first image. Raises struct.error where the file ends before them."""
    order = "<" if encoded[:2] == b"II" else ">"
    (version,) = struct.unpack_from(order + "H", encoded, 2)
    count_letter, word, head = ("Q", "Q", 8) if version == 43 else ("H", "I", 4)
    (start,) = struct.unpack_from(order + word, encoded, head)
    (count,) = struct.unpack_from(order + count_letter, encoded, start)
    first = start + struct.calcsize(order + count_letter)
    entry, room = struct.calcsize(order + "HH" + word + word), struct.calcsize(order + word)
    found = {}
    for position in range(first, first + entry * min(count, 4096), entry):
        number, kind, values = struct.unpack_from(order + "HH" + word, encoded, position)
        if letter := _LETTERS.get(kind):
            place = position + entry - room
            if values * struct.calcsize(letter) > room:
                (place,) = struct.unpack_from(order + word, encoded, place)
            found[number] = struct.unpack_from(f"{order}{min(values, _LONGEST)}{letter}", encoded, place)
    return found


def _orientation(encoded: bytes) -> int:
    """The EXIF orientation, 1 (upright) if it is missing or invalid."""
    try:
        (value, *_) = _tiff_tags(encoded).get(ORIENTATION, (1,))
    except (struct.error, ValueError):
        return 1
    return value if 1 <= value <= 8 else 1
