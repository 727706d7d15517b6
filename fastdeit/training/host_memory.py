"""The memory of a CPU's training steps."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
OWN_MAPPING = 32 << 20  # bytes: the largest threshold that glibc would find for itself


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, in this process. By default glibc gives memory at the heap's top back to
    the kernel, and every step of training fetches, and clears, the same pages again: 3 to 8 % of its time
    (benchmarks/LOG.md, 26 November 2026). Blocks above OWN_MAPPING are given back as before. Returns False where the C
    library is another one, and nothing is changed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(M_MMAP_THRESHOLD, OWN_MAPPING), mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)])
