"""batch_norm_act: y = a(w (z - m) r + b) with m, r = 1 / sqrt(var + eps) of each channel over (N, S); and its gradient.

    z, grad, out    (N, C, *spatial), float32 / float16 / bfloat16, contiguous or channels-last, one layout for all;
                    arithmetic, statistics and sums in float32
    kernels         statistics, then apply; backward sums (of d and of d n, n = (z - m) r, d = grad a'(w n + b)),
                    then apply. Of few rows (SINGLE_ROWS) one program makes both for its channels, in one launch
    thread mapping  rows are the N S values of a channel. A program of the first kernel takes a block of channels and
                    one of at most 128 runs of rows, keeps running values a thread, and stores one partial result; the
                    last program of a channel block to finish combines them, always in the same order
    bytes an element (16 bits)  statistics 2 read; apply 2 read + 2 written; sums 4 read (2 with a head); backward apply
                    4 read + 2 written (2 + 2). No mask: its sign is that of w n + b, from the z that is read anyway
    paths           128-bit loads and stores where 8 divides C (channels-last) or S (contiguous), else by the element

Means and squares are Welford's within a thread and Chan's between them: no difference of large sums. There are no
atomic operations on floats; the ticket that tells the last program is an int32 a channel block, left at 0.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm_rows import (
    affine,
    combine_means,
    combine_statistics,
    normalised,
    per_channel,
    row_offsets,
    store_partial,
    upstream,
)
from .bias_act import activate, activation_code, sum_of, times_slope
from .philox import OPTIONS

MAX_SPLITS = 128  # runs of rows: the last program holds all their results at once
SINGLE_ROWS = 1024  # a channel's values up to which one program reads them twice in less time than a launch takes
REDUCING_TILE, APPLYING_TILE = 8192, 2048  # elements a program takes at a time

_PLAIN = ["rows", "channels", "spatial", "run", "splits"]


@triton.jit(do_not_specialize=_PLAIN)
def batch_norm_act_kernel(
    z,
    statistics,  # (2, C) float32: m, r
    partial,  # (splits, 2, C) float32
    tickets,
    rows,
    channels,
    spatial,
    run,  # rows of a run, a multiple of ROWS
    splits,
    eps,
    weight,  # this and the next three: with APPLY alone
    bias,
    out,
    slope,
    APPLY: tl.constexpr,  # one run is all rows: the program goes on to apply what it found
    ACTIVATION: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    EIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The statistics of one channel block over one run of rows; the last program makes those over all."""
    split = tl.program_id(0)
    block = tl.program_id(1)
    start = split * run
    stop = tl.minimum(rows, start + run)
    mean = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    square = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    seen = 1.0
    for first_row in range(start, stop, ROWS):
        at, _, inside = row_offsets(first_row, block, rows, channels, spatial, CHANNELS_INNER, EIGHTS, ROWS, COLUMNS)
        value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
        away = value - mean
        # A thread's missing rows come last: until then it has seen as many as all.
        mean += tl.where(inside, away * (1.0 / seen), 0.0)
        square += tl.where(inside, away * (value - mean), 0.0)
        seen += 1.0
    lane = tl.expand_dims(tl.arange(0, ROWS), 1)
    count = tl.maximum((stop - start - lane + ROWS - 1) // ROWS, 0).to(tl.float32)
    run_mean = sum_of(mean * count, 0) / (stop - start).to(tl.float32)
    away = mean - tl.expand_dims(run_mean, 0)
    run_square = sum_of(square + count * away * away, 0)
    if APPLY:
        WHOLE: tl.constexpr = CHANNELS_INNER and EIGHTS
        scale = 1.0 / tl.sqrt_rn(run_square / rows.to(tl.float32) + eps)
        own = block * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(statistics + own, run_mean, mask=own < channels)
        tl.store(statistics + channels + own, scale, mask=own < channels)
        for first_row in range(0, rows, ROWS):
            at, _, inside = row_offsets(
                first_row, block, rows, channels, spatial, CHANNELS_INNER, EIGHTS, ROWS, COLUMNS
            )
            value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            normal = (value - tl.expand_dims(run_mean, 0)) * tl.expand_dims(scale, 0)
            value = affine(normal, weight, bias, block, channels, WHOLE, COLUMNS)
            tl.store(out + at, activate(value, slope, ACTIVATION).to(out.dtype.element_ty), mask=inside)
    else:
        store_partial(partial, run_mean, run_square, split, block, channels, COLUMNS)
        combine_statistics(statistics, partial, tickets, block, rows, channels, run, splits, eps, SPLITS, COLUMNS)


@triton.jit(do_not_specialize=_PLAIN)
def batch_norm_act_apply_kernel(
    z,
    statistics,
    weight,
    bias,
    out,
    rows,
    channels,
    spatial,
    slope,
    ACTIVATION: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    EIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    WHOLE: tl.constexpr = CHANNELS_INNER and EIGHTS
    blocks = (channels + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) - tile * blocks
    at, _, inside = row_offsets(tile * ROWS, block, rows, channels, spatial, CHANNELS_INNER, EIGHTS, ROWS, COLUMNS)
    normal = normalised(tl.load(z + at, mask=inside, other=0.0), statistics, block, channels, WHOLE, COLUMNS)
    value = affine(normal, weight, bias, block, channels, WHOLE, COLUMNS)
    tl.store(out + at, activate(value, slope, ACTIVATION).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_PLAIN)
def batch_norm_act_sums_kernel(
    grad,
    z,
    statistics,
    weight,
    bias,
    head,
    means,  # (2, C) float32: mean d, mean d n
    partial,
    tickets,
    rows,
    channels,
    spatial,
    run,
    splits,
    slope,
    out,  # with APPLY alone
    APPLY: tl.constexpr,  # as in batch_norm_act_kernel
    HEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    EIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The two means that the gradient through the statistics takes, as the statistics themselves are made."""
    WHOLE: tl.constexpr = CHANNELS_INNER and EIGHTS
    split = tl.program_id(0)
    block = tl.program_id(1)
    start = split * run
    stop = tl.minimum(rows, start + run)
    sum_d = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    sum_dn = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    for first_row in range(start, stop, ROWS):
        at, here, inside = row_offsets(first_row, block, rows, channels, spatial, CHANNELS_INNER, EIGHTS, ROWS, COLUMNS)
        normal = normalised(tl.load(z + at, mask=inside, other=0.0), statistics, block, channels, WHOLE, COLUMNS)
        value = affine(normal, weight, bias, block, channels, WHOLE, COLUMNS)
        d = times_slope(upstream(grad, head, at, here, inside, HEAD), value, slope, ACTIVATION)
        sum_d += d  # what does not exist has no upstream
        sum_dn += d * normal
    total = rows.to(tl.float32)
    if APPLY:
        mean_d, mean_dn = tl.expand_dims(sum_of(sum_d, 0) / total, 0), tl.expand_dims(sum_of(sum_dn, 0) / total, 0)
        for first_row in range(0, rows, ROWS):
            at, here, inside = row_offsets(
                first_row, block, rows, channels, spatial, CHANNELS_INNER, EIGHTS, ROWS, COLUMNS
            )
            normal = normalised(tl.load(z + at, mask=inside, other=0.0), statistics, block, channels, WHOLE, COLUMNS)
            value = affine(normal, weight, bias, block, channels, WHOLE, COLUMNS)
            d = times_slope(upstream(grad, head, at, here, inside, HEAD), value, slope, ACTIVATION)
            scale = per_channel(statistics + channels, block, channels, WHOLE, COLUMNS)
            result = (d - mean_d - normal * mean_dn) * (scale * per_channel(weight, block, channels, WHOLE, COLUMNS))
            tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    else:
        store_partial(partial, sum_of(sum_d, 0), sum_of(sum_dn, 0), split, block, channels, COLUMNS)
        combine_means(means, partial, tickets, block, total, channels, splits, SPLITS, COLUMNS)


@triton.jit(do_not_specialize=_PLAIN)
def batch_norm_act_backward_kernel(
    grad,
    z,
    statistics,
    weight,
    bias,
    head,
    means,
    out,
    rows,
    channels,
    spatial,
    slope,
    HEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    EIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    WHOLE: tl.constexpr = CHANNELS_INNER and EIGHTS
    blocks = (channels + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // blocks
    block = tl.program_id(0) - tile * blocks
    at, here, inside = row_offsets(tile * ROWS, block, rows, channels, spatial, CHANNELS_INNER, EIGHTS, ROWS, COLUMNS)
    normal = normalised(tl.load(z + at, mask=inside, other=0.0), statistics, block, channels, WHOLE, COLUMNS)
    value = affine(normal, weight, bias, block, channels, WHOLE, COLUMNS)
    d = times_slope(upstream(grad, head, at, here, inside, HEAD), value, slope, ACTIVATION)
    centred = d - per_channel(means, block, channels, WHOLE, COLUMNS)
    centred -= normal * per_channel(means + channels, block, channels, WHOLE, COLUMNS)
    scale = per_channel(statistics + channels, block, channels, WHOLE, COLUMNS)
    result = centred * (scale * per_channel(weight, block, channels, WHOLE, COLUMNS))
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)


def _geometry(z: Tensor, applied: bool) -> tuple[dict[str, int], dict[str, object], int, bool]:
    """(sizes, layout constants, columns of a tile, whether a program has all rows and applies what it finds)."""
    samples, channels = z.shape[0], z.shape[1]
    spatial = z.numel() // (samples * channels)
    inner = not z.is_contiguous() or spatial == 1
    if samples * spatial >= 2**31 - REDUCING_TILE or channels * spatial >= 2**31:
        raise ValueError(f"batch_norm_act: a channel must have fewer than 2**31 values, got shape {tuple(z.shape)}")
    single = applied and samples * spatial <= SINGLE_ROWS
    # Channels-last: 64 bytes of a row at 16 bits, so that a few channels make several blocks; 32 for a single program.
    columns = min(8 if not inner else 16 if single else 32, triton.next_power_of_2(channels))
    eights = (channels if inner else spatial) % 8 == 0 and (columns % 8 == 0 or not inner)
    sizes = {"rows": samples * spatial, "channels": channels, "spatial": spatial}
    return sizes, {"CHANNELS_INNER": inner, "EIGHTS": eights, "COLUMNS": columns}, columns, single


def _runs(rows: int, tile_rows: int) -> tuple[int, int]:
    """(rows of a run, how many runs), none empty."""
    tiles = triton.cdiv(rows, tile_rows)
    per_run = triton.cdiv(tiles, MAX_SPLITS)
    return per_run * tile_rows, triton.cdiv(tiles, per_run)


def batch_norm_act(
    z: Tensor,  # (N, C, *spatial), contiguous or channels-last
    weight: Tensor,  # (C,) float32
    bias: Tensor,
    out: Tensor | None,  # as z; None: the statistics alone
    statistics: Tensor,  # (2, C) float32
    tickets: Tensor,  # int32, one a channel or more, zeros; zeros again afterwards
    *,
    activation: str,
    slope: float = 0.0,
    eps: float = 1e-5,
) -> None:
    """statistics <- (m, r) of z, and out <- a(weight (z - m) r + bias)."""
    sizes, layout, columns, single = _geometry(z, out is not None)
    blocks = triton.cdiv(z.shape[1], columns)
    reducing = REDUCING_TILE // columns
    run, splits = (sizes["rows"], 1) if single else _runs(sizes["rows"], reducing)
    partial = statistics if single else torch.empty(splits, 2, z.shape[1], dtype=torch.float32, device=z.device)
    shared = {
        "z": z, "statistics": statistics, "weight": weight, "bias": bias, **sizes, "slope": float(slope),
        "ACTIVATION": activation_code(activation, slope), **layout,
    }  # fmt: skip
    with torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext():
        batch_norm_act_kernel[splits, blocks](
            **shared, out=out if single else z, partial=partial, tickets=tickets, run=run, splits=splits,
            eps=float(eps), APPLY=single, ROWS=reducing, SPLITS=MAX_SPLITS, num_warps=8, **OPTIONS,
        )  # fmt: skip
        if out is None or single:
            return
        applying = APPLYING_TILE // columns
        batch_norm_act_apply_kernel[triton.cdiv(sizes["rows"], applying) * blocks,](
            **shared, out=out, ROWS=applying, num_warps=4, **OPTIONS
        )


def batch_norm_act_backward(
    grad: Tensor | None,  # as z; None with a head
    z: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    head: Tensor | None,  # (C * S,) float32, in the order of a sample's memory
    out: Tensor,  # as z; may be grad
    tickets: Tensor,
    *,
    activation: str,
    slope: float = 0.0,
) -> None:
    """out <- dE/dz, through the statistics too."""
    sizes, layout, columns, single = _geometry(z, True)
    blocks = triton.cdiv(z.shape[1], columns)
    reducing = REDUCING_TILE // 2 // columns  # two tensors are read
    run, splits = (sizes["rows"], 1) if single else _runs(sizes["rows"], reducing)
    partial = torch.empty(splits, 2, z.shape[1], dtype=torch.float32, device=z.device)
    means = torch.empty(2, z.shape[1], dtype=torch.float32, device=z.device)
    upstream_of = {"grad": z if grad is None else grad, "head": z if head is None else head}
    shared = {
        "z": z, "statistics": statistics, "weight": weight, "bias": bias, "means": means, **upstream_of, **sizes,
        "slope": float(slope), "HEAD": head is not None, "ACTIVATION": activation_code(activation, slope), **layout,
    }  # fmt: skip
    with torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext():
        batch_norm_act_sums_kernel[splits, blocks](
            **shared, out=out, partial=partial, tickets=tickets, run=run, splits=splits, APPLY=single, ROWS=reducing,
            SPLITS=MAX_SPLITS, num_warps=8, **OPTIONS,
        )  # fmt: skip
        if single:
            return
        applying = APPLYING_TILE // columns
        batch_norm_act_backward_kernel[triton.cdiv(sizes["rows"], applying) * blocks,](
            **shared, out=out, ROWS=applying, num_warps=4, **OPTIONS
        )
