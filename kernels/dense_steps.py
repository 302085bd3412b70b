"""dense_chain's kernel: its formula, layout and mapping are in `dense_chain`, its layers in `dense_layers`, and those
with batch statistics in `dense_statistics`."""

from __future__ import annotations

import triton
import triton.language as tl

from .dense_layers import first_layer, layer_backward, layer_forward, product, store_hidden, tile_barrier, top_gradient
from .dense_statistics import finish_forward, hold, normalised_backward, normalised_forward
from .edge_step import note_bad, step_number
from .langevin_step import bounded, drifted, tabled
from .philox import box_muller, counter_words, philox, seed_words

_PLAIN = [
    "depth1",
    "depth2",
    "depth3",
    "depth4",
    "samples",
    "steps",
    "seed",
    "seed_high",
    "first_sample",
    "step",
    "stream",
]


@triton.jit(do_not_specialize=_PLAIN)
def dense_chain_kernel(
    x,
    mask,
    bad_step,
    weight1,
    weight2,
    weight3,
    weight4,
    bias1,
    bias2,
    bias3,
    bias4,
    gain1,
    gain2,
    gain3,
    gain4,
    head,
    scratch,  # (tiles, 3 ROWS (P_1 + … + P_L)), the weights' dtype: h, v (or n) and g of every layer
    raw,  # (programs, ROWS, columns of one) float32: u, then g_v, of the layer at hand
    rates,  # (tiles, P_1 + … + P_L) float32: r
    partial,  # (2 L, tiles, 2, STRIDE) float32: what each tile's samples add to the statistics, up and down
    arrived,  # (tiles,) int64, zeros
    met,  # () int64, zero
    samples,
    steps,
    depth1,  # P1 … P4 once more
    depth2,
    depth3,
    depth4,
    scale,
    slope1,
    slope2,
    slope3,
    slope4,
    eps1,
    eps2,
    eps3,
    eps4,
    drift,  # a number, or with TABLE the address of drift, noise_std and 1/sigma^2, of all steps or of each
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
    NOISY: tl.constexpr,
    SCALE_ON_DEVICE: tl.constexpr,
    CLIP: tl.constexpr,
    CLAMP_LO: tl.constexpr,
    CLAMP_HI: tl.constexpr,
    MASKED: tl.constexpr,
    NOTING: tl.constexpr,
    TABLE: tl.constexpr,  # 0: none, 1: one for all steps, 2: by step
    LAYERS: tl.constexpr,
    ELEMENTS: tl.constexpr,  # D_0
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,  # 0 where there is no such layer, as P3 and P4
    P3: tl.constexpr,
    P4: tl.constexpr,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    ACT3: tl.constexpr,
    ACT4: tl.constexpr,
    SITES1: tl.constexpr,  # pixels of a channel of a layer with batch statistics, else 0
    SITES2: tl.constexpr,
    SITES3: tl.constexpr,
    SITES4: tl.constexpr,
    IN: tl.constexpr,  # P0 as a power of two
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIDE: tl.constexpr,  # columns of the widest layer with statistics, 0 without any
    TILES: tl.constexpr,
):
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    tiles = tl.num_programs(0) // SPLIT
    arrived += tile
    total: tl.constexpr = P1 + P2 + P3 + P4
    h1 = scratch + tile.to(tl.int64) * (3 * ROWS * total)
    h2 = h1 + ROWS * P1
    h3 = h2 + ROWS * P2
    h4 = h3 + ROWS * P3
    raw += tl.program_id(0).to(tl.int64) * (((STRIDE // WIDTH + SPLIT - 1) // SPLIT) * ROWS * WIDTH)
    rates += tile.to(tl.int64) * total
    sums = tiles * (2 * STRIDE)  # of a layer and direction
    v1, v2, v3, v4 = h1 + ROWS * total, h2 + ROWS * total, h3 + ROWS * total, h4 + ROWS * total
    g1, g2, g3, g4 = v1 + ROWS * total, v2 + ROWS * total, v3 + ROWS * total, v4 + ROWS * total

    n = tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    element = tl.expand_dims(tl.arange(0, IN), 0)
    inside = tl.expand_dims(n < samples, 1) & (element < ELEMENTS)
    at = tl.expand_dims(n * ELEMENTS, 1) + element
    state = tl.load(x + at, mask=inside, other=0.0)
    if MASKED:
        free = tl.load(mask + at, mask=inside, other=0) != 0
    number = step_number(step, STEP_ON_DEVICE)
    if SCALE_ON_DEVICE:
        scale = tl.load(scale)
    inv_scale = tl.div_rn(1.0, scale)
    safe_n = tl.minimum(n, samples - 1)
    if NOISY:
        k0, k1 = seed_words(seed, seed_high, SEED_ON_DEVICE)
        sample, _, sample_fits = counter_words(first_sample, 0 * stream, safe_n, FIRST_SAMPLE_FROM, False)
        sample = tl.expand_dims(sample, 1)
        quad = tl.expand_dims(tl.arange(0, IN // 4), 0).to(tl.uint32)

    for k in range(steps):
        for block in range(part, P1 // WIDTH, SPLIT):
            values = first_layer(state, weight1, block * WIDTH, IN, P0, WIDTH)
            if SITES1 > 0:
                hold(values, raw, partial, samples, tile, block, part, SITES1, STRIDE, SPLIT, ROWS, WIDTH)
            elif LAYERS == 1:
                top_gradient(values, bias1, head, scale, slope1, block * WIDTH, g1, P1, ACT1, ROWS, WIDTH)
            else:
                store_hidden(values, bias1, slope1, block * WIDTH, h1, v1, P1, ACT1, ROWS, WIDTH)
        if SITES1 > 0:
            finish_forward(
                raw, partial, partial + sums, rates, gain1, bias1, head, scale, slope1, eps1, h1, v1, g1, met, samples,
                tile, part, tiles, P1, SITES1, LAYERS == 1, ACT1, STRIDE, SPLIT, ROWS, TILES, WIDTH,
            )  # fmt: skip
        tile_barrier(arrived, SPLIT)
        if LAYERS >= 2:
            if SITES2 > 0:
                normalised_forward(
                    h1, weight2, partial + 2 * sums, partial + 3 * sums, raw, rates + P1, gain2, bias2, head,
                    scale, slope2, eps2, h2, v2, g2, met, samples, tile, part, tiles, depth1, P1, P2, SITES2,
                    LAYERS == 2, ACT2, STRIDE, SPLIT, ROWS, TILES, WIDTH, CHUNK,
                )  # fmt: skip
            else:
                layer_forward(h1, weight2, bias2, head, scale, slope2, h2, v2, g2, part, depth1, P1, P2, LAYERS == 2,
                              ACT2, SPLIT, ROWS, WIDTH, CHUNK)  # fmt: skip
            tile_barrier(arrived, SPLIT)
        if LAYERS >= 3:
            if SITES3 > 0:
                normalised_forward(
                    h2, weight3, partial + 4 * sums, partial + 5 * sums, raw, rates + (P1 + P2), gain3, bias3, head,
                    scale, slope3, eps3, h3, v3, g3, met, samples, tile, part, tiles, depth2, P2, P3, SITES3,
                    LAYERS == 3, ACT3, STRIDE, SPLIT, ROWS, TILES, WIDTH, CHUNK,
                )  # fmt: skip
            else:
                layer_forward(h2, weight3, bias3, head, scale, slope3, h3, v3, g3, part, depth2, P2, P3, LAYERS == 3,
                              ACT3, SPLIT, ROWS, WIDTH, CHUNK)  # fmt: skip
            tile_barrier(arrived, SPLIT)
        if LAYERS >= 4:
            if SITES4 > 0:
                normalised_forward(
                    h3, weight4, partial + 6 * sums, partial + 7 * sums, raw, rates + (P1 + P2 + P3), gain4, bias4,
                    head, scale, slope4, eps4, h4, v4, g4, met, samples, tile, part, tiles, depth3, P3, P4, SITES4,
                    LAYERS == 4, ACT4, STRIDE, SPLIT, ROWS, TILES, WIDTH, CHUNK,
                )  # fmt: skip
            else:
                layer_forward(h3, weight4, bias4, head, scale, slope4, h4, v4, g4, part, depth3, P3, P4, LAYERS == 4,
                              ACT4, SPLIT, ROWS, WIDTH, CHUNK)  # fmt: skip
            tile_barrier(arrived, SPLIT)
        if LAYERS >= 4:
            if SITES3 > 0:
                normalised_backward(
                    g4, weight4, partial + 5 * sums, raw, rates + (P1 + P2), gain3, bias3, slope3, v3, g3, met,
                    samples, tile, part, tiles, depth4, P4, P3, SITES3, ACT3, STRIDE, SPLIT, ROWS, TILES, WIDTH, CHUNK,
                )  # fmt: skip
            else:
                layer_backward(g4, weight4, v3, g3, slope3, part, depth4, P4, P3, ACT3, SPLIT, ROWS, WIDTH, CHUNK)
            tile_barrier(arrived, SPLIT)
        if LAYERS >= 3:
            if SITES2 > 0:
                normalised_backward(
                    g3, weight3, partial + 3 * sums, raw, rates + P1, gain2, bias2, slope2, v2, g2, met, samples,
                    tile, part, tiles, depth3, P3, P2, SITES2, ACT2, STRIDE, SPLIT, ROWS, TILES, WIDTH, CHUNK,
                )  # fmt: skip
            else:
                layer_backward(g3, weight3, v2, g2, slope2, part, depth3, P3, P2, ACT2, SPLIT, ROWS, WIDTH, CHUNK)
            tile_barrier(arrived, SPLIT)
        if LAYERS >= 2:
            if SITES1 > 0:
                normalised_backward(
                    g2, weight2, partial + sums, raw, rates, gain1, bias1, slope1, v1, g1, met, samples,
                    tile, part, tiles, depth2, P2, P1, SITES1, ACT1, STRIDE, SPLIT, ROWS, TILES, WIDTH, CHUNK,
                )  # fmt: skip
            else:
                layer_backward(g2, weight2, v1, g1, slope1, part, depth2, P2, P1, ACT1, SPLIT, ROWS, WIDTH, CHUNK)
            tile_barrier(arrived, SPLIT)
        gradient = product(g1, weight1, 0, depth1, P1, P0, 1, P0, ROWS, IN, CHUNK) * inv_scale
        if LAYERS == 1:
            tl.debug_barrier()  # the next step writes g1 with no barrier in between

        if NOTING:
            note_bad(bad_step, gradient, inside, number)
        if TABLE:
            own_drift, own_noise_std, own_inv_variance = tabled(drift + (3 * k if TABLE == 2 else 0))
        else:
            own_drift, own_noise_std, own_inv_variance = drift, noise_std, inv_variance
        value = drifted(state, gradient, own_drift, own_inv_variance, reference_mean, grad_clamp, CLIP)
        if NOISY:
            w0, w1, w2, w3 = philox(quad, sample, number.to(tl.uint32), stream.to(tl.uint32), k0, k1)
            z0, z1 = box_muller(w0, w1)
            z2, z3 = box_muller(w2, w3)
            normal = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (ROWS, IN))
            fits = tl.broadcast_to(sample_fits, (ROWS,)) & ((number >> 32) == 0)
            std = tl.where(fits, own_noise_std, float("nan"))
            value = tl.fma(tl.broadcast_to(tl.expand_dims(std, 1), (ROWS, IN)), normal, value)
        value = bounded(value, clamp_lo, clamp_hi, CLAMP_LO, CLAMP_HI)
        if MASKED:
            value = tl.where(free, value, state)
        # Padding must stay 0: 0 times NaN would be NaN.
        state = tl.where(inside, value, 0.0)
        number += 1
    if part == 0:
        tl.store(x + at, state, mask=inside)
