"""The TIFF files of header_variants.py: what a TIFF may say is a world of its own."""

import io
import itertools
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from header_variants import GREY, PICTURE, H, Variant, W, back, by_pillow, packed_rows, patched, rgb, saved, scaled
from PIL import Image


def tiff(planes: list[bytes], tags: dict[int, tuple[str, tuple]], *, order: str = "<", big: bool = False) -> bytes:
    """One image of one page; tags: number: (struct letter, values)."""
    letters = {"B": 1, "H": 3, "I": 4, "Q": 16}
    head = (b"II" if order == "<" else b"MM") + struct.pack(
        order + ("HHHQ" if big else "HI"), *((43, 8, 0, 16) if big else (42, 8))
    )
    wide, entry_bytes = ("Q", 20) if big else ("I", 12)
    tags = tags | {273: ("I", (0,) * len(planes)), 279: ("I", tuple(map(len, planes)))}
    count_letter = "Q" if big else "H"
    end = len(head) + struct.calcsize("<" + count_letter) + entry_bytes * len(tags) + struct.calcsize("<" + wide)
    room = struct.calcsize("<" + wide)
    extra, offsets = b"", []
    for plane in planes:
        offsets.append(end + len(extra))
        extra += plane + bytes(len(plane) % 2)
    tags[273] = ("I", tuple(offsets))
    entries = b""
    for number, (letter, values) in sorted(tags.items()):
        data = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(data) > room:
            place = struct.pack(order + wide, end + len(extra))
            extra += data + bytes(len(data) % 2)
        else:
            place = data.ljust(room, b"\0")
        entries += struct.pack(order + "HH" + wide, number, letters[letter], len(values)) + place
    return head + struct.pack(order + count_letter, len(tags)) + entries + struct.pack(order + wide, 0) + extra


def tiff_of(
    values_HWC: np.ndarray, bits: int, photometric: int, *, planar=1, compression=1, order="<", big=False, **tags
):
    samples = values_HWC.shape[-1]
    parts = [values_HWC] if planar == 1 else [values_HWC[..., c : c + 1] for c in range(samples)]
    if values_HWC.dtype.kind in "fi":
        planes = [part.astype(part.dtype.newbyteorder(order)).tobytes() for part in parts]
    else:
        planes = [b"".join(packed_rows(part, bits, order)) for part in parts]
    if compression in (8, 32946):
        planes = [zlib.compress(plane) for plane in planes]
    entries = {
        256: ("I", (values_HWC.shape[1],)),
        257: ("I", (values_HWC.shape[0],)),
        258: ("H", (bits,) * samples),
        259: ("H", (compression,)),
        262: ("H", (photometric,)),
        277: ("H", (samples,)),
        278: ("I", (values_HWC.shape[0],)),
        284: ("H", (planar,)),
    }
    entries |= {int(number[1:]): value for number, value in tags.items()}
    return tiff(planes, entries, order=order, big=big)


