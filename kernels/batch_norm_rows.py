"""What batch_norm_act's kernels share: where rows and channels lie, the norm of a channel, and partial results that the
last program of a channel block combines."""

from __future__ import annotations

import triton
import triton.language as tl

from .bias_act import sum_of


@triton.jit
def row_offsets(
    first_row,
    block,
    rows,
    channels,
    spatial,
    CHANNELS_INNER: tl.constexpr,
    EIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(offsets in the tensor, offsets in a sample, which exist), each (ROWS, COLUMNS): rows down, channels across."""
    row = first_row + tl.expand_dims(tl.arange(0, ROWS), 1)
    channel = block * COLUMNS + tl.expand_dims(tl.arange(0, COLUMNS), 0)
    sample = row // spatial
    site = row - sample * spatial
    if CHANNELS_INNER:
        here = site * channels + channel
    else:
        here = channel * spatial + site
    at = sample.to(tl.int64) * (channels * spatial) + here
    inside = (row < rows) & (channel < channels)
    if EIGHTS:
        # What the launcher knows and the compiler cannot: eights are whole.
        if CHANNELS_INNER:
            inside = (row < rows) & ((channel // 8) < (channels // 8))
            at = tl.max_contiguous(tl.multiple_of(at, (1, 8)), (1, 8))
            here = tl.max_contiguous(tl.multiple_of(here, (1, 8)), (1, 8))
        else:
            inside = (tl.max_constancy(row // 8, (8, 1)) < (rows // 8)) & (channel < channels)
            at = tl.max_contiguous(tl.multiple_of(at, (8, 1)), (8, 1))
            here = tl.max_contiguous(tl.multiple_of(here, (8, 1)), (8, 1))
    return at, here, inside


@triton.jit
def per_channel(values, block, channels, WHOLE: tl.constexpr, COLUMNS: tl.constexpr):
    """(1, COLUMNS) of a (C,) vector; by vectors with WHOLE, where 8 divides C."""
    channel = block * COLUMNS + tl.expand_dims(tl.arange(0, COLUMNS), 0)
    if WHOLE:
        return tl.load(values + channel, mask=(channel // 8) < (channels // 8), other=0.0)
    else:
        return tl.load(values + channel, mask=channel < channels, other=0.0)


@triton.jit
def store_partial(partial, first, second, split, block, channels, COLUMNS: tl.constexpr):
    """Keep this program's two results a channel: partial (splits, 2, C)."""
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    at = partial + split * (2 * channels) + channel
    tl.store(at, first, mask=channel < channels)
    tl.store(at + channels, second, mask=channel < channels)


@triton.jit
def is_last_program(tickets, block, splits):
    """Whether every other program of the channel block has left its results, and this one sees them."""
    tl.debug_barrier()  # every thread's stores before the one thread's ticket
    ticket = tl.atomic_add(tickets + block, 1, sem="acq_rel")
    return ticket == splits - 1


@triton.jit
def load_partials(partial, which, block, channels, splits, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """(SPLITS, COLUMNS): one of the two results of every run, 0 where there is none."""
    channel = block * COLUMNS + tl.expand_dims(tl.arange(0, COLUMNS), 0)
    split = tl.expand_dims(tl.arange(0, SPLITS), 1)
    at = partial + split * (2 * channels) + which * channels + channel
    # Past L1: other programs wrote them.
    return tl.load(at, mask=(split < splits) & (channel < channels), other=0.0, cache_modifier=".cg")


@triton.jit
def combine_statistics(statistics, partial, tickets, block, rows, channels, run, splits, eps, SPLITS: tl.constexpr,
                       COLUMNS: tl.constexpr):  # fmt: skip
    """The last program of a channel block makes the statistics of all runs."""
    if is_last_program(tickets, block, splits):
        means = load_partials(partial, 0, block, channels, splits, SPLITS, COLUMNS)
        squares = load_partials(partial, 1, block, channels, splits, SPLITS, COLUMNS)
        index = tl.expand_dims(tl.arange(0, SPLITS), 1)
        counts = tl.minimum(tl.maximum(rows - index * run, 0), run).to(tl.float32)
        total = rows.to(tl.float32)
        whole_mean = sum_of(means * counts, 0) / total
        apart = means - tl.expand_dims(whole_mean, 0)
        variance = sum_of(squares + counts * apart * apart, 0) / total
        channel = block * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(statistics + channel, whole_mean, mask=channel < channels)
        tl.store(statistics + channels + channel, 1.0 / tl.sqrt_rn(variance + eps), mask=channel < channels)
        tl.store(tickets + block, 0)


@triton.jit
def combine_means(means, partial, tickets, block, total, channels, splits, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """The last program of a channel block makes the means over all runs."""
    if is_last_program(tickets, block, splits):
        channel = block * COLUMNS + tl.arange(0, COLUMNS)
        for which in tl.static_range(2):
            part = sum_of(load_partials(partial, which, block, channels, splits, SPLITS, COLUMNS), 0) / total
            tl.store(means + which * channels + channel, part, mask=channel < channels)
        tl.store(tickets + block, 0)


@triton.jit
def normalised(z, statistics, block, channels, WHOLE: tl.constexpr, COLUMNS: tl.constexpr):
    """n = (z - m) r."""
    mean = per_channel(statistics, block, channels, WHOLE, COLUMNS)
    scale = per_channel(statistics + channels, block, channels, WHOLE, COLUMNS)
    return (z.to(tl.float32) - mean) * scale


@triton.jit
def affine(normal, weight, bias, block, channels, WHOLE: tl.constexpr, COLUMNS: tl.constexpr):
    """w n + b: the same bits, and so the same sign, forward and back."""
    w = tl.broadcast_to(per_channel(weight, block, channels, WHOLE, COLUMNS), normal.shape)
    return tl.fma(normal, w, tl.broadcast_to(per_channel(bias, block, channels, WHOLE, COLUMNS), normal.shape))


@triton.jit
def upstream(grad, head, at, here, inside, HEAD: tl.constexpr):
    if HEAD:
        return tl.load(head + here, mask=inside, other=0.0)
    else:
        return tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
