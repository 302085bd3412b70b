"""Batch statistics in dense_chain's kernel: normalised layers, forward and backward, whose programs wait for those of
all tiles once a layer and direction.

    u = W h;  n = (u - m) r, r = 1 / sqrt(var(u) + eps);  v = gain n + bias;  h = a(v)
    g_v = g_h a'(v);  g_u = gain r (g_v - mean(g_v) - n mean(g_v n))

m, var and the means are of a channel: SITES columns in a row (1, 2, 4, 8 or 16), all samples. Each program leaves two
numbers of each of its channels over its tile's samples; behind the barrier of the grid every program combines those
that it needs, in one order.
`raw` (ROWS, columns of a program) float32 is u, and then g_v, from one side of that barrier to the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bias_act import activate, sum_of, times_slope
from .dense_layers import grid_barrier, product


@triton.jit
def existing_rows(samples, tile, ROWS: tl.constexpr):
    """How many samples a tile has."""
    return tl.minimum(tl.maximum(samples - tile * ROWS, 0), ROWS).to(tl.float32)


@triton.jit
def raw_at(raw, block, part, SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a program keeps one of its blocks of columns."""
    held = raw + ((block - part) // SPLIT) * (ROWS * WIDTH)
    return held + tl.expand_dims(tl.arange(0, ROWS), 1) * WIDTH + tl.expand_dims(tl.arange(0, WIDTH), 0)


@triton.jit
def over_channel(values, SITES: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(WIDTH // SITES,): sums of each channel's columns over the rows."""
    return sum_of(sum_of(tl.reshape(values, (ROWS, WIDTH // SITES, SITES)), 2), 0)


@triton.jit
def leave(one, other, partial, tile, first, SITES: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """This tile's two numbers a channel: partial (tiles, 2, STRIDE)."""
    at = partial + tile * (2 * STRIDE) + first // SITES + tl.arange(0, WIDTH // SITES)
    tl.store(at, one)
    tl.store(at + STRIDE, other)


@triton.jit
def left(partial, which, tile, first, tiles, SITES: tl.constexpr, STRIDE: tl.constexpr, TILES: tl.constexpr,
         WIDTH: tl.constexpr):  # fmt: skip
    """(TILES, WIDTH): of each column's channel what the tiles from `tile` on left, 0 where there is none."""
    at = tl.expand_dims(tile + tl.arange(0, TILES), 1)
    channel = tl.expand_dims((first + tl.arange(0, WIDTH)) // SITES, 0)
    inside = tl.broadcast_to(at < tiles, (TILES, WIDTH))
    return tl.load(partial + at * (2 * STRIDE) + which * STRIDE + channel, mask=inside, other=0.0,
                   cache_modifier=".cg")  # fmt: skip # past L1: other programs wrote them


@triton.jit
def hold(values, raw, partial, samples, tile, block, part, SITES: tl.constexpr, STRIDE: tl.constexpr,
         SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Keep u, and leave its means over the tile's samples and the sums of squares about them."""
    rows = existing_rows(samples, tile, ROWS)
    exists = tl.broadcast_to(tl.expand_dims(tl.arange(0, ROWS), 1).to(tl.float32) < rows, (ROWS, WIDTH))
    mean = over_channel(tl.where(exists, values, 0.0), SITES, ROWS, WIDTH) / (rows * SITES)
    whole = tl.reshape(values, (ROWS, WIDTH // SITES, SITES)) - tl.expand_dims(tl.expand_dims(mean, 0), 2)
    apart = tl.where(exists, tl.reshape(whole, (ROWS, WIDTH)), 0.0)
    leave(mean, over_channel(apart * apart, SITES, ROWS, WIDTH), partial, tile, block * WIDTH, SITES, STRIDE, WIDTH)
    tl.store(raw_at(raw, block, part, SPLIT, ROWS, WIDTH), values)


@triton.jit
def channel_statistics(partial, samples, first, tiles, eps, SITES: tl.constexpr, STRIDE: tl.constexpr,
                       ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """(m, r) of each column's channel, (WIDTH,) each."""
    total = samples.to(tl.float32)
    mean = tl.full((WIDTH,), 0.0, tl.float32)
    for tile in range(0, tiles, TILES):
        rows = tl.expand_dims(existing_rows(samples, tile + tl.arange(0, TILES), ROWS), 1)
        mean += sum_of(left(partial, 0, tile, first, tiles, SITES, STRIDE, TILES, WIDTH) * rows, 0)
    mean = mean / total
    squares = tl.full((WIDTH,), 0.0, tl.float32)
    for tile in range(0, tiles, TILES):
        rows = tl.expand_dims(existing_rows(samples, tile + tl.arange(0, TILES), ROWS), 1)
        apart = left(partial, 0, tile, first, tiles, SITES, STRIDE, TILES, WIDTH) - tl.expand_dims(mean, 0)
        within = left(partial, 1, tile, first, tiles, SITES, STRIDE, TILES, WIDTH)
        squares += sum_of(within + rows * SITES * apart * apart, 0)
    return mean, 1.0 / tl.sqrt_rn(squares / (total * SITES) + eps)


@triton.jit
def channel_means(partial, samples, first, tiles, SITES: tl.constexpr, STRIDE: tl.constexpr, TILES: tl.constexpr,
                  WIDTH: tl.constexpr):  # fmt: skip
    """The two sums of each column's channel over all samples, by their number, (WIDTH,) each."""
    one = tl.full((WIDTH,), 0.0, tl.float32)
    other = tl.full((WIDTH,), 0.0, tl.float32)
    for tile in range(0, tiles, TILES):
        one += sum_of(left(partial, 0, tile, first, tiles, SITES, STRIDE, TILES, WIDTH), 0)
        other += sum_of(left(partial, 1, tile, first, tiles, SITES, STRIDE, TILES, WIDTH), 0)
    total = samples.to(tl.float32) * SITES
    return one / total, other / total


@triton.jit
def affine_columns(normal, gain, bias, first, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """v = gain n + bias: the same bits forward and back."""
    column = first + tl.arange(0, WIDTH)
    weight = tl.broadcast_to(tl.expand_dims(tl.load(gain + column), 0), (ROWS, WIDTH))
    return tl.fma(normal, weight, tl.broadcast_to(tl.expand_dims(tl.load(bias + column), 0), (ROWS, WIDTH)))


@triton.jit
def leave_gradient(gradient, normal, raw, partial, samples, tile, block, part, SITES: tl.constexpr,
                   STRIDE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Keep g_v, and leave its sums and those of g_v n over the tile's samples."""
    exists = tl.expand_dims(tl.arange(0, ROWS), 1).to(tl.float32) < existing_rows(samples, tile, ROWS)
    gradient = tl.where(exists, gradient, 0.0)
    along = over_channel(tl.where(exists, gradient * normal, 0.0), SITES, ROWS, WIDTH)
    leave(over_channel(gradient, SITES, ROWS, WIDTH), along, partial, tile, block * WIDTH, SITES, STRIDE, WIDTH)
    tl.store(raw_at(raw, block, part, SPLIT, ROWS, WIDTH), gradient)


@triton.jit
def normalise(raw, partial, below, rates, gain, bias, head, scale, slope, eps, h, n, samples, tile, part, tiles,
              OUT: tl.constexpr, SITES: tl.constexpr, TOP: tl.constexpr, ACTIVATION: tl.constexpr,
              STRIDE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
              WIDTH: tl.constexpr):  # fmt: skip
    """Behind the barrier: this program's columns of n and h = a(v); of the top layer n, and g_v and its sums, which go
    to `below`, another place than those that other programs may still be reading."""
    for block in range(part, OUT // WIDTH, SPLIT):
        first = block * WIDTH
        mean, rate = channel_statistics(partial, samples, first, tiles, eps, SITES, STRIDE, ROWS, TILES, WIDTH)
        tl.store(rates + first + tl.arange(0, WIDTH), rate)
        values = tl.load(raw_at(raw, block, part, SPLIT, ROWS, WIDTH))
        normal = (values - tl.expand_dims(mean, 0)) * tl.expand_dims(rate, 0)
        at = tl.expand_dims(tl.arange(0, ROWS), 1) * OUT + tl.expand_dims(first + tl.arange(0, WIDTH), 0)
        tl.store(n + at, normal.to(n.dtype.element_ty))
        # As it is read back, so that the way back takes the same branch of the activation.
        normal = normal.to(n.dtype.element_ty).to(tl.float32)
        value = affine_columns(normal, gain, bias, first, ROWS, WIDTH)
        if TOP:
            tl.debug_barrier()  # what all threads have read of raw is written again
            top = tl.expand_dims(tl.load(head + first + tl.arange(0, WIDTH)) * scale, 0)
            gradient = times_slope(tl.broadcast_to(top, (ROWS, WIDTH)), value, slope, ACTIVATION)
            leave_gradient(gradient, normal, raw, below, samples, tile, block, part, SITES, STRIDE, SPLIT, ROWS, WIDTH)
        else:
            tl.store(h + at, activate(value, slope, ACTIVATION).to(h.dtype.element_ty))


@triton.jit
def return_gradient(sums, n, gain, bias, slope, raw, partial, samples, tile, block, part, OUT: tl.constexpr,
                    SITES: tl.constexpr, ACTIVATION: tl.constexpr, STRIDE: tl.constexpr, SPLIT: tl.constexpr,
                    ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """g_v of g_h of a normalised layer, and its sums."""
    first = block * WIDTH
    at = tl.expand_dims(tl.arange(0, ROWS), 1) * OUT + tl.expand_dims(first + tl.arange(0, WIDTH), 0)
    normal = tl.load(n + at).to(tl.float32)
    value = affine_columns(normal, gain, bias, first, ROWS, WIDTH)
    gradient = times_slope(sums, value, slope, ACTIVATION)
    leave_gradient(gradient, normal, raw, partial, samples, tile, block, part, SITES, STRIDE, SPLIT, ROWS, WIDTH)


@triton.jit
def through_statistics(raw, partial, rates, gain, n, g, samples, part, tiles, OUT: tl.constexpr,
                       SITES: tl.constexpr, STRIDE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr,
                       TILES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Behind the barrier: this program's columns of g_u."""
    for block in range(part, OUT // WIDTH, SPLIT):
        first = block * WIDTH
        column = first + tl.arange(0, WIDTH)
        mean, along = channel_means(partial, samples, first, tiles, SITES, STRIDE, TILES, WIDTH)
        at = tl.expand_dims(tl.arange(0, ROWS), 1) * OUT + tl.expand_dims(column, 0)
        normal = tl.load(n + at).to(tl.float32)
        gradient = tl.load(raw_at(raw, block, part, SPLIT, ROWS, WIDTH))
        factor = tl.load(gain + column) * tl.load(rates + column)
        apart = gradient - tl.expand_dims(mean, 0) - normal * tl.expand_dims(along, 0)
        tl.store(g + at, (tl.expand_dims(factor, 0) * apart).to(g.dtype.element_ty))


@triton.jit
def finish_forward(raw, sums_up, sums_down, rates, gain, bias, head, scale, slope, eps, h, n, g, met, samples, tile,
                   part, tiles, OUT: tl.constexpr, SITES: tl.constexpr, TOP: tl.constexpr, ACTIVATION: tl.constexpr,
                   STRIDE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
                   WIDTH: tl.constexpr):  # fmt: skip
    """A normalised layer from u on, which `hold` kept: h, and of the top layer g_u."""
    grid_barrier(met, tiles * SPLIT)
    normalise(raw, sums_up, sums_down, rates, gain, bias, head, scale, slope, eps, h, n, samples, tile, part, tiles,
              OUT, SITES, TOP, ACTIVATION, STRIDE, SPLIT, ROWS, TILES, WIDTH)  # fmt: skip
    if TOP:
        grid_barrier(met, tiles * SPLIT)
        through_statistics(raw, sums_down, rates, gain, n, g, samples, part, tiles, OUT, SITES, STRIDE, SPLIT, ROWS,
                           TILES, WIDTH)  # fmt: skip


@triton.jit
def normalised_forward(h_below, weight, sums_up, sums_down, raw, rates, gain, bias, head, scale, slope, eps, h, n, g,
                       met, samples, tile, part, tiles, depth, BELOW: tl.constexpr, OUT: tl.constexpr,
                       SITES: tl.constexpr, TOP: tl.constexpr, ACTIVATION: tl.constexpr, STRIDE: tl.constexpr,
                       SPLIT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
                       CHUNK: tl.constexpr):  # fmt: skip
    """This program's columns of a normalised layer above the first."""
    for block in range(part, OUT // WIDTH, SPLIT):
        sums = product(h_below, weight, block * WIDTH, depth, BELOW, 1, BELOW, OUT, ROWS, WIDTH, CHUNK)
        hold(sums, raw, sums_up, samples, tile, block, part, SITES, STRIDE, SPLIT, ROWS, WIDTH)
    finish_forward(raw, sums_up, sums_down, rates, gain, bias, head, scale, slope, eps, h, n, g, met, samples, tile,
                   part, tiles, OUT, SITES, TOP, ACTIVATION, STRIDE, SPLIT, ROWS, TILES, WIDTH)  # fmt: skip


@triton.jit
def normalised_backward(above, weight, sums_down, raw, rates, gain, bias, slope, n, g, met, samples, tile, part, tiles,
                        depth, ABOVE: tl.constexpr, OUT: tl.constexpr, SITES: tl.constexpr, ACTIVATION: tl.constexpr,
                        STRIDE: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
                        WIDTH: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """This program's columns of g_u of a normalised layer below the top, from g_u of the layer above."""
    for block in range(part, OUT // WIDTH, SPLIT):
        sums = product(above, weight, block * WIDTH, depth, ABOVE, OUT, 1, OUT, ROWS, WIDTH, CHUNK)
        return_gradient(sums, n, gain, bias, slope, raw, sums_down, samples, tile, block, part, OUT, SITES,
                        ACTIVATION, STRIDE,                        SPLIT, ROWS, WIDTH)  # fmt: skip
    grid_barrier(met, tiles * SPLIT)
    through_statistics(raw, sums_down, rates, gain, n, g, samples, part, tiles, OUT, SITES, STRIDE, SPLIT, ROWS, TILES,
                       WIDTH)  # fmt: skip
