"""Freed memory that stays with the process, so that training does not ask the system for it again every update."""

from __future__ import annotations

import ctypes
import os

# glibc's <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEEP, _PAD, _LARGEST = 2**31 - 1, 64 * 2**20, 32 * 2**20  # bytes; mallopt takes an int, and no mmap threshold above

# Where one of these is set, the user has already chosen.
_SETTINGS = (
    "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD",
)  # fmt: skip


def keep_freed_memory() -> bool:
    """Ask glibc to hold on to freed memory up to 2 GB; whether it was asked.

    A network's feature maps are freed and allocated again by every pass. By default glibc gives the larger ones back
    to the system, which hands them out again page by page, each page cleared at its first touch: a fifth of the
    learning step of a small net. It concerns the whole process, so programs call it, not the library. Other
    allocators (LD_PRELOAD), and settings of the environment (GLIBC_TUNABLES, and MALLOC_… of what is set here),
    stand.
    """
    if any(name in os.environ for name in _SETTINGS):
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
