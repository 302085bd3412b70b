"""Freed memory stays with a process that asked for it, as glibc's own count of its free bytes says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mgebm_fast.learning.run import heap

# The file alone: the package imports torch, which takes seconds.
PROGRAM = """
import ctypes, runpy, sys
keep_freed_memory = runpy.run_path(sys.argv[2])["keep_freed_memory"]

class Info(ctypes.Structure):  # struct mallinfo2
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.free.argtypes = Info, ctypes.c_void_p, [ctypes.c_void_p]
asked = sys.argv[1] == "ask" and keep_freed_memory()
blocks = [libc.malloc(8 * 2**20) for _ in range(20)]
for block in blocks:
    ctypes.memset(block, 1, 8 * 2**20)
for block in blocks:
    libc.free(block)
print(asked, libc.mallinfo2().fordblks >= 20 * 8 * 2**20)
"""


def run(argument: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument, heap.__file__],
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )
    if "mallinfo2" in found.stderr:
        pytest.skip("needs mallinfo2, glibc 2.33 or newer")
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_freed_blocks_stay_with_the_process_that_asked() -> None:
    assert run("ask") == "True True"


def test_by_default_glibc_gives_large_blocks_back() -> None:
    assert run("leave") == "False False"


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_THRESHOLD_"])
def test_settings_of_the_environment_stand(name: str) -> None:
    assert run("ask", **{name: "131072"}) == "False False"
