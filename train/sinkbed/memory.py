"""What the C library does with memory that is freed."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Have this process keep memory that is freed, for what is allocated next, instead of returning it to the system.

    Every training step allocates anew what the one before has freed. From 32 MB on, logits at a vocabulary of 4,096
    for example, glibc takes new pages for it each time. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_MMAP_THRESHOLD, 2**30)
