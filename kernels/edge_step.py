"""edge_step: the first layer's data gradient and the Langevin update of kernels/langevin_step.py, x in place.

    g[h, w, c] = unscale sum_{k, kernel} upstream[., ., k] W[k, c, ., .];   x <- the update of langevin_step with g

    x               (N, C, H, W) float32, contiguous or channels-last; upstream (N, K, OH, OW) float32 / float16 /
                    bfloat16, either layout; packed weights (TH TW K, columns) in upstream's dtype
    parities        with stride s, output pixels (s i + p, s j + q) of all s^2 phases (p, q) and all channels are the
                    columns of one product over (tap, k): a row is a block (i, j), its taps are TH x TW upstream pixels
                    around (i, j), and weights that a phase does not have are 0. Columns: s^2 C, C padded to a power of
                    two, at least 16
    thread mapping  64 or 128 blocks a program (a rectangle of one sample, or several samples of a small map); the
                    product on tensor cores at 16 bits, in IEEE float32 otherwise; then a quad of noise (4 neighbours in
                    a row) a thread at a time
    bytes           upstream read once from memory, TH TW times from L1; x read and written (8 a pixel), the gradient
                    itself never; mask 1 where it is not broadcast

Where 4 does not divide W a quad passes the end of a row: every element then makes its own four words and takes one.
bad_step (one int64) takes the smallest step at which an entry of g was not finite, before any clip.
"""

from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_act import sum_of
from .langevin_step import Strides, bounded, drifted, table_arguments, tabled
from .philox import OPTIONS, box_muller, counter_arguments, counter_words, philox, seed_words

PIXELS = 256  # of a program, by channel: 64 blocks of four phases, 128 of one or two
_PLAIN = ["samples", "seed", "seed_high", "first_sample", "step", "stream", "x_sample", "x_channel", "x_spatial"]
_PLAIN += ["mask_sample", "mask_channel", "mask_spatial"]


@triton.jit
def step_number(step, STEP_ON_DEVICE: tl.constexpr):
    """The step as int64, from its int32 bit pattern or from memory."""
    if STEP_ON_DEVICE:
        return tl.load(step)
    else:
        return step.to(tl.uint32).to(tl.int64)


@triton.jit
def note_bad(bad_step, gradient, inside, number):
    """bad_step <- min(bad_step, number) where an entry that exists is not finite."""
    finite = tl.abs(gradient) <= 3.4028234663852886e38  # False for NaN
    bad = tl.where(inside, tl.where(finite, 0, 1), 0)
    if sum_of(tl.reshape(bad, (bad.numel,)), 0) > 0:
        tl.atomic_min(bad_step, number)


