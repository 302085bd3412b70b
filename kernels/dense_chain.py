"""dense_chain: all K Langevin steps of a small net of up to four dense layers, x in place, in one launch.

    v_l = W_l h_{l-1} + b_l, h_l = a_l(v_l);   g_L = head a'(v_L), g_{l-1} = W_l^T g_l a'(v_{l-1});   x <- langevin_step

    x               (N, D_0) float32, contiguous; held in registers from the first step to the last
    weights         (P_l, P_{l-1}) float32 / float16 / bfloat16, padded with zeros to multiples of 64; sums float32.
                    16-bit nets take x as the sum of two such numbers, so that pixels of 0-255 keep their digits
    thread mapping  16 samples a tile. `split` programs share a tile, each making its part of every layer's columns; h,
                    v and g of the tile stand in a scratch that stays in L2, with a barrier after each layer. Every
                    program makes the gradient of x and the update whole, the same bits in each
    bytes           a program streams 2 sum_l P_l P_{l-1} / split weights from L2 a step; x is read and written once a
                    chain, noise costs no memory

With split = 1 the barrier is the block's own, and a step lasts as long as one SM takes to read all weights twice. With
more, programs wait for each other through a counter in memory: the launch is cooperative, so that a grid which does not
fit the GPU is refused rather than left to wait for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bias_act import activation_code
from .dense_layers import first_layer, layer_backward, layer_forward, product, store_hidden, tile_barrier, top_gradient
from .edge_step import note_bad, step_number
from .langevin_step import bounded, drifted, table_arguments, tabled
from .philox import OPTIONS, box_muller, counter_arguments, counter_words, philox, seed_words

SAMPLES, COLUMNS = 16, 64  # of a tile of samples, and of a layer at a time; widths are multiples of COLUMNS

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
    head,
    scratch,  # (tiles, 3 ROWS (P_1 + … + P_L)), the weights' dtype: h, v and g of every layer
    arrived,  # (tiles,) int32, zeros
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
    IN: tl.constexpr,  # P0 as a power of two
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    tile = tl.program_id(0) // SPLIT
    part = tl.program_id(0) % SPLIT
    arrived += tile
    target = SPLIT
    total: tl.constexpr = P1 + P2 + P3 + P4
    h1 = scratch + tile.to(tl.int64) * (3 * ROWS * total)
    h2 = h1 + ROWS * P1
    h3 = h2 + ROWS * P2
    h4 = h3 + ROWS * P3
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
            sums = first_layer(state, weight1, block * WIDTH, IN, P0, WIDTH)
            if LAYERS == 1:
                top_gradient(sums, bias1, head, scale, slope1, block * WIDTH, g1, P1, ACT1, ROWS, WIDTH)
            else:
                store_hidden(sums, bias1, slope1, block * WIDTH, h1, v1, P1, ACT1, ROWS, WIDTH)
        target = tile_barrier(arrived, target, SPLIT)
        if LAYERS >= 2:
            layer_forward(h1, weight2, bias2, head, scale, slope2, h2, v2, g2, part, depth1, P1, P2, LAYERS == 2, ACT2,
                          SPLIT, ROWS, WIDTH, CHUNK)  # fmt: skip
            target = tile_barrier(arrived, target, SPLIT)
        if LAYERS >= 3:
            layer_forward(h2, weight3, bias3, head, scale, slope3, h3, v3, g3, part, depth2, P2, P3, LAYERS == 3, ACT3,
                          SPLIT, ROWS, WIDTH, CHUNK)  # fmt: skip
            target = tile_barrier(arrived, target, SPLIT)
        if LAYERS >= 4:
            layer_forward(h3, weight4, bias4, head, scale, slope4, h4, v4, g4, part, depth3, P3, P4, LAYERS == 4, ACT4,
                          SPLIT, ROWS, WIDTH, CHUNK)  # fmt: skip
            target = tile_barrier(arrived, target, SPLIT)
            layer_backward(g4, weight4, v3, g3, slope3, part, depth4, P4, P3, ACT3, SPLIT, ROWS, WIDTH, CHUNK)
            target = tile_barrier(arrived, target, SPLIT)
        if LAYERS >= 3:
            layer_backward(g3, weight3, v2, g2, slope2, part, depth3, P3, P2, ACT2, SPLIT, ROWS, WIDTH, CHUNK)
            target = tile_barrier(arrived, target, SPLIT)
        if LAYERS >= 2:
            layer_backward(g2, weight2, v1, g1, slope1, part, depth2, P2, P1, ACT1, SPLIT, ROWS, WIDTH, CHUNK)
            target = tile_barrier(arrived, target, SPLIT)
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


def dense_chain_(
    x: Tensor,  # (N, ...) float32, contiguous; updated in place
    weights: Sequence[Tensor],  # (P_l, P_{l-1}), one to four, padded to multiples of 64 with zeros
    biases: Sequence[Tensor],  # (P_l,) float32
    head: Tensor,  # (P_L,) float32
    *,
    activations: Sequence[str],
    slopes: Sequence[float],
    steps: int,
    scale: float | Tensor = 1.0,  # a tensor: 0-dim float32 on the device
    drift: float,
    noise_std: float,
    inv_variance: float = 0.0,
    reference_mean: float = 0.0,
    grad_clamp: float | None = None,
    clamp_lo: float | None = None,
    clamp_hi: float | None = None,
    table: Tensor | None = None,  # (K or 1, 1, 3) float32: before drift, noise_std and inv_variance
    mask: Tensor | None = None,  # bool, x's shape, contiguous
    bad_step: Tensor | None = None,
    split: int = 1,
    seed: int | Tensor = 0,
    first_sample: int | Tensor = 0,
    first_step: int | Tensor = 0,
    stream: int = 0,
) -> None:
    """`steps` Langevin steps of every chain, in place."""
    if x.numel() == 0 or steps == 0:
        return
    layers, samples = len(weights), x.shape[0]
    elements = x.numel() // samples
    if layers == 1:
        split = 1  # with only one barrier a step, one program could overwrite g1 while another still reads it
    sizes = [weights[0].shape[1], *(weight.shape[0] for weight in weights)]
    tiles = triton.cdiv(samples, SAMPLES)
    scratch = torch.empty(tiles * 3 * SAMPLES * sum(sizes[1:]), dtype=weights[0].dtype, device=x.device)
    arrived = torch.zeros(tiles if split > 1 else 1, dtype=torch.int32, device=x.device)
    pad = [weights[0]] * (4 - layers)
    codes = [activation_code(activation, slope) for activation, slope in zip(activations, slopes)]
    float32 = weights[0].dtype == torch.float32
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        dense_chain_kernel[tiles * split,](
            x,
            x if mask is None else mask.view(torch.uint8),
            x if bad_step is None else bad_step,
            *weights,
            *pad,
            *biases,
            *[biases[0]] * (4 - layers),
            head,
            scratch,
            arrived,
            samples,
            steps,
            *sizes[1:],
            *[0] * (4 - layers),
            scale if isinstance(scale, Tensor) else float(scale),
            *(float(slope) for slope in slopes),
            *[0.0] * (4 - layers),
            *table_arguments(drift, noise_std, inv_variance, table),
            float(reference_mean),
            0.0 if grad_clamp is None else float(grad_clamp),
            0.0 if clamp_lo is None else float(clamp_lo),
            0.0 if clamp_hi is None else float(clamp_hi),
            **counter_arguments(seed, first_sample, first_step, stream),
            NOISY=noise_std != 0,
            SCALE_ON_DEVICE=isinstance(scale, Tensor),
            CLIP=grad_clamp is not None,
            CLAMP_LO=clamp_lo is not None,
            CLAMP_HI=clamp_hi is not None,
            MASKED=mask is not None,
            NOTING=bad_step is not None,
            TABLE=0 if table is None else 1 + (table.shape[0] > 1),
            LAYERS=layers,
            ELEMENTS=elements,
            **{f"P{i}": size for i, size in enumerate(sizes + [0] * (4 - layers))},
            **{f"ACT{i + 1}": code for i, code in enumerate(codes + [0] * (4 - layers))},
            IN=triton.next_power_of_2(sizes[0]),
            SPLIT=split,
            ROWS=SAMPLES,
            WIDTH=COLUMNS,
            CHUNK=16 if float32 else 64,
            num_warps=4,
            num_stages=4,
            **({"launch_cooperative_grid": True} if split > 1 else {}),
            **OPTIONS,
        )
