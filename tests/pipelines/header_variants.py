"""Image files over the whole range of what their headers may say, most of it rare and much of it nonsense.

`variants()` gives name: Variant(contents, pixels). All that are well formed show `PICTURE`, as far as their bits allow,
and say so in `pixels`; None stands for what nobody can be sure of: as Pillow shows it, or not at all.
"""

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

H, W = 40, 48


class Variant(NamedTuple):
    contents: bytes
    pixels: np.ndarray | None  # (H, W, 3) uint8


def _picture() -> np.ndarray:
    small = np.random.default_rng(7).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((W, H), Image.Resampling.BICUBIC))


PICTURE = _picture()
GREY = np.asarray(Image.fromarray(PICTURE).convert("L"))


@cache
def variants() -> dict[str, Variant]:
    from tiff_variants import tiffs

    makers = (_jpeg, _png, _bmp, tiffs, _webp, _pnm, _unsupported)
    return {name: variant for maker in makers for name, variant in maker()}


def saved(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def scaled(pixels: np.ndarray, top: int) -> np.ndarray:
    """From 0..255 to the integers 0..top."""
    return np.rint(pixels.astype(float) * top / 255).astype(np.uint64)


def back(values: np.ndarray, top: int) -> np.ndarray:
    return np.rint(values.astype(float) * 255 / top).astype(np.uint8)


# --- JPEG


def _jpeg() -> Iterator[tuple[str, Variant]]:
    picture, grey = Image.fromarray(PICTURE), Image.fromarray(GREY)
    plain = {
        "444": saved(picture, "JPEG", quality=98, subsampling=0),
        "grey": saved(grey, "JPEG", quality=98),
        "progressive": saved(picture, "JPEG", quality=98, subsampling=0, progressive=True),
        "rgb": saved(picture, "JPEG", quality=98, subsampling=0, keep_rgb=True),
    }
    pixels = {"grey": rgb(GREY)}
    for name, contents in plain.items():
        yield f"jpeg {name}", Variant(contents, pixels.get(name, PICTURE))
    for name, subsampling in (("422", 1), ("420", 2)):
        contents = saved(picture, "JPEG", quality=98, subsampling=subsampling)
        yield f"jpeg {name}", Variant(contents, np.asarray(Image.open(io.BytesIO(contents))))
    for base in ("444", "grey", "progressive"):
        contents = plain[base]
        frame = contents.index(b"\xff\xc2" if base == "progressive" else b"\xff\xc0")
        for precision in (0, 1, 2, 7, 9, 10, 12, 16, 32, 64, 128, 136, 255):
            yield f"jpeg {base} precision {precision}", Variant(patched(contents, frame + 4, precision), None)
        for components in (0, 1, 2, 3, 4, 5, 255):
            if components != contents[frame + 9]:
                yield f"jpeg {base} components {components}", Variant(patched(contents, frame + 9, components), None)
        for sampling in (0x00, 0x01, 0x10, 0x13, 0x31, 0x33, 0x41, 0x14, 0x44, 0x51, 0xFF):
            yield f"jpeg {base} sampling {sampling:02x}", Variant(patched(contents, frame + 11, sampling), None)
        # Under the frame header of the others, libjpeg takes the scans of a progressive image for something.
        silent = {0xC0, 0xC1, 0xC9} if base == "progressive" else set()
        for marker in range(0xC0, 0xD0):
            if marker not in (contents[frame + 1], 0xC4, 0xC8, 0xCC) and marker not in silent:
                yield f"jpeg {base} SOF{marker - 0xC0}", Variant(patched(contents, frame + 1, marker), None)
        for height, width in ((0, W), (H, 0), (H + 100, W), (65535, 65535)):
            resized = patched(contents, frame + 5, *struct.pack(">HH", height, width))
            yield f"jpeg {base} size {height} x {width}", Variant(resized, None)
        yield f"jpeg {base} tables 3", Variant(patched(contents, frame + 12, 3), None)
        yield f"jpeg {base} tables 200", Variant(patched(contents, frame + 12, 200), None)
        yield f"jpeg {base} frame length 4", Variant(patched(contents, frame + 2, 0, 4), None)
        yield f"jpeg {base} ends in the frame", Variant(contents[: frame + 6], None)
    key = Image.fromarray(np.concatenate([255 - PICTURE, np.zeros((H, W, 1), np.uint8)], -1), "CMYK")
    cmyk = saved(key, "JPEG", quality=98)
    yield "jpeg cmyk", Variant(cmyk, np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    adobe = cmyk.index(b"\xff\xee")
    bare = cmyk[:adobe] + cmyk[adobe + 16 :]
    yield "jpeg cmyk bare", Variant(bare, PICTURE)
    for transform in (1, 2, 3, 255):
        contents = patched(cmyk, adobe + 15, transform)
        yield f"jpeg cmyk transform {transform}", Variant(contents, by_pillow(contents))
    at = plain["rgb"].index(b"\xff\xee")
    for transform in (1, 2, 255):
        contents = patched(plain["rgb"], at + 15, transform)
        yield f"jpeg rgb transform {transform}", Variant(contents, by_pillow(contents))
    unmarked = plain["rgb"][:at] + plain["rgb"][at + 16 :]
    yield "jpeg rgb by ids", Variant(unmarked, PICTURE)


def patched(contents: bytes, offset: int, *values: int) -> bytes:
    return contents[:offset] + bytes(values) + contents[offset + len(values) :]


def by_pillow(contents: bytes) -> np.ndarray | None:
    try:
        with Image.open(io.BytesIO(contents)) as image:
            return np.asarray(image.convert("RGB"))
    except Exception:  # whatever nonsense makes Pillow raise
        return None


# --- PNG


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows_HWC: np.ndarray, bits: int, colour: int, interlace: int = 0, before: bytes = b"", **other) -> bytes:
    """rows_HWC: integers of `bits` bits; other: chunks by the name `first` (before IHDR)."""
    passes = [rows_HWC]
    if interlace == 1:  # Adam7
        steps = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
        passes = [rows_HWC[top::down, left::right] for top, left, down, right in steps]
    raw = b"".join(b"\0" + row for part in passes for row in packed_rows(part, bits))
    header = struct.pack(">IIBBBBB", W, H, bits, colour, other.get("compression", 0), other.get("filter", 0), interlace)
    parts = (other.get("first", b""), _chunk(b"IHDR", header), before, _chunk(b"IDAT", zlib.compress(raw)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + other.get("after", b"") + _chunk(b"IEND", b"")


def packed_rows(values_HWC: np.ndarray, bits: int, order: str = ">") -> list[bytes]:
    """Each row as bytes, samples of `bits` bits side by side, padded to a byte."""
    rows = values_HWC.reshape(len(values_HWC), -1)
    if bits in (8, 16, 32, 64):
        return [row.tobytes() for row in rows.astype(f"{order}u{bits // 8}")]
    spread = rows[..., None] >> np.arange(bits - 1, -1, -1, dtype=np.uint64) & np.uint64(1)
    return [row.tobytes() for row in np.packbits(spread.reshape(len(rows), -1).astype(np.uint8), axis=1)]


def _png() -> Iterator[tuple[str, Variant]]:
    channels = {0: GREY[..., None], 2: PICTURE, 3: None}
    alpha = np.full((H, W, 1), 100, np.uint8)
    channels |= {4: np.concatenate([channels[0], alpha], -1), 6: np.concatenate([PICTURE, alpha], -1)}
    legal = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    for colour, bits, interlace in itertools.product(range(8), (0, 1, 2, 3, 4, 8, 16, 32), (0, 1, 2)):
        name = f"png colour {colour} bits {bits} interlace {interlace}"
        if bits not in legal.get(colour, ()) or interlace == 2:
            yield name, Variant(png(channels[2].astype(np.uint64), bits or 8, colour, interlace), None)
            continue
        top = 2**bits - 1
        if colour == 3:
            values, palette = scaled(GREY[..., None], top), np.arange(top + 1) * 255 // top
            contents = png(
                values, bits, 3, interlace, _chunk(b"PLTE", np.repeat(palette, 3).astype(np.uint8).tobytes())
            )
            yield name, Variant(contents, rgb(palette[values[..., 0]].astype(np.uint8)))
            continue
        values = scaled(channels[colour], top)
        colours = values[..., :3] if colour in (2, 6) else values[..., :1].repeat(3, -1)
        yield name, Variant(png(values, bits, colour, interlace), back(colours, top))
        if colour in (0, 2):
            key = _chunk(b"tRNS", values[0, 0].astype(">u2").tobytes())
            yield name + " key", Variant(png(values, bits, colour, interlace, key), back(colours, top))
    rows = PICTURE.astype(np.uint64)
    control = _chunk(b"acTL", struct.pack(">II", 2, 0))
    frame = _chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, W, H, 0, 0, 1, 10, 0, 0))
    second = struct.pack(">IIIIIHHBB", 1, W, H, 0, 0, 1, 10, 0, 0)
    other = zlib.compress(b"".join(b"\0" + row.tobytes() for row in (255 - PICTURE)))
    after = _chunk(b"fcTL", second) + _chunk(b"fdAT", struct.pack(">I", 2) + other)
    yield "png animation", Variant(png(rows, 8, 2, 0, control + frame, after=after), PICTURE)
    yield "png animation hidden", Variant(png(rows, 8, 2, 0, control, after=after), PICTURE)
    yield (
        "png animation of one",
        Variant(png(rows, 8, 2, 0, _chunk(b"acTL", struct.pack(">II", 1, 0)) + frame), PICTURE),
    )
    yield "png cgbi", Variant(png(rows, 8, 2, 0, first=_chunk(b"CgBI", b"P\0 \x02")), None)
    yield "png gamma", Variant(png(rows, 8, 2, 0, _chunk(b"gAMA", struct.pack(">I", 100000))), PICTURE)
    yield "png srgb", Variant(png(rows, 8, 2, 0, _chunk(b"sRGB", b"\0")), PICTURE)
    yield "png background", Variant(png(rows, 8, 2, 0, _chunk(b"bKGD", bytes(6))), PICTURE)
    yield "png bits used", Variant(png(rows, 8, 2, 0, _chunk(b"sBIT", b"\5\6\5")), PICTURE)
    with_alpha = png(channels[6].astype(np.uint64), 8, 6, 0, _chunk(b"bKGD", bytes(6)))
    yield "png background alpha", Variant(with_alpha, PICTURE)
    yield "png palette missing", Variant(png(scaled(GREY[..., None], 255), 8, 3), None)
    three = _chunk(b"PLTE", bytes(9))
    yield "png palette short", Variant(png(scaled(GREY[..., None], 255), 8, 3, 0, three), None)
    ramp = _chunk(b"PLTE", np.arange(256).repeat(3).astype(np.uint8).tobytes())
    see_through = ramp + _chunk(b"tRNS", bytes(range(256)))
    yield "png palette alpha", Variant(png(scaled(GREY[..., None], 255), 8, 3, 0, see_through), rgb(GREY))
    yield "png compression 1", Variant(png(rows, 8, 2, compression=1), None)
    yield "png filter 1", Variant(png(rows, 8, 2, filter=64), None)
    good = png(rows, 8, 2)
    for height, width in ((0, W), (H, 0), (2**31, W), (H, 2**31 - 1), (2**16, 2**16)):
        resized = good[:16] + struct.pack(">II", width, height) + good[24:]
        yield f"png size {height} x {width} bad crc", Variant(resized, None)
        whole = resized[:29] + struct.pack(">I", zlib.crc32(resized[12:29])) + resized[33:]
        yield f"png size {height} x {width}", Variant(whole, None)
    yield "png bad crc", Variant(patched(good, 29, 0, 0, 0, 0), None)
    yield "png no end", Variant(good[:-12], None)


# --- BMP


def _bmp() -> Iterator[tuple[str, Variant]]:
    depths, compressions = (0, 1, 2, 4, 8, 12, 15, 16, 24, 32, 48, 64), (0, 1, 2, 3, 4, 5, 6, 11, 12, 13, 255)
    for header, depth, compression in itertools.product((12, 16, 40, 56, 124), depths, compressions):
        if header > 12 or compression == 0:
            contents = bmp(header, depth, compression)
            yield f"bmp header {header} depth {depth} compression {compression}", Variant(contents, by_pillow(contents))
    for depth in (1, 4, 8, 24, 32):
        contents = bmp(40, depth, 0, -H)
        yield f"bmp top-down depth {depth}", Variant(contents, by_pillow(contents))
    for masks in ((0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F), (0xF00, 0xF0, 0xF), (0, 0, 0)):
        for header in (40, 56, 108):
            contents = bmp(header, 16, 3, masks=masks)
            yield f"bmp 16 bit masks {masks[0]:x} header {header}", Variant(contents, by_pillow(contents))
    for masks in (
        (0xFF0000, 0xFF00, 0xFF),
        (0xFF, 0xFF00, 0xFF0000),
        (0xFF000000, 0xFF0000, 0xFF00),
        (0x3FF, 0xFFC00, 0),
    ):
        for header, alpha in itertools.product((40, 56, 108), (0, 0xFF000000)):
            contents = bmp(header, 32, 3, masks=(*masks, alpha))
            name = f"bmp 32 bit masks {masks[0]:x} alpha {alpha:x} header {header}"
            yield name, Variant(contents, by_pillow(contents))
    for size in ((0, W), (H, 0), (H, -W), (-(2**31), W), (2**30, 2**30), (10 * H, W)):
        yield f"bmp size {size}", Variant(bmp(40, 24, 0, *size), None)
    for planes in (0, 2, 3):
        yield f"bmp planes {planes}", Variant(patched(bmp(40, 24, 0), 26, planes), None)
    for offset in (0, 14, 10**6):
        yield f"bmp pixels at {offset}", Variant(patched(bmp(40, 24, 0), 10, *struct.pack("<I", offset)), None)
    for used in (256, 257, 2**31):
        contents = patched(bmp(40, 8, 0), 46, *struct.pack("<I", used))
        yield f"bmp {used} colours", Variant(contents, by_pillow(contents))
    yield "bmp 16 colours", Variant(bmp(40, 8, 0, colours=16), rgb(back(scaled(GREY, 15), 15)))


def bmp(
    header: int,
    depth: int,
    compression: int,
    height: int = H,
    width: int = W,
    masks=(0xFF0000, 0xFF00, 0xFF, 0),
    colours=0,
):
    if header == 12:
        about = struct.pack("<IHHHH", 12, width & 0xFFFF, height & 0xFFFF, 1, depth)
    else:
        about = struct.pack("<IiiHHIIiiII", header, width, height, 1, depth, compression, 0, 2835, 2835, colours, 0)
        about += struct.pack("<4I", *(*masks, 0)[:4]) + bytes(100)
        about = about[: header if header > 40 or compression not in (3, 6) else 52]
    palette = b""
    if depth <= 8:
        levels = colours or 2**depth
        ramp = np.arange(levels, dtype=float) * 255 // max(1, levels - 1)
        palette = np.stack([ramp, ramp, ramp, ramp * 0], 1).astype(np.uint8)[:, : 3 if header == 12 else 4].tobytes()
    if depth in (24, 32):
        values = np.concatenate([PICTURE[..., ::-1], np.full((H, W, 1), 200, np.uint8)], -1)[..., : depth // 8]
        rows = [row.tobytes() for row in values]
    elif depth == 16:
        r, g, b = (PICTURE >> 3).astype(np.uint64).transpose(2, 0, 1)
        rows = packed_rows((r << np.uint64(10) | g << np.uint64(5) | b), 16, "<")
    else:
        rows = packed_rows(
            scaled(GREY, (colours or 2 ** min(depth, 8)) - 1 if depth else 1), depth if depth in (1, 2, 4, 8) else 8
        )
    rows = [row + bytes(-len(row) % 4) for row in rows]
    body = b"".join(rows if height < 0 else rows[::-1])
    if compression == 1 and depth == 8:
        body = b"".join(b"".join(b"\1" + row[i : i + 1] for i in range(W)) + b"\0\0" for row in rows[::-1]) + b"\0\1"
    body += bytes(max(0, 64 * W * H // 8 - len(body)) if depth > 32 else 0)
    start = 14 + len(about) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + about + palette + body


# --- the others


def _webp() -> Iterator[tuple[str, Variant]]:
    picture = Image.fromarray(PICTURE)
    see_through = Image.fromarray(np.concatenate([PICTURE, np.full((H, W, 1), 100, np.uint8)], -1))
    lossy = saved(picture, "WEBP", quality=100)
    yield "webp lossy", Variant(lossy, by_pillow(lossy))
    lossless = saved(picture, "WEBP", lossless=True)
    yield "webp lossless", Variant(lossless, PICTURE)
    yield "webp alpha lossless", Variant(saved(see_through, "WEBP", lossless=True, exact=True), PICTURE)
    contents = saved(see_through, "WEBP", quality=100)
    yield "webp alpha lossy", Variant(contents, by_pillow(contents))
    animation = io.BytesIO()
    picture.save(animation, "WEBP", save_all=True, append_images=[Image.fromarray(255 - PICTURE)], lossless=True)
    yield "webp animation", Variant(animation.getvalue(), PICTURE)
    exif = Image.Exif()
    exif[0x0112] = 6
    extended = saved(picture, "WEBP", lossless=True, exif=exif)
    yield "webp exif", Variant(extended, PICTURE)
    for width in (1, W + 1, 2**24):
        contents = patched(extended, 24, *struct.pack("<I", width - 1)[:3])
        yield f"webp canvas {width}", Variant(contents, None)
    for value in (0, 1, 2, 4, 8, 16, 32, 64, 128, 255):
        yield f"webp flags {value}", Variant(patched(extended, 20, value), PICTURE if value in (1, 64, 128) else None)
    for version in range(1, 8):
        yield f"webp lossless version {version}", Variant(patched(lossless, 24, lossless[24] | version << 5), None)
    for width in (0, 1, W + 5, 0x3FFF):
        yield f"webp lossy width {width}", Variant(patched(lossy, 26, *struct.pack("<H", width)), None)
    for value in (0x01, 0x04, 0x0E, 0x80, 0xFF):
        yield f"webp lossy frame tag {value:x}", Variant(patched(lossy, 20, value), None)
    yield "webp unknown chunk", Variant(patched(lossy, 12, *b"VP9 "), None)
    yield "webp short riff", Variant(patched(lossy, 4, 10, 0, 0, 0), None)


def _pnm() -> Iterator[tuple[str, Variant]]:
    for top in (0, 1, 2, 7, 15, 31, 100, 127, 254, 255, 256, 1023, 4095, 32767, 65535, 65536, 10**6):
        bits = 8 if top < 256 else 16
        for kind, values in ((b"P5", GREY), (b"P6", PICTURE), (b"P2", GREY), (b"P3", PICTURE)):
            numbers = scaled(values, min(top, 65535))
            if kind in (b"P5", b"P6"):
                body = b"".join(packed_rows(numbers, bits))
            else:
                body = " ".join(map(str, numbers.ravel().tolist())).encode()
            right = None
            if 0 < top < 65536:
                right = back(numbers, top)
                right = rgb(right) if right.ndim == 2 else right
            yield f"pnm {kind.decode()} up to {top}", Variant(b"%s\n%d %d\n%d\n" % (kind, W, H, top) + body, right)
    ink = (GREY < 128).astype(np.uint64)
    right = rgb(np.where(ink, 0, 255).astype(np.uint8))
    yield "pnm P4", Variant(b"P4\n%d %d\n" % (W, H) + b"".join(packed_rows(ink, 1)), right)
    yield "pnm P1", Variant(b"P1\n%d %d\n" % (W, H) + " ".join(map(str, ink.ravel().tolist())).encode(), right)
    colours = PICTURE.tobytes()
    head = b"P7\nWIDTH %d\nHEIGHT %d\nDEPTH %d\nMAXVAL 255\nTUPLTYPE %s\nENDHDR\n"
    yield "pnm P7", Variant(head % (W, H, 3, b"RGB") + colours, PICTURE)
    yield "pnm PF", Variant(b"PF\n%d %d\n-1.0\n" % (W, H) + (PICTURE[::-1] / 255).astype("<f4").tobytes(), PICTURE)
    yield "pnm comments", Variant(b"P6 # a\n# 3 3\n%d # b\n%d\n255\n" % (W, H) + colours, PICTURE)
    yield "pnm one line", Variant(b"P6 %d %d 255 " % (W, H) + colours, PICTURE)
    yield "pnm carriage returns", Variant(b"P6\r\n%d %d\r\n255\n" % (W, H) + colours, PICTURE)
    for size in ((0, W), (H, 0), (2**31, W), (2**40, 2**40), (-H, W)):
        yield f"pnm size {size}", Variant(b"P6\n%d %d\n255\n" % size[::-1] + colours, None)
    yield "pnm short", Variant(b"P6\n%d %d\n255\n" % (W, H) + colours[:-100], None)


def _unsupported() -> Iterator[tuple[str, Variant]]:
    contents = saved(Image.fromarray(PICTURE), "GIF")
    yield "gif", Variant(contents, PICTURE)
    yield "gif 87", Variant(b"GIF87a" + contents[6:], PICTURE)
    for bare in (False, True):
        contents = saved(Image.fromarray(PICTURE), "JPEG2000", no_jp2=bare)
        size = contents.index(b"\xff\x51")
        yield f"jpeg2000{' bare' * bare}", Variant(contents, PICTURE)
        # The parser divides by these; the decoder reads beyond its memory with the third.
        yield f"jpeg2000 tiles of width 0{' bare' * bare}", Variant(patched(contents, size + 22, 0, 0, 0, 0), None)
        yield f"jpeg2000 no channels{' bare' * bare}", Variant(patched(contents, size + 38, 0, 0), None)
        yield f"jpeg2000 levels{' bare' * bare}", Variant(patched(contents, size + 52, 255, 0), None)
