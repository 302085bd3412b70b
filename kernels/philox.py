"""Philox4x32-10 words, uniforms and normals inside a Triton kernel, and how counters reach one.

    (c0, c1, c2, c3; k0, k1) -> words w0 … w3                       uint32, ten rounds (Salmon et al., SC 2011)
    u       = fma(float32(w), 2**-32, 2**-33)                       in (0, 1]
    normals = sqrt(-2 ln u0) * (cos, sin)(2 pi u1), and of (u2, u3) within 1e-6 of float64 from the same u

The steps and coefficients are those of csrc/include/mgebm/{philox,normal}.h. Elementary functions are polynomials under
explicit fma: `tl.log` and `tl.sin` become `.approx` instructions on a GPU, libdevice's need a stack frame and cannot be
interpreted. Launch with `enable_fp_fusion=False` (as OPTIONS does), so that no other product is fused into a sum.

A seed or a counter is an int, handed over as int32 bit patterns that are never specialised on (a new step must not
compile a new kernel), or an int64 device tensor that the kernel reads, so that a replayed graph sees new values.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

OPTIONS = {"enable_fp_fusion": False}
MAX_QUADS = 128  # quads of a program, one a thread: four warps
SAMPLE_ROWS = 32768  # samples along the second grid axis, which ends at 65535


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Four uint32 words of broadcastable uint32 counter words and key words."""
    m0: tl.constexpr = 0xD2511F53
    m1: tl.constexpr = 0xCD9E8D57
    for _ in tl.static_range(10):
        # One 32 x 32 -> 64 product each, rather than a high and a low one.
        p0 = c0.to(tl.uint64) * m0
        p1 = c2.to(tl.uint64) * m1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def uniform_of(word):
    """u in (0, 1]: word 0 gives 2**-33, the largest words round to 1; the logarithm is always finite."""
    scale: tl.constexpr = 2.0**-32
    half: tl.constexpr = 2.0**-33
    return tl.fma(word.to(tl.float32), scale, half)


@triton.jit
def log_of(u):
    """ln u for u in [2**-33, 1], to about one unit in the last place, also next to u = 1 where it vanishes."""
    # u = 2**e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): no cancellation between e ln 2 and ln(1 + f).
    sqrt_half: tl.constexpr = 0x3F3504F3
    shifted = u.to(tl.int32, bitcast=True) - sqrt_half
    e = (shifted >> 23).to(tl.float32)
    f = ((shifted & 0x007FFFFF) + sqrt_half).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.0786544457, 0.128791988)
    p = tl.fma(p, f, -0.131252959)
    p = tl.fma(p, f, 0.141814202)
    p = tl.fma(p, f, -0.166249692)
    p = tl.fma(p, f, 0.200022832)
    p = tl.fma(p, f, -0.250007957)
    p = tl.fma(p, f, 0.333333164)
    log1p = tl.fma(f * f, tl.fma(f, p, -0.5), f)
    return tl.fma(e, 0.693147182, tl.fma(e, -1.90465421e-9, log1p))


@triton.jit
def sincos_turns(u):
    """(sin, cos)(2 pi u) for u in [0, 1]. The reduction 4u = k + r is exact, |r| <= 1/2."""
    quarters = u * 4.0
    k = (quarters + 0.5).to(tl.int32)
    r = quarters - k.to(tl.float32)
    s = r * r
    sine = tl.fma(s, -0.00460214540, 0.0796802193)
    sine = tl.fma(sine, s, -0.645963490)
    sine = tl.fma(sine, s, -4.37113883e-8)
    sine = tl.fma(r, 1.57079637, sine * r)
    cosine = tl.fma(s, 0.000904054497, -0.0208603051)
    cosine = tl.fma(cosine, s, 0.253669232)
    cosine = tl.fma(cosine, s, -1.23370051)
    cosine = tl.fma(cosine, s, 1.0)
    # Quadrant k turns the pair by k quarter turns: an odd k swaps it, two bits of k give the signs.
    odd = (k & 1) != 0
    sine_bits = tl.where(odd, cosine, sine).to(tl.int32, bitcast=True) ^ ((k & 2) << 30)
    cosine_bits = tl.where(odd, sine, cosine).to(tl.int32, bitcast=True) ^ (((k + 1) & 2) << 30)
    return sine_bits.to(tl.float32, bitcast=True), cosine_bits.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(word0, word1):
    """Two normals of two words."""
    radius = tl.sqrt_rn(log_of(uniform_of(word0)) * -2.0)
    sine, cosine = sincos_turns(uniform_of(word1))
    return radius * cosine, radius * sine