def tiffs() -> Iterator[tuple[str, Variant]]:
    alpha = np.full((H, W, 1), 100, np.uint8)
    samples_of = {
        1: GREY[..., None],
        2: np.concatenate([GREY[..., None], alpha], -1),
        3: PICTURE,
        4: np.concatenate([PICTURE, alpha], -1),
        5: np.concatenate([PICTURE, alpha, alpha], -1),
    }
    bits_tried = (1, 2, 4, 6, 8, 10, 12, 14, 16, 24, 32, 64)
    for bits, samples, photometric, planar in itertools.product(bits_tried, range(1, 6), (0, 1, 2), (1, 2)):
        if planar == 2 and (samples == 1 or bits not in (8, 16)):
            continue
        top = 2**bits - 1
        values = (
            scaled(samples_of[samples], top)
            if bits < 53
            else samples_of[samples].astype(np.uint64) * np.uint64(top // 255)
        )
        name = f"tiff bits {bits} samples {samples} photometric {photometric} planar {planar}"
        extra = {"t338": ("H", (2,) + (0,) * (n - 1))} if (n := samples - (3 if photometric == 2 else 1)) > 0 else {}
        right = None
        if photometric == 2 and samples >= 3:
            right = back(values[..., :3], top)
        elif photometric < 2:
            right = rgb(back(values[..., 0], top))
            right = 255 - right if photometric == 0 else right
        contents = tiff_of(values, bits, photometric, planar=planar, **extra)
        yield name, Variant(contents, right)
        if extra and bits == 8:
            yield name + " extra unsaid", Variant(tiff_of(values, bits, photometric, planar=planar), right)
    eight = {n: values.astype(np.uint64) for n, values in samples_of.items()}
    for orientation, samples in itertools.product(range(10), (1, 3)):
        contents = tiff_of(eight[samples], 8, samples // 2 + 1, t274=("H", (orientation,)))
        right = rgb(GREY) if samples == 1 else PICTURE
        yield f"tiff orientation {orientation} samples {samples}", Variant(contents, right)
    for compression in (0, 2, 3, 4, 6, 7, 8, 9, 32946, 34712, 34887, 34925, 50001):
        right = PICTURE if compression in (8, 32946) else None
        yield f"tiff compression {compression}", Variant(tiff_of(eight[3], 8, 2, compression=compression), right)
    for name in ("tiff_lzw", "packbits", "tiff_adobe_deflate", "jpeg", "zstd", "lzma"):
        for mode, image in (("RGB", Image.fromarray(PICTURE)), ("L", Image.fromarray(GREY))):
            contents = saved(image, "TIFF", compression=name)
            yield f"tiff by pillow {name} {mode}", Variant(contents, by_pillow(contents))
    for name in ("group3", "group4", "tiff_ccitt"):
        contents = saved(Image.fromarray(GREY).convert("1"), "TIFF", compression=name)
        yield f"tiff by pillow {name}", Variant(contents, by_pillow(contents))
    for mode in ("CMYK", "YCbCr", "LAB", "P", "1", "RGBA", "I", "F", "I;16"):
        image = Image.fromarray(PICTURE)
        if mode == "LAB":
            image = Image.frombytes("LAB", (W, H), PICTURE.tobytes())
        elif mode == "I;16":
            image = Image.fromarray(GREY.astype(np.uint16) * 257)
        else:
            image = image.convert(mode)
        contents = saved(image, "TIFF")
        deep = rgb(GREY) if mode in ("I", "F", "I;16") else None
        yield f"tiff by pillow mode {mode}", Variant(contents, by_pillow(contents) if deep is None else deep)
    for photometric, samples in itertools.product((3, 4, 5, 6, 8, 9, 10, 32803, 32844, 32845, 34892, 65535), (1, 3, 4)):
        contents = tiff_of(eight[samples], 8, photometric)
        yield f"tiff photometric {photometric} samples {samples}", Variant(contents, None)
    ramp = tuple(np.tile(np.arange(256) * 257, 3).tolist())
    yield "tiff palette", Variant(tiff_of(eight[1], 8, 3, t320=("H", ramp)), rgb(GREY))
    yield "tiff palette of 8 bit", Variant(tiff_of(eight[1], 8, 3, t320=("H", tuple(v // 257 for v in ramp))), None)
    four = tuple(np.tile(np.arange(16) * 4369, 3).tolist())
    right = rgb(back(scaled(GREY, 15), 15))
    yield "tiff palette 4 bit", Variant(tiff_of(scaled(GREY[..., None], 15), 4, 3, t320=("H", four)), right)
    for kind, top, samples in itertools.product(("f2", "f4", "f8"), (1, 255), (1, 3)):
        values = (samples_of[samples] / 255 * top).astype(kind)
        photometric, bits = samples // 2 + 1, 8 * int(kind[1])
        contents = tiff_of(values, bits, photometric, t339=("H", (3,) * samples))
        right = rgb(GREY) if samples == 1 else PICTURE
        yield f"tiff float {kind} up to {top} samples {samples}", Variant(contents, right)
    for kind, samples in itertools.product(("i1", "i2", "i4"), (1, 3)):
        values = (samples_of[samples] // 2).astype(kind)
        contents = tiff_of(values, 8 * int(kind[1]), samples // 2 + 1, t339=("H", (2,) * samples))
        yield f"tiff signed {kind} samples {samples}", Variant(contents, None)
    for order, big, bits, samples in itertools.product("<>", (False, True), (8, 16), (1, 3)):
        values = scaled(samples_of[samples], 2**bits - 1)
        contents = tiff_of(values, bits, samples // 2 + 1, order=order, big=big)
        right = rgb(GREY) if samples == 1 else PICTURE
        yield f"tiff order {order} big {big} bits {bits} samples {samples}", Variant(contents, right)
    for bits in (8, 16):
        values = scaled(PICTURE, 2**bits - 1).astype(np.int64)
        stepped = np.concatenate([values[:, :1], np.diff(values, axis=1) % 2**bits], 1).astype(np.uint64)
        for compression in (1, 8):
            contents = tiff_of(stepped, bits, 2, compression=compression, t317=("H", (2,)))
            yield (
                f"tiff predictor 2 bits {bits} compression {compression}",
                Variant(contents, PICTURE if compression == 8 else None),
            )
    mirrored = np.packbits(np.unpackbits(PICTURE[..., None], axis=-1)[..., ::-1], axis=-1)[..., 0]
    yield "tiff fill order 2", Variant(tiff_of(mirrored.astype(np.uint64), 8, 2, t266=("H", (2,))), PICTURE)
    cmyk = np.concatenate([255 - PICTURE, np.full((H, W, 1), 0, np.uint8)], -1)
    yield "tiff cmyk", Variant(tiff_of(cmyk.astype(np.uint64), 8, 5, t332=("H", (1,))), PICTURE)
    yield "tiff cmyk 16 bit", Variant(tiff_of(scaled(cmyk, 65535), 16, 5), PICTURE)
    yield (
        "tiff premultiplied",
        Variant(tiff_of(eight[4], 8, 2, t338=("H", (1,))), by_pillow(tiff_of(eight[4], 8, 2, t338=("H", (1,))))),
    )
    yield "tiff bits differ", Variant(tiff_of(eight[3], 8, 2, t258=("H", (5, 6, 5))), None)
    yield "tiff one bits for all", Variant(tiff_of(eight[3], 8, 2, t258=("H", (8,))), None)
    yield "tiff min is white said", Variant(tiff_of(eight[1], 8, 1, t280=("H", (100,)), t281=("H", (200,))), rgb(GREY))
    yield "tiff smaller image first", Variant(tiff_of(eight[3], 8, 2, t254=("I", (1,))), PICTURE)
    tile = np.zeros((48, 48, 3), np.uint8)
    tile[:H, :W] = PICTURE
    tiled = tiff_of(eight[3], 8, 2, t322=("I", (48,)), t323=("I", (48,)), t324=("I", (0,)), t325=("I", (tile.size,)))
    yield "tiff tiles at nowhere", Variant(tiled, None)
    two = io.BytesIO()
    Image.fromarray(PICTURE).save(two, "TIFF", save_all=True, append_images=[Image.fromarray(255 - PICTURE)])
    yield "tiff two pages", Variant(two.getvalue(), PICTURE)
    for size in ((0, W), (H, 0), (2**31, W), (H, 2**31 - 1), (2 * H, W)):
        contents = tiff_of(eight[3], 8, 2, t257=("I", size[:1]), t256=("I", size[1:]))
        yield f"tiff size {size}", Variant(contents, None)
    good = tiff_of(eight[3], 8, 2)
    yield "tiff ifd beyond the end", Variant(patched(good, 4, *struct.pack("<I", 10**6)), None)
