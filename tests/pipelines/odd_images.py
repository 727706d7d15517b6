"""Every kind of image file that does not go down smoothly, for the tests."""

import io
import struct
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from fastdeit.pipelines.index.inspection import CONVERT

HEIGHT, WIDTH = 60, 80


def picture(height: int = HEIGHT, width: int = WIDTH, seed: int = 0) -> Image.Image:
    """A smooth RGB picture, different for each seed."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


@cache
def bad_by_header() -> dict[str, tuple[bytes, str]]:
    """File name: (contents, cause) of what indexing finds."""
    jpeg, png, webp = (encoded(picture(), format) for format in ("JPEG", "PNG", "WEBP"))
    flat_bmp = bytearray(encoded(picture(), "BMP"))
    flat_bmp[18:22] = struct.pack("<i", 0)
    return {
        "empty.jpg": (b"", "empty file"),
        "text.jpg": (b"<html>404 Not Found</html>", "not an image"),
        "zeros.jpg": (bytes(5000), "not an image"),
        "animation.gif": (encoded(picture(), "GIF"), f"unsupported format GIF: {CONVERT}"),
        "gif_named.jpg": (encoded(picture(), "GIF"), f"unsupported format GIF: {CONVERT}"),
        "plain.jp2": (encoded(picture(), "JPEG2000"), f"unsupported format JPEG 2000: {CONVERT}"),
        "new.avif": (b"\0\0\0\x20ftypavif" + bytes(100), f"unsupported format AVIF: {CONVERT}"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(100), f"unsupported format HEIC: {CONVERT}"),
        "newer.jxl": (b"\xff\x0a" + bytes(100), f"unsupported format JPEG XL: {CONVERT}"),
        "cut_in_header.jpg": (jpeg[:30], "truncated header"),
        "cut_in_header.png": (png[:20], "truncated header"),
        "no_pixels.bmp": (bytes(flat_bmp), f"damaged header: 0 x {HEIGHT} pixels"),
        "only_magic.tif": (b"II*\0" + bytes(3), "truncated header"),
        "truncated.png": (png[: len(png) // 2], "damaged: image file is truncated"),
        "truncated.webp": (webp[: len(webp) // 2], "truncated file"),
        "bits12.jpg": (bits12(jpeg), f"unsupported kind of image, JPEG of 12 bits a sample: {CONVERT}"),
        "integers.tif": (
            encoded(picture().convert("I"), "TIFF"),
            f"unsupported kind of image, TIFF of floating-point or signed numbers: {CONVERT}",
        ),
    }


def bits12(jpeg: bytes) -> bytes:
    """A baseline JPEG that says that its samples have 12 bits."""
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :]


@cache
def bad_by_body() -> dict[str, bytes]:
    """What only decoding finds."""
    jpeg, tiff = encoded(picture(600, 800), quality=95), encoded(picture(600, 800), "TIFF")
    return {"truncated.jpg": jpeg[: len(jpeg) // 2], "truncated.tif": tiff[: len(tiff) // 2]}


@cache
def odd_but_good() -> dict[str, bytes]:
    """Decodes, to HEIGHT x WIDTH as stored."""
    image = picture()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by 90 degrees
    long_exif = Image.Exif()
    long_exif[0x010E] = "x" * 20_000  # the frame header comes behind the first page
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    alpha = image.copy()
    alpha.putalpha(128)
    return {
        "plain.jpg": encoded(image),
        "UPPER.JPEG": encoded(image),
        "png_named.jpg": encoded(image, "PNG"),
        "grey.jpg": encoded(image.convert("L")),
        "cmyk.jpg": encoded(image.convert("CMYK")),
        "progressive.jpg": encoded(image, progressive=True),
        "exif_rotated.jpg": encoded(image, exif=rotated),
        "long_exif.jpg": encoded(image, exif=long_exif),
        "fill_bytes.jpg": (jpeg := encoded(image))[:2] + b"\xff\xff\xff" + jpeg[2:],
        "palette.png": encoded(image.convert("P"), "PNG"),
        "rgba.png": encoded(alpha, "PNG"),
        "grey_alpha.png": encoded(alpha.convert("LA"), "PNG"),
        "deep.png": encoded(deep, "PNG"),
        "bilevel.png": encoded(image.convert("1"), "PNG"),
        "lossy.webp": encoded(image, "WEBP"),
        "lossless.webp": encoded(image, "WEBP", lossless=True),
        "extended.webp": encoded(alpha, "WEBP", exif=rotated),
        "plain.bmp": encoded(image, "BMP"),
        "plain.tif": encoded(image, "TIFF"),
        "lzw.tiff": encoded(image, "TIFF", compression="tiff_lzw"),
        "plain.ppm": encoded(image, "PPM"),
    }


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
