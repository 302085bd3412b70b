"""The layers of dense_chain's kernel, forward and backward, by tiles of samples and columns; what they store is private
to a tile's programs, which wait for each other at `tile_barrier`."""

from __future__ import annotations

import triton
import triton.language as tl

from .bias_act import activate, times_slope


@triton.jit
def grid_barrier(counter, programs):
    """Barrier over the `programs` that call it with the same counter, an int64 that is 0 at launch: what any of them
    stored before is seen by all of them after."""
    tl.debug_barrier()
    seen = tl.atomic_add(counter, 1, sem="acq_rel") + 1
    target = (seen + programs - 1) // programs * programs  # each arrives once a barrier
    while seen < target:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def tile_barrier(arrived, SPLIT: tl.constexpr):
    """Barrier over a tile's programs."""
    if SPLIT > 1:
        grid_barrier(arrived, SPLIT)
    else:
        tl.debug_barrier()


@triton.jit
def product(
    source,
    weight,
    first,
    depth,
    DEPTH: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    EXISTING: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """(ROWS, WIDTH) of source (ROWS, DEPTH) times the matrix at weight[k, n], columns first … first + WIDTH - 1."""
    row = tl.expand_dims(tl.arange(0, ROWS), 1)
    n = tl.expand_dims(first + tl.arange(0, WIDTH), 0)
    sums = tl.full((ROWS, WIDTH), 0.0, tl.float32)
    # depth is DEPTH, as a number of the launch: the compiler unrolls a bound that it knows, and runs out of registers.
    for start in range(0, depth, CHUNK):
        k = start + tl.arange(0, CHUNK)
        # Past L1: another program may have written it.
        value = tl.load(source + row * DEPTH + tl.expand_dims(k, 0), cache_modifier=".cg")
        at = weight + tl.expand_dims(k, 1) * STRIDE_K + n * STRIDE_N
        if EXISTING % WIDTH == 0:
            matrix = tl.load(at)
        else:
            matrix = tl.load(at, mask=tl.broadcast_to(n < EXISTING, (CHUNK, WIDTH)), other=0.0)
        sums = tl.dot(value, matrix, sums, input_precision="ieee")
    return sums


@triton.jit
def first_layer(x, weight, first, IN: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """x W^T for the first layer, x (ROWS, IN) float32: as high and low part where weights have 16 bits."""
    k = tl.expand_dims(tl.arange(0, IN), 1)
    n = tl.expand_dims(first + tl.arange(0, WIDTH), 0)
    at = weight + n * STRIDE + k
    if STRIDE % IN == 0:
        matrix = tl.load(at)
    else:
        matrix = tl.load(at, mask=tl.broadcast_to(k < STRIDE, (IN, WIDTH)), other=0.0)
    high = x.to(matrix.dtype)
    sums = tl.dot(high, matrix, input_precision="ieee")
    if matrix.dtype != tl.float32:
        low = (x - high.to(tl.float32)).to(matrix.dtype)
        sums = tl.dot(low, matrix, sums, input_precision="ieee")
    return sums


@triton.jit
def store_hidden(sums, bias, slope, first, h, v, OUT: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
                 WIDTH: tl.constexpr):  # fmt: skip
    """A hidden layer's columns: h = a(v), and v itself, or 1 and 0 where the backward pass needs its sign alone."""
    column = tl.expand_dims(first + tl.arange(0, WIDTH), 0)
    value = sums + tl.load(bias + column)
    at = tl.expand_dims(tl.arange(0, ROWS), 1) * OUT + column
    tl.store(h + at, activate(value, slope, ACTIVATION).to(h.dtype.element_ty))
    if ACTIVATION == 1 or ACTIVATION == 2:
        value = tl.where(value > 0.0, 1.0, 0.0)
    tl.store(v + at, value.to(v.dtype.element_ty))


@triton.jit
def top_gradient(sums, bias, head, scale, slope, first, g, OUT: tl.constexpr, ACTIVATION: tl.constexpr,
                 ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The top layer's columns, whose forward is needed for a' alone: g = scale head a'(v)."""
    column = tl.expand_dims(first + tl.arange(0, WIDTH), 0)
    value = sums + tl.load(bias + column)
    top = tl.broadcast_to(tl.load(head + column) * scale, (ROWS, WIDTH))
    at = tl.expand_dims(tl.arange(0, ROWS), 1) * OUT + column
    tl.store(g + at, times_slope(top, value, slope, ACTIVATION).to(g.dtype.element_ty))


@triton.jit
def layer_backward(above, weight, v, g, slope, part, depth, ABOVE: tl.constexpr, OUT: tl.constexpr,
                   ACTIVATION: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
                   CHUNK: tl.constexpr):  # fmt: skip
    """This program's columns of g = (above W) a'(v), W (ABOVE, OUT)."""
    for block in range(part, OUT // WIDTH, SPLIT):
        first = block * WIDTH
        sums = product(above, weight, first, depth, ABOVE, OUT, 1, OUT, ROWS, WIDTH, CHUNK)
        at = tl.expand_dims(tl.arange(0, ROWS), 1) * OUT + tl.expand_dims(first + tl.arange(0, WIDTH), 0)
        value = tl.load(v + at).to(tl.float32)
        tl.store(g + at, times_slope(sums, value, slope, ACTIVATION).to(g.dtype.element_ty))


@triton.jit
def layer_forward(h_below, weight, bias, head, scale, slope, h, v, g, part, depth, BELOW: tl.constexpr,
                  OUT: tl.constexpr, TOP: tl.constexpr, ACTIVATION: tl.constexpr, SPLIT: tl.constexpr,
                  ROWS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """This program's columns of a layer above the first."""
    for block in range(part, OUT // WIDTH, SPLIT):
        first = block * WIDTH
        sums = product(h_below, weight, first, depth, BELOW, 1, BELOW, OUT, ROWS, WIDTH, CHUNK)
        if TOP:
            top_gradient(sums, bias, head, scale, slope, first, g, OUT, ACTIVATION, ROWS, WIDTH)
        else:
            store_hidden(sums, bias, slope, first, h, v, OUT, ACTIVATION, ROWS, WIDTH)
