"""langevin_step: x <- clamp(x - drift (clip(grad, +-c) + (x - m) / sigma^2) + noise_std eps), in place.

    x               (N, C, *spatial) float32; grad the same shape, float32 / float16 / bfloat16; arithmetic in float32
    layouts         each tensor by its (sample, channel, spatial) strides in elements: contiguous or channels-last
    mask            uint8 by its strides, 0 where broadcast; a zero byte holds a pixel's bits
    thread mapping  one thread a quad of noise (elements 4 q … 4 q + 3 in C, H, W order), at most 128 quads of one
                    sample a program
    bytes a pixel   x read and written (8) + grad (4 or 2) + mask (1 where it is not broadcast); noise costs no memory
    paths           a tensor in C, H, W order is addressed flat: 128-bit loads and stores where 4 divides C * S; any
                    other element by element. With x channels-last, neighbouring threads take the same pixels of
                    neighbouring channels, so that the loads and stores of a warp share their cache lines

Order of the float32 operations (csrc/ops/langevin_step.h has the same):
    g = clip(grad, +-c);  force = fma(x - m, 1/sigma^2, g);  v = fma(-drift, force, x);  v = fma(noise_std, eps, v);
    v = v < lo ? lo : v;  v = v > hi ? hi : v                       NaN passes the comparisons
A sample id or step in device memory that does not fit 32 bits makes its updated pixels NaN.
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
)

# Arguments that change from launch to launch or from shape to shape: specialising on them would recompile the kernel.
_PLAIN = ["samples", "elements", "channels", "spatial", "seed", "seed_high", "first_sample", "step", "stream"]
_PLAIN += [f"{name}_{axis}" for name in ("x", "grad", "mask") for axis in ("sample", "channel", "spatial")]


@triton.jit
def offsets(channel, site, channel_stride, spatial_stride, BY_QUAD: tl.constexpr, QUADS: tl.constexpr):
    """(4 * QUADS,) offsets within a sample; BY_QUAD: from the (QUADS,) places of each quad's first element."""
    at = channel * channel_stride + site * spatial_stride
    if BY_QUAD:
        at = tl.reshape(tl.broadcast_to(tl.expand_dims(at, 1), (QUADS, 4)), (4 * QUADS,))
        at += (tl.arange(0, 4 * QUADS) & 3) * spatial_stride
    return at


@triton.jit
def tabled(at):
    """drift, noise_std and 1/sigma^2 from memory."""
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


def table_arguments(drift: float, noise_std: float, inv_variance: float, table: Tensor | None) -> tuple:
    """What a kernel takes for these three: numbers, or the table in the place of the first."""
    return float(drift) if table is None else table, float(noise_std), float(inv_variance)


@triton.jit
def drifted(old, gradient, drift, inv_variance, reference_mean, grad_clamp, CLIP: tl.constexpr):
    """The state before its noise."""
    if CLIP:
        gradient = tl.where(gradient < -grad_clamp, -grad_clamp, gradient)
        gradient = tl.where(gradient > grad_clamp, grad_clamp, gradient)
    force = tl.fma(old - reference_mean, inv_variance, gradient)
    return tl.fma(-drift, force, old)


@triton.jit
def bounded(value, clamp_lo, clamp_hi, CLAMP_LO: tl.constexpr, CLAMP_HI: tl.constexpr):
    if CLAMP_LO:
        value = tl.where(value < clamp_lo, clamp_lo, value)
    if CLAMP_HI:
        value = tl.where(value > clamp_hi, clamp_hi, value)
    return value


