"""A run under torchrun whose rank 1 is killed in step 3 of the first attempt (for test_distributed.py)."""

import os
import sys

from fastdeit import errors

from . import runs
from .processes import At, die

if __name__ == "__main__":
    fails = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    errors.run(lambda: runs.run(*sys.argv[1:], on_micro_batch=At(3, die) if fails else None) and None)
