"""noise: out[n, e] from Philox words of (seed, sample id n, step, stream, e).

    out             (N, ...) contiguous: float32 "normal" or "uniform", int64 "bits" (the words, in [0, 2**32))
    thread mapping  one thread a quad (elements 4 q … 4 q + 3), at most 128 quads of one sample a program
    bytes           4 written an element (8 for bits), nothing read; 128-bit stores where 4 divides a sample's elements

A sample id or step in device memory that does not fit 32 bits gives NaN (-1 for bits).
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import (
    OPTIONS,
    SAMPLE_ROWS,
    box_muller,
    counter_arguments,
    counter_words,
    interleave,
    launch_shape,
    philox,
    seed_words,
    uniform_of,
)

DISTRIBUTIONS = {"normal": 0, "uniform": 1, "bits": 2}


@triton.jit(do_not_specialize=["samples", "elements", "seed", "seed_high", "first_sample", "step", "stream"])
def noise_kernel(
    out,
    samples,
    elements,
    seed,
    seed_high,
    first_sample,
    step,
    stream,
    SEED_ON_DEVICE: tl.constexpr,
    FIRST_SAMPLE_FROM: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    WHOLE_QUADS: tl.constexpr,
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64) * ROWS + tl.program_id(1)
    if n >= samples:
        return
    first_quad = tl.program_id(0).to(tl.int64) * QUADS
    if WHOLE_QUADS:
        # In quads, times four: the compiler must see that addresses and the mask come in fours.
        base = (n * (elements // 4) + first_quad) * 4
        left = tl.minimum(elements // 4 - first_quad, QUADS).to(tl.int32) * 4
    else:
        base = n * elements + first_quad * 4
        left = tl.minimum(elements - first_quad * 4, 4 * QUADS).to(tl.int32)

    k0, k1 = seed_words(seed, seed_high, SEED_ON_DEVICE)
    sample, step_word, fits = counter_words(first_sample, step, n, FIRST_SAMPLE_FROM, STEP_ON_DEVICE)
    quad = first_quad.to(tl.uint32) + tl.arange(0, QUADS).to(tl.uint32)
    w0, w1, w2, w3 = philox(quad, sample, step_word, stream.to(tl.uint32), k0, k1)
    if DISTRIBUTION == 2:
        value = interleave(w0, w1, w2, w3, QUADS).to(tl.int64)
        value = tl.where(fits, value, -1)
    else:
        if DISTRIBUTION == 1:
            value = uniform_of(interleave(w0, w1, w2, w3, QUADS))
        else:
            v0, v1 = box_muller(w0, w1)
            v2, v3 = box_muller(w2, w3)
            value = interleave(v0, v1, v2, v3, QUADS)
        value = tl.where(fits, value, float("nan"))
    lane = tl.arange(0, 4 * QUADS)
    tl.store(out + base + lane, value, mask=lane < left)


def noise(
    out: Tensor,  # (N, ...) float32, int64 for "bits"; contiguous; written
    *,
    seed: int | Tensor,
    first_sample: int | Tensor = 0,  # or (N,) sample ids, on out's device
    step: int | Tensor,
    stream: int = 0,
    distribution: str = "normal",
) -> None:
    """Fill `out` with draws, each a function of (seed, sample id, step, stream, element of the sample)."""
    if out.numel() == 0:
        return
    samples = out.shape[0]
    elements = out.numel() // samples
    grid, quads, warps = launch_shape(samples, triton.cdiv(elements, 4))
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        noise_kernel[grid](
            out,
            samples,
            elements,
            **counter_arguments(seed, first_sample, step, stream),
            DISTRIBUTION=DISTRIBUTIONS[distribution],
            WHOLE_QUADS=elements % 4 == 0,
            ROWS=SAMPLE_ROWS,
            QUADS=quads,
            num_warps=warps,
            **OPTIONS,
        )
