import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

SCRIPT = """
import torch
from fastdeit.kernels import bias_gelu
import kernels  # as transformers does, to see whether the package of that name on PyPI is installed
assert not hasattr(kernels, "bias_gelu") and not hasattr(kernels, "__version__")
bias_gelu(torch.ones(2, 4), torch.zeros(4))
import sys
assert not [name for name in sys.modules if name.startswith("kernels.")]
"""


def test_the_folder_under_its_bare_name_registers_nothing():
    subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, check=True)