@triton.jit
def interleave(v0, v1, v2, v3, QUADS: tl.constexpr):
    """(QUADS,) four times -> (4 * QUADS,) with v0[q], v1[q], v2[q], v3[q] adjacent: within a thread, no exchange."""
    return tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (4 * QUADS,))


@triton.jit
def seed_words(seed, seed_high, ON_DEVICE: tl.constexpr):
    """Key words (k0, k1), from two int32 bit patterns or from int64 memory."""
    if ON_DEVICE:
        value = tl.load(seed)
        return value.to(tl.uint32), (value >> 32).to(tl.uint32)
    else:
        return seed.to(tl.uint32), seed_high.to(tl.uint32)


@triton.jit
def counter_words(first_sample, step, n, FIRST_SAMPLE_FROM: tl.constexpr, STEP_ON_DEVICE: tl.constexpr):
    """(sample id, step, fits) of sample n. FIRST_SAMPLE_FROM: 0 a number, 1 memory (one base), 2 memory (an id each).

    `fits` is False where a value from memory passes 32 bits: its noise must be NaN, never that of a wrapped counter.
    """
    fits = True
    if FIRST_SAMPLE_FROM == 0:
        sample = first_sample.to(tl.uint32) + n.to(tl.uint32)
    else:
        if FIRST_SAMPLE_FROM == 1:
            wide_sample = tl.load(first_sample) + n
        else:
            wide_sample = tl.load(first_sample + n)
        fits = (wide_sample >> 32) == 0
        sample = wide_sample.to(tl.uint32)
    if STEP_ON_DEVICE:
        wide_step = tl.load(step)
        fits = fits & ((wide_step >> 32) == 0)
        step = wide_step.to(tl.uint32)
    else:
        step = step.to(tl.uint32)
    return sample, step, fits


def _signed(word: int) -> int:
    """The int32 whose bits are the low 32 of `word`: every launch then has the same argument types."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def counter_arguments(
    seed: int | Tensor,
    first_sample: int | Tensor,
    step: int | Tensor,
    stream: int,
) -> dict[str, object]:
    """The keyword arguments by which kernels take their counters (see `seed_words`, `counter_words`)."""
    seed_on_device, step_on_device = isinstance(seed, Tensor), isinstance(step, Tensor)
    if isinstance(first_sample, Tensor):
        source = 2 if first_sample.dim() == 1 else 1
    else:
        source = 0
    return {
        "seed": seed if seed_on_device else _signed(seed),
        "seed_high": 0 if seed_on_device else _signed(seed >> 32),
        "first_sample": first_sample if source else _signed(first_sample),
        "step": step if step_on_device else _signed(step),
        "stream": _signed(stream),
        "SEED_ON_DEVICE": seed_on_device,
        "FIRST_SAMPLE_FROM": source,
        "STEP_ON_DEVICE": step_on_device,
    }


def launch_shape(samples: int, quads: int) -> tuple[tuple[int, int, int], int, int]:
    """(grid, quads a program, warps): grid axes are quad block, sample, sample // SAMPLE_ROWS."""
    block = min(MAX_QUADS, max(32, triton.next_power_of_2(quads)))
    grid = (triton.cdiv(quads, block), min(samples, SAMPLE_ROWS), triton.cdiv(samples, SAMPLE_ROWS))
    return grid, block, block // 32
