"""Kernels that show what the device functions of kernels/philox.py give; loaded beside them by conftest.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .philox import box_muller, log_of, philox, uniform_of


@triton.jit
def words_kernel(counters, out, COUNT: tl.constexpr):
    """counters (6, COUNT) int32 bits of c0 … c3, k0, k1 -> out (4, COUNT) int64."""
    i = tl.arange(0, COUNT)
    c0 = tl.load(counters + i).to(tl.uint32)
    c1 = tl.load(counters + COUNT + i).to(tl.uint32)
    c2 = tl.load(counters + 2 * COUNT + i).to(tl.uint32)
    c3 = tl.load(counters + 3 * COUNT + i).to(tl.uint32)
    k0 = tl.load(counters + 4 * COUNT + i).to(tl.uint32)
    k1 = tl.load(counters + 5 * COUNT + i).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out + i, w0.to(tl.int64))
    tl.store(out + COUNT + i, w1.to(tl.int64))
    tl.store(out + 2 * COUNT + i, w2.to(tl.int64))
    tl.store(out + 3 * COUNT + i, w3.to(tl.int64))


@triton.jit
def normal_kernel(words, out, COUNT: tl.constexpr):
    """words (2, COUNT) int32 bits -> out (4, COUNT) float32: u of word 0, ln u, and both normals."""
    i = tl.arange(0, COUNT)
    word0 = tl.load(words + i).to(tl.uint32)
    word1 = tl.load(words + COUNT + i).to(tl.uint32)
    u = uniform_of(word0)
    v0, v1 = box_muller(word0, word1)
    tl.store(out + i, u)
    tl.store(out + COUNT + i, log_of(u))
    tl.store(out + 2 * COUNT + i, v0)
    tl.store(out + 3 * COUNT + i, v1)
