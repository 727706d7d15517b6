"""Fused operations for vision transformers. They need torch and triton, and nothing else of this project.

Each operation is a folder: `api.py` (the public function, its checks and its registration with PyTorch),
`reference.py` (plain PyTorch: the CPU path and the oracle of the tests) and the Triton implementation, which is
imported at the first call that needs it.
"""

from .distillation_loss.api import distillation_loss
from .mix_normalize.api import mix_normalize

__all__ = ["distillation_loss", "mix_normalize"]
