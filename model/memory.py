"""What a process does with memory it has freed."""

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""


@cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees; False where its C library cannot be told (not glibc).

    glibc gives large blocks back to the system, from a size on that follows what was freed before, and who
    asks for one again waits for its pages to be zeroed: a tenth to a fifth of a training step on a CPU, and a
    time that depends on what ran earlier. For programs that own their process, commands and benchmarks: it
    stays as large as it once was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
