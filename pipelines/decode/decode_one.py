"""One image at a time, with the decoder that DALI has within: the pixels that training sees."""

from functools import cache

import numpy as np

from fastdeit.pipelines.index.inspection import refusal


def decode_one(encoded: bytes) -> np.ndarray:
    """(height, width, 3) uint8, as stored (no EXIF or TIFF orientation applied). For images that passed `inspect`.

    Raises ValueError with the cause for one that cannot be decoded.
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
