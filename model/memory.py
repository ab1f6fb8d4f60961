"""What a process does with memory it has freed."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Of glibc's malloc.h."""

LARGE = 32 << 20
"""Bytes of a block that glibc asks the system for, once blocks of this size have been freed."""

_kept = False


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees; False where its C library cannot be told (not glibc).

    glibc gives large blocks back to the system, from a size on that follows what was freed before, and who
    asks for one again waits for its pages to be zeroed: in float32 a seventh to a fifth of a training step on
    a CPU, and a time that depends on what ran earlier. For programs that own their process, commands and
    benchmarks: it does not shrink until `give_back_freed_memory`.

    Not for text generation: a cache that grows token by token leaves holes that no later one fits in.
    """
    global _kept
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        _kept = bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, -1))
    return _kept


def give_back_freed_memory() -> None:
    """Undo `keep_freed_memory`; nothing happens where it was not called."""
    global _kept
    if _kept:
        libc = ctypes.CDLL(None)
        # Having been told once, glibc no longer finds these limits by itself: what it would come to.
        for setting, value in ((M_MMAP_MAX, 65536), (M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, 2 * LARGE)):
            libc.mallopt(setting, value)
        libc.malloc_trim(ctypes.c_size_t(0))
        _kept = False


def keeps_freed_memory() -> bool:
    """Whether freed memory is kept: `keep_freed_memory` was called, with success, and not undone."""
    return _kept
