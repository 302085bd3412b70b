"""Freed memory that stays with the process, so that training does not ask the system for it again every update."""

from __future__ import annotations

import ctypes
import os

# glibc's <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP, _PAD, _LARGEST = 2**31 - 1, 64 * 2**20, 32 * 2**20  # bytes; mallopt takes an int, and no mmap threshold above


def keep_freed_memory() -> bool:
    """Ask glibc to hold on to freed memory up to 2 GB; whether it was asked.

    A network's maps are freed and allocated anew by every pass. By default glibc gives the larger ones back to the
    system, which hands them out again page by page, each page cleared at its first touch: a fifth of the learning step
    of a small net. It concerns the whole process, so programs call it, not the library. Other allocators, and settings
    of the environment (MALLOC_TRIM_THRESHOLD_, GLIBC_TUNABLES), stand.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  only glibc has it
        mallopt = library.mallopt
    except (OSError, AttributeError):
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in ((_TRIM_THRESHOLD, _KEEP), (_TOP_PAD, _PAD), (_MMAP_THRESHOLD, _LARGEST))
    )