@triton.jit(do_not_specialize=_PLAIN)
def edge_step_kernel(
    x,
    upstream,
    packed,
    mask,
    bad_step,
    samples,
    x_sample,
    x_channel,
    x_spatial,
    mask_sample,
    mask_channel,
    mask_spatial,
    unscale,
    drift,  # a number, or with TABLE the address of drift, noise_std and 1/sigma^2
    noise_std,
    inv_variance,
    reference_mean,
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
    UNSCALE_ON_DEVICE: tl.constexpr,
    NOISY: tl.constexpr,
    CLIP: tl.constexpr,
    CLAMP_LO: tl.constexpr,
    CLAMP_HI: tl.constexpr,
    MASKED: tl.constexpr,
    NOTING: tl.constexpr,
    TABLE: tl.constexpr,
    X_FLAT: tl.constexpr,  # x is contiguous
    CHANNELS_INNER: tl.constexpr,  # upstream is channels-last
    CHANNELS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    OUT_HEIGHT: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    FIRST_H: tl.constexpr,
    FIRST_W: tl.constexpr,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,  # CHANNELS, as a power of two
    TILE_N: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    DEPTH: tl.constexpr,  # k at a time
):
    across: tl.constexpr = (WIDTH + STRIDE_W * TILE_W - 1) // (STRIDE_W * TILE_W)
    down: tl.constexpr = (HEIGHT + STRIDE_H * TILE_H - 1) // (STRIDE_H * TILE_H)
    group = tl.program_id(0) // (across * down)
    tile = tl.program_id(0) - group * (across * down)
    first_n = group.to(tl.int64) * TILE_N
    first_i = (tile // across) * TILE_H
    first_j = (tile % across) * TILE_W

    # The product. Row m is block (i, j) of sample n.
    rows: tl.constexpr = TILE_N * TILE_H * TILE_W
    m = tl.arange(0, rows)
    n = first_n + m // (TILE_H * TILE_W)
    i = first_i + (m // TILE_W) % TILE_H
    j = first_j + m % TILE_W
    column = tl.expand_dims(tl.arange(0, COLUMNS), 0)
    chunks: tl.constexpr = (OUT_CHANNELS + DEPTH - 1) // DEPTH
    sums = tl.full((rows, COLUMNS), 0.0, tl.float32)
    for index in range(TAPS_H * TAPS_W * chunks):
        tap = index // chunks
        k = (index - tap * chunks) * DEPTH + tl.arange(0, DEPTH)
        oi = i + FIRST_H + tap // TAPS_W
        oj = j + FIRST_W + tap % TAPS_W
        there = (n < samples) & (oi >= 0) & (oi < OUT_HEIGHT) & (oj >= 0) & (oj < OUT_WIDTH)
        if CHANNELS_INNER:
            at = tl.expand_dims(((n * OUT_HEIGHT + oi) * OUT_WIDTH + oj) * OUT_CHANNELS, 1) + tl.expand_dims(k, 0)
        else:
            at = n * (OUT_CHANNELS * OUT_HEIGHT * OUT_WIDTH) + oi * OUT_WIDTH + oj
            at = tl.expand_dims(at, 1) + tl.expand_dims(k, 0) * (OUT_HEIGHT * OUT_WIDTH)
        there = tl.expand_dims(there, 1)
        weight_at = packed + tl.expand_dims(tap * OUT_CHANNELS + k, 1) * COLUMNS + column
        if OUT_CHANNELS % DEPTH == 0:
            weight = tl.load(weight_at)
        else:
            there = there & (tl.expand_dims(k, 0) < OUT_CHANNELS)
            weight = tl.load(weight_at, mask=tl.expand_dims(k, 1) < OUT_CHANNELS, other=0.0)
        # Through L1: the taps of one program are mostly the same pixels. Triton 3.6 sends asynchronous copies of 16
        # bytes past L1 whatever the modifier says; the hint keeps copies to 8 bytes, which always go through it.
        if CHANNELS_INNER:
            at = tl.max_contiguous(at, (1, 64 // upstream.dtype.element_ty.primitive_bitwidth))
        value = tl.load(upstream + at, mask=there, other=0.0, cache_modifier=".ca")
        sums = tl.dot(value, weight, sums, input_precision="ieee")

    # Columns to pixels: (n, i, j; p, q, c) -> (n, c; i, p; j, q), rows of the image; padded columns hold zeros.
    phases: tl.constexpr = STRIDE_H * STRIDE_W * PADDED
    if COLUMNS > phases:
        sums = sum_of(tl.reshape(sums, (rows, COLUMNS // phases, phases)), 1)
    pixels = tl.reshape(sums, (TILE_N, TILE_H, TILE_W, STRIDE_H, STRIDE_W, PADDED))
    pixels = tl.permute(pixels, (0, 5, 1, 3, 2, 4))
    width: tl.constexpr = TILE_W * STRIDE_W
    height: tl.constexpr = TILE_H * STRIDE_H
    wide: tl.constexpr = 4 if WIDTH % 4 == 0 and width % 4 == 0 else 1  # neighbours that a thread takes as one
    parts: tl.constexpr = TILE_N * PADDED * height * width // wide
    gradient = tl.reshape(pixels, (parts, wide))

    part = tl.arange(0, parts)
    w = first_j * STRIDE_W + (part % (width // wide)) * wide
    h = first_i * STRIDE_H + (part // (width // wide)) % height
    c = (part // (width // wide * height)) % PADDED
    n = first_n + part // (width // wide * height * PADDED)
    inside = (n < samples) & (c < CHANNELS) & (h < HEIGHT) & (w < WIDTH)
    safe_n = tl.minimum(n, samples - 1)
    element = (c * HEIGHT + h) * WIDTH + w
    lane = tl.expand_dims(tl.arange(0, wide), 0)
    within = tl.broadcast_to(tl.expand_dims(inside, 1), (parts, wide))

    if UNSCALE_ON_DEVICE:
        gradient = gradient * tl.load(unscale)
    else:
        gradient = gradient * unscale
    if NOTING:
        note_bad(bad_step, gradient, within, step_number(step, STEP_ON_DEVICE))
    if X_FLAT:
        if wide == 4:
            at = safe_n * (CHANNELS * HEIGHT * (WIDTH // 4)) + (c * HEIGHT + h) * (WIDTH // 4) + w // 4
            x_at = x + (tl.expand_dims(at * 4, 1) + lane)
        else:
            x_at = x + (tl.expand_dims(safe_n * (CHANNELS * HEIGHT * WIDTH) + element, 1) + lane)
    else:
        at = safe_n * x_sample + c.to(tl.int64) * x_channel + (h * WIDTH + w).to(tl.int64) * x_spatial
        x_at = x + (tl.expand_dims(at, 1) + lane * x_spatial)
    old = tl.load(x_at, mask=within, other=0.0)
    if TABLE:
        drift, noise_std, inv_variance = tabled(drift)
    value = drifted(old, gradient, drift, inv_variance, reference_mean, grad_clamp, CLIP)
    if NOISY:
        k0, k1 = seed_words(seed, seed_high, SEED_ON_DEVICE)
        sample, step_word, fits = counter_words(first_sample, step, safe_n, FIRST_SAMPLE_FROM, STEP_ON_DEVICE)
        quad = (element // 4).to(tl.uint32)
        w0, w1, w2, w3 = philox(quad, sample, step_word, stream.to(tl.uint32), k0, k1)
        v0, v1 = box_muller(w0, w1)
        v2, v3 = box_muller(w2, w3)
        if wide == 4:
            normal = tl.reshape(tl.join(tl.join(v0, v2), tl.join(v1, v3)), (parts, 4))
        else:
            which = element % 4
            normal = tl.where(which < 2, tl.where(which == 0, v0, v1), tl.where(which == 2, v2, v3))
            normal = tl.expand_dims(normal, 1)
        scale = tl.where(fits, noise_std, float("nan"))
        if FIRST_SAMPLE_FROM != 0:
            scale = tl.expand_dims(scale, 1)
        value = tl.fma(tl.broadcast_to(scale, (parts, wide)), normal, value)
    value = bounded(value, clamp_lo, clamp_hi, CLAMP_LO, CLAMP_HI)
    if MASKED:
        at = safe_n * mask_sample + c.to(tl.int64) * mask_channel + (h * WIDTH + w).to(tl.int64) * mask_spatial
        keep = tl.load(mask + (tl.expand_dims(at, 1) + lane * mask_spatial), mask=within, other=0)
        value = tl.where(keep != 0, value, old)
    tl.store(x_at, value, mask=within)


def tile_shape(height: int, width: int, rows: int) -> tuple[int, int, int]:
    """(samples, blocks down, blocks across) of a program on a map of height x width blocks: powers of two."""
    across = min(triton.next_power_of_2(width), rows)
    down = min(triton.next_power_of_2(height), rows // across)
    return rows // (across * down), down, across


def depth_of(out_channels: int, dtype: torch.dtype) -> int:
    """Channels at a time: a power of two that divides them where one of 16 or more does; few at float32, whose product
    is made in registers."""
    most = 16 if dtype == torch.float32 else 64
    return max(16, min(most, out_channels & -out_channels))


def edge_step_(
    x: Tensor,  # (N, C, H, W) float32, contiguous or channels-last; updated in place
    upstream: Tensor,  # (N, K, OH, OW), contiguous or channels-last
    packed: Tensor,  # (TH * TW * K, columns), upstream's dtype
    *,
    stride: tuple[int, int],
    first: tuple[int, int],  # the smallest upstream offset of a block, down and across
    taps: tuple[int, int],
    unscale: float | Tensor = 1.0,
    drift: float,
    noise_std: float,
    inv_variance: float = 0.0,
    reference_mean: float = 0.0,
    grad_clamp: float | None = None,
    clamp_lo: float | None = None,
    clamp_hi: float | None = None,
    table: Tensor | None = None,  # (1, 1, 3) float32: before drift, noise_std and inv_variance
    mask: Tensor | None = None,
    mask_strides: Strides | None = None,  # (sample, channel, spatial)
    bad_step: Tensor | None = None,  # one int64
    seed: int | Tensor = 0,
    first_sample: int | Tensor = 0,
    step: int | Tensor = 0,
    stream: int = 0,
) -> None:
    """One Langevin step of every chain, in place, from the gradient at the first layer's output."""
    if x.numel() == 0:
        return
    if mask is not None and mask_strides is None:
        raise ValueError("edge_step_: mask_strides must be given with a mask, got None")
    samples, channels, height, width = x.shape
    flat = x.is_contiguous()
    x_strides = (channels * height * width, height * width, 1) if flat else (channels * height * width, 1, channels)
    out_channels, out_height, out_width = upstream.shape[1:]
    blocks = triton.cdiv(height, stride[0]), triton.cdiv(width, stride[1])
    tile = tile_shape(*blocks, max(64, min(128, PIXELS // (stride[0] * stride[1]))))
    tiles = triton.cdiv(samples, tile[0]) * triton.cdiv(blocks[0], tile[1]) * triton.cdiv(blocks[1], tile[2])
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        edge_step_kernel[tiles,](
            x,
            upstream,
            packed,
            x if mask is None else mask.view(torch.uint8),
            x if bad_step is None else bad_step,
            samples,
            *x_strides,
            *(mask_strides or (0, 0, 0)),
            unscale if isinstance(unscale, Tensor) else float(unscale),
            *table_arguments(drift, noise_std, inv_variance, table),
            float(reference_mean),
            0.0 if grad_clamp is None else float(grad_clamp),
            0.0 if clamp_lo is None else float(clamp_lo),
            0.0 if clamp_hi is None else float(clamp_hi),
            **counter_arguments(seed, first_sample, step, stream),
            UNSCALE_ON_DEVICE=isinstance(unscale, Tensor),
            NOISY=noise_std != 0,
            CLIP=grad_clamp is not None and math.isfinite(grad_clamp),
            CLAMP_LO=clamp_lo is not None,
            CLAMP_HI=clamp_hi is not None,
            MASKED=mask is not None,
            NOTING=bad_step is not None,
            TABLE=table is not None,
            X_FLAT=flat,
            CHANNELS_INNER=not upstream.is_contiguous() or out_height * out_width == 1,
            CHANNELS=channels,
            HEIGHT=height,
            WIDTH=width,
            OUT_CHANNELS=out_channels,
            OUT_HEIGHT=out_height,
            OUT_WIDTH=out_width,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            FIRST_H=first[0],
            FIRST_W=first[1],
            TAPS_H=taps[0],
            TAPS_W=taps[1],
            COLUMNS=packed.shape[1],
            PADDED=triton.next_power_of_2(channels),
            TILE_N=tile[0],
            TILE_H=tile[1],
            TILE_W=tile[2],
            DEPTH=depth_of(out_channels, upstream.dtype),
            num_warps=4,
            num_stages=3,
            **OPTIONS,
        )
