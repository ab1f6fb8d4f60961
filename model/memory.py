"""What a process does with memory it has freed."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's malloc.h."""

_kept = False


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees; False where its C library cannot be told (not glibc).

    glibc gives large blocks back to the system, from a size on that follows what was freed before, and who
    asks for one again waits for its pages to be zeroed: in float32 a seventh to a fifth of a training step on
    a CPU, and a time that depends on what ran earlier. For programs that own their process, commands and
    benchmarks: it does not shrink again.
    """
    global _kept
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        _kept = bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
    return _kept


def keeps_freed_memory() -> bool:
    """Whether `keep_freed_memory` has been called, with success."""
    return _kept
