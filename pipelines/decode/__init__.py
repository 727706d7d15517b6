"""From plans and encoded images to uint8 pixels: with DALI on a GPU; with DALI, PyTorch and Pillow on a CPU.

May import: augment, bad_files, child, index.
"""

from typing import Literal

# How the windows of encoded images become pixels, the fastest on a GPU first (probe.py tries them in this order): only
# the window is decoded; all of the image is decoded, then cropped; the window is decoded on the CPU.
Decoding = Literal["regions", "whole", "cpu"]
DECODINGS: tuple[Decoding, ...] = ("regions", "whole", "cpu")