@triton.jit(do_not_specialize=_PLAIN)
def langevin_step_kernel(
    x,
    grad,
    mask,
    samples,
    elements,  # channels * spatial
    channels,
    spatial,
    x_sample,
    x_channel,
    x_spatial,
    grad_sample,
    grad_channel,
    grad_spatial,
    mask_sample,
    mask_channel,
    mask_spatial,
    drift,  # a number, or with TABLE the table's address: drift, noise_std, 1/sigma^2 of each sample, or of all
    noise_std,
    inv_variance,
    reference_mean,  # a number, or with MEANS the address of those of each element
    grad_clamp,
    clamp_lo,
    clamp_hi,
    seed,
    seed_high,
    first_sample,
    step,
    stream,
    SEED_ON_DEVICE: tl.constexpr,
    FIRST_SAMPLE_FROM: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    NOISY: tl.constexpr,
    CLIP: tl.constexpr,
    CLAMP_LO: tl.constexpr,
    CLAMP_HI: tl.constexpr,
    MASKED: tl.constexpr,
    TABLE: tl.constexpr,  # 0: none, 1: one for all samples, 2: by sample
    MEANS: tl.constexpr,  # as TABLE
    X_FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    MASK_FLAT: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,  # x is channels-last and 4 divides spatial; nothing is flat then
    WHOLE_QUADS: tl.constexpr,  # 4 divides elements
    QUADS_IN_CHANNEL: tl.constexpr,  # 4 divides spatial
    WIDE: tl.constexpr,  # offsets within a sample need int64
    ROWS: tl.constexpr,
    QUADS: tl.constexpr,
):
    n = tl.program_id(2).to(tl.int64) * ROWS + tl.program_id(1)
    if n >= samples:
        return
    first_quad = tl.program_id(0).to(tl.int64) * QUADS
    thread = tl.arange(0, QUADS)
    lane = tl.arange(0, 4 * QUADS)
    if WHOLE_QUADS:
        # In quads, times four: the compiler must see that addresses and the tail come in fours.
        base = (n * (elements // 4) + first_quad) * 4
        mask_base = (n * (mask_sample // 4) + first_quad) * 4
        left = tl.minimum(elements // 4 - first_quad, QUADS).to(tl.int32) * 4
    else:
        base = n * elements + first_quad * 4
        mask_base = n * mask_sample + first_quad * 4
        left = tl.minimum(elements - first_quad * 4, 4 * QUADS).to(tl.int32)
    inside = lane < left

    # quad: each thread's noise counter. channel, site: of its first element, or of every element where quads straddle.
    if CHANNELS_INNER:
        index = first_quad.to(tl.int32) + thread
        site = index // channels
        channel = index - site * channels
        quad = (channel * (spatial // 4) + site).to(tl.uint32)
        site = site * 4
    else:
        quad = first_quad.to(tl.uint32) + thread.to(tl.uint32)
        if WIDE:
            start = first_quad * 4
        else:
            start = first_quad.to(tl.int32) * 4
        if QUADS_IN_CHANNEL:
            element = start + thread * 4
        else:
            element = start + lane
        channel = element // spatial
        site = element - channel * spatial

    if X_FLAT:
        x_at = x + base + lane
    else:
        x_at = x + n * x_sample + offsets(channel, site, x_channel, x_spatial, QUADS_IN_CHANNEL, QUADS)
    if GRAD_FLAT:
        grad_at = grad + base + lane
    else:
        grad_at = grad + n * grad_sample + offsets(channel, site, grad_channel, grad_spatial, QUADS_IN_CHANNEL, QUADS)
    old = tl.load(x_at, mask=inside)
    gradient = tl.load(grad_at, mask=inside).to(tl.float32)

    if TABLE:
        drift, noise_std, inv_variance = tabled(drift + (3 * n if TABLE == 2 else 0))
    if MEANS:
        means = reference_mean + (n * elements if MEANS == 2 else 0)
        if X_FLAT:
            means += first_quad * 4 + lane
        else:
            means += offsets(channel, site, spatial, 1, QUADS_IN_CHANNEL, QUADS)
        reference_mean = tl.load(means, mask=inside)
    value = drifted(old, gradient, drift, inv_variance, reference_mean, grad_clamp, CLIP)
    if NOISY:
        k0, k1 = seed_words(seed, seed_high, SEED_ON_DEVICE)
        sample, step_word, fits = counter_words(first_sample, step, n, FIRST_SAMPLE_FROM, STEP_ON_DEVICE)
        w0, w1, w2, w3 = philox(quad, sample, step_word, stream.to(tl.uint32), k0, k1)
        v0, v1 = box_muller(w0, w1)
        v2, v3 = box_muller(w2, w3)
        value = tl.fma(tl.where(fits, noise_std, float("nan")), interleave(v0, v1, v2, v3, QUADS), value)
    value = bounded(value, clamp_lo, clamp_hi, CLAMP_LO, CLAMP_HI)
    if MASKED:
        if MASK_FLAT:
            mask_at = mask + mask_base + lane
        else:
            at = offsets(channel, site, mask_channel, mask_spatial, QUADS_IN_CHANNEL, QUADS)
            mask_at = mask + n * mask_sample + at
        # Held pixels are written back rather than left out: the store stays 128 bits wide.
        value = tl.where(tl.load(mask_at, mask=inside, other=0) != 0, value, old)
    tl.store(x_at, value, mask=inside)


Strides = tuple[int, int, int]  # (sample, channel, spatial), in elements


def _strides(tensor: Tensor, channels: int, spatial: int) -> Strides:
    """Those of a dense (N, C, *spatial) tensor, contiguous or channels-last."""
    if tensor.is_contiguous():
        return channels * spatial, spatial, 1
    return channels * spatial, 1, channels


def langevin_step_(
    x: Tensor,  # (N, C, *spatial) float32, contiguous or channels-last; updated in place
    grad: Tensor,  # as x; float32, float16 or bfloat16; its layout may differ
    *,
    drift: float,
    noise_std: float,
    inv_variance: float = 0.0,  # 1 / sigma^2; 0: no reference
    reference_mean: float = 0.0,
    grad_clamp: float | None = None,
    clamp_lo: float | None = None,
    clamp_hi: float | None = None,
    table: Tensor | None = None,  # (1, N or 1, 3) float32, contiguous: before drift, noise_std and inv_variance
    means: Tensor | None = None,  # (N or 1, C, *spatial) float32, contiguous: before reference_mean
    mask: Tensor | None = None,  # bool or uint8, False or 0 holds a pixel
    mask_strides: Strides | None = None,  # 0 where the mask is broadcast; None: the mask is contiguous, of x's shape
    seed: int | Tensor = 0,
    first_sample: int | Tensor = 0,  # or (N,) sample ids, on x's device
    step: int | Tensor = 0,
    stream: int = 0,
) -> None:
    """One Langevin step of every chain, in place."""
    if mask is not None and mask_strides is None and mask.numel() != x.numel():
        raise ValueError("langevin_step_: mask_strides must be given for a mask that is broadcast, got None")
    if x.numel() == 0:
        return
    samples, channels = x.shape[0], x.shape[1] if x.dim() > 1 else 1
    elements = x.numel() // samples
    spatial = elements // channels
    dense = (elements, spatial, 1)
    x_strides, grad_strides = _strides(x, channels, spatial), _strides(grad, channels, spatial)
    mask_strides = mask_strides or dense
    whole_quads = elements % 4 == 0
    quads_in_channel = spatial % 4 == 0
    wide = max(elements, channels * mask_strides[1] + spatial * mask_strides[2]) >= 2**31
    channels_inner = x_strides != dense and quads_in_channel and not wide
    mask_flat = mask_strides[2] == 1 and (channels == 1 or mask_strides[1] == spatial)
    if whole_quads:
        mask_flat = mask_flat and mask_strides[0] % 4 == 0
    grid, quads, warps = launch_shape(samples, triton.cdiv(elements, 4))
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        langevin_step_kernel[grid](
            x,
            grad,
            x if mask is None else mask.view(torch.uint8),
            samples,
            elements,
            channels,
            spatial,
            *x_strides,
            *grad_strides,
            *mask_strides,
            *table_arguments(drift, noise_std, inv_variance, table),
            float(reference_mean) if means is None else means,
            0.0 if grad_clamp is None else float(grad_clamp),
            0.0 if clamp_lo is None else float(clamp_lo),
            0.0 if clamp_hi is None else float(clamp_hi),
            **counter_arguments(seed, first_sample, step, stream),
            NOISY=noise_std != 0,
            CLIP=grad_clamp is not None,
            CLAMP_LO=clamp_lo is not None,
            CLAMP_HI=clamp_hi is not None,
            MASKED=mask is not None,
            TABLE=0 if table is None else 1 + (table.shape[1] > 1),
            MEANS=0 if means is None else 1 + (means.shape[0] > 1),
            X_FLAT=x_strides == dense,
            GRAD_FLAT=grad_strides == dense and not channels_inner,
            MASK_FLAT=mask_flat and not channels_inner,
            CHANNELS_INNER=channels_inner,
            WHOLE_QUADS=whole_quads,
            QUADS_IN_CHANNEL=quads_in_channel,
            WIDE=wide,
            ROWS=SAMPLE_ROWS,
            QUADS=quads,
            num_warps=warps,
            **OPTIONS,
        )
