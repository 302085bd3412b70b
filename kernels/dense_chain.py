"""dense_chain: all K Langevin steps of a small net of up to four dense layers, x in place, in one launch.

    v_l = W_l h_{l-1} + b_l, h_l = a_l(v_l);   g_L = head a'(v_L), g_{l-1} = W_l^T g_l a'(v_{l-1});   x <- langevin_step

    x               (N, D_0) float32, contiguous; held in registers from the first step to the last
    weights         (P_l, P_{l-1}) float32 / float16 / bfloat16, padded with zeros to multiples of 64; sums float32.
                    16-bit nets take x as the sum of two such numbers, so that pixels of 0-255 keep their digits
    thread mapping  16 samples a tile. `split` programs share a tile, each making its part of every layer's columns; h,
                    v and g of the tile stand in a scratch that stays in L2, with a barrier after each layer. Every
                    program makes the gradient of x and the update whole, the same bits in each
    statistics      of layers with a gain, over all samples and the sites of a channel: v = gain n + b, n = (u - m) r of
                    u = W h, and their gradient (dense_statistics). Programs of all tiles wait for each other
    bytes           a program streams 2 sum_l P_l P_{l-1} / split weights from L2 a step; x is read and written once a
                    chain, noise costs no memory

With split = 1 the barrier of a tile is the block's own, and a step lasts as long as one SM takes to read all weights
twice. With more, or with statistics and several tiles, programs wait for each other through a counter in memory: the
launch is cooperative, so that a grid which does not fit the GPU is refused rather than left to wait for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .bias_act import activation_code
from .dense_steps import dense_chain_kernel
from .langevin_step import table_arguments
from .philox import OPTIONS, counter_arguments

SAMPLES, COLUMNS = 16, 64  # of a tile of samples, and of a layer at a time; widths are multiples of COLUMNS
TILES = 8  # of which partial sums are read at a time


def dense_chain_(
    x: Tensor,  # (N, ...) float32, contiguous; updated in place
    weights: Sequence[Tensor],  # (P_l, P_{l-1}), one to four, padded to multiples of 64 with zeros
    biases: Sequence[Tensor],  # (P_l,) float32
    head: Tensor,  # (P_L,) float32
    *,
    gains: Sequence[Tensor | None],  # (P_l,) float32 of a layer with batch statistics
    sites: Sequence[int],  # outputs in a row that are a channel of it, else 0
    eps: Sequence[float],
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
    counters = torch.zeros(1 + (tiles if split > 1 else 0), dtype=torch.int64, device=x.device)
    stride = max((size for size, site in zip(sizes[1:], sites) if site), default=0)
    held = triton.cdiv(stride // COLUMNS, split) * SAMPLES * COLUMNS * tiles * split
    parts = [held, tiles * sum(sizes[1:]) if stride else 0, tiles * 4 * layers * stride]
    raw, rates, partial = torch.empty(sum(parts), dtype=torch.float32, device=x.device).split(parts)
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
            *[biases[0] if gain is None else gain for gain in gains],
            *[biases[0]] * (4 - layers),
            head,
            scratch,
            raw,
            rates,
            partial,
            counters[1:],
            counters,
            samples,
            steps,
            *sizes[1:],
            *[0] * (4 - layers),
            scale if isinstance(scale, Tensor) else float(scale),
            *(float(slope) for slope in slopes),
            *[0.0] * (4 - layers),
            *(float(one) for one in eps),
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
            **{f"SITES{i + 1}": site for i, site in enumerate([*sites, *[0] * (4 - layers)])},
            IN=triton.next_power_of_2(sizes[0]),
            SPLIT=split,
            ROWS=SAMPLES,
            WIDTH=COLUMNS,
            CHUNK=16 if float32 else 64,
            STRIDE=stride,
            TILES=TILES,
            num_warps=8 if stride else 4,  # with statistics four have too few registers
            num_stages=4,
            **({"launch_cooperative_grid": True} if split > 1 or (stride and tiles > 1) else {}),
            **OPTIONS,
        )
