"""conv_learn: energies of a stack of convolutions and the gradients in its weights, in one native call; CPU.

    z_l = W_l * h_{l−1} + b_l;   h_l = a_l(z_l), or a_l of z_l's batch normalisation;   E = ⟨head, h_L⟩ + bias
    L = Σ_i linear_i E_i + square_i E_i²

No bit depends on threads, nor, but for batch statistics, a sample's energy on its batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from .backend import choose, register
from .conv_chain import MAX_STAGES, Geometry, activate, geometry_of, has_bfloat, windows
from .conv_chain.packed import STRIP, Packs, as_source
from .conv_chain.scratch import Scratch
from .graph_chain.forward import MIN_BFLOAT_INPUTS
from .graph_chain.packing import depth_of, padded
from .state import addresses, why_not_plain

OP = "conv_learn"
register(OP, cpu=True, traced=False)


def splits() -> bool:
    """Whether three products of bfloat16, of operands as the sums of two such numbers, take less time than one of
    float32: with AMX tile registers."""
    return native.isa() == "amx"


@dataclasses.dataclass(frozen=True)
class NormGradients:
    """dL of the scale and the shift of batch statistics; and of z over the samples before `split` the mean and the
    biased variance."""

    weight: Tensor
    bias: Tensor
    mean: Tensor
    variance: Tensor


@dataclasses.dataclass(frozen=True)
class StageGradients:
    """dL of one stage's tensors, in their shapes; None for what it does not have."""

    weight: Tensor
    bias: Tensor | None
    norm: NormGradients | None


@dataclasses.dataclass(frozen=True)
class Learnt:
    """What `conv_learn` gives."""

    energies: Tensor  # (N,)
    stages: tuple[StageGradients, ...]
    head: Tensor  # (C_top, *top size)
    bias: Tensor  # ()


def conv_learn(
    stages: Sequence[windows.StageLike],
    head: Tensor,  # (C_top, *top size): dE/dh_L
    x: Tensor,  # (N, C, *size) float32
    linear: Tensor,  # (N,) float32
    square: Tensor,  # (N,) float32
    *,
    bias: float = 0.0,
    split: int | None = None,
    bfloat: bool = False,
    backend: str = "auto",
) -> Learnt:
    """The energies of x, and the gradients of L = Σ linear E + square E² in every weight, bias and norm, and the head.

    Args:
        bias: what every energy has added to it.
        split: with batch statistics, samples from here on are normalised apart from those before it; None: all
            together.
        bfloat: the native backend's gradients, of weights and of feature maps, from bfloat16 operands (AVX512_BF16 or
            AMX). The forward pass, whose signs choose the slopes of a leaky ReLU, is float32, or with AMX of operands
            of 17 bits, each the sum of two bfloat16 numbers. The first layer, sums, statistics, biases and norms are
            float32 in either case.
        backend: "native", "reference" (float64 by autograd, rounded at the end) or "auto".

    Raises: TypeError, ValueError, BackendError.
    """
    split = _check(stages, head, x, linear, square, split)
    if backend == "auto" and any(why_not_plain(t) for t in (x, linear, square, head)):
        backend = "reference"
    backend = choose(OP, backend, x.device)
    if bfloat and backend == "reference":
        raise ValueError(f"{OP}: bfloat=True needs the native backend, got the reference")
    if bfloat and not has_bfloat():
        raise ValueError(f"{OP}: bfloat needs AVX512_BF16 or AMX, got the {native.isa()} instruction set")
    if backend == "reference":
        return conv_learn_reference(stages, head, x, linear, square, bias, split)
    addresses(OP, head, *(t for stage in stages for t in windows.tensors_of(stage, OP)))
    with torch.no_grad():
        return _native(stages, head, x, linear, square, bias, split, bfloat)


def _check(
    stages: Sequence[windows.StageLike], head: Tensor, x: Tensor, linear: Tensor, square: Tensor, split: int | None
) -> int:
    if not 1 <= len(stages) <= MAX_STAGES:
        raise ValueError(f"{OP}: stages must be 1 to {MAX_STAGES}, got {len(stages)}")
    for name, tensor in (("x", x), ("linear", linear), ("square", square)):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.float32:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{OP}: {name} must be a float32 tensor, got {got}")
    shape = (stages[0].weight.shape[1], *stages[0].in_size)
    if tuple(x.shape[1:]) != shape or not len(x):
        raise ValueError(f"{OP}: x must have shape (N, {', '.join(map(str, shape))}), N ≥ 1, got {tuple(x.shape)}")
    for name, tensor in (("linear", linear), ("square", square)):
        if tuple(tensor.shape) != (len(x),):
            raise ValueError(f"{OP}: {name} must have one number a sample, {len(x)}, got shape {tuple(tensor.shape)}")
    top = (stages[-1].weight.shape[0], *stages[-1].out_size)
    if tuple(head.shape) != top:
        raise ValueError(f"{OP}: head must be {top}, as the last map is, got {tuple(head.shape)}")
    if split is None:
        split = len(x)
    if not 0 < split <= len(x):
        raise ValueError(f"{OP}: split must be 1 to {len(x)}, the number of samples, got {split}")
    parts = [split, len(x) - split] if split < len(x) else [split]
    smallest = min((math.prod(stage.out_size) for stage in stages if stage.norm is not None), default=2)
    if min(parts) * smallest <= 1:
        raise ValueError(f"{OP}: batch statistics need more than one value a channel, got {min(parts)} samples")
    return split


class _Form:
    """A stack but for the numbers of its weights: tables, and where its packed weights and vectors lie."""

    def __init__(self, bfloat: bool, splits: bool, *stages: Geometry) -> None:
        self._packs, self._stages, self.nbytes, source = Packs(), [], 0, 0
        for index, (shape, in_size, out_size, *geometry, has_bias, eps, slope, activation) in enumerate(stages):
            outputs, inputs, *kernel = shape
            taps = math.prod(kernel)
            window = in_size, out_size, tuple(kernel), *geometry
            forward, backward = windows.forward_windows(*window), windows.backward_windows(*window)
            rounded = bfloat and index > 0 and min(outputs, inputs) >= MIN_BFLOAT_INPUTS
            halves = rounded and splits
            of_rows = source, forward, inputs, outputs, (taps, inputs * taps)
            ahead, rest = self._job(*of_rows, halves), self._job(*of_rows, True, rest=True) if halves else None
            behind = self._job(source, backward, outputs, inputs, (inputs * taps, taps), rounded) if index else None
            vectors: list[int | None] = [source + 1] if has_bias else [None]
            source += 2 if has_bias else 1
            if eps is not None:  # batch statistics take a bias off again
                vectors, source = [None, source, source + 1], source + 2
            jobs = [ahead, behind, rest, *(self._packs.vector(v, outputs) for v in vectors)]
            numbers = (0.0 if eps is None else eps, slope, activation, math.prod(in_size), math.prod(out_size))
            self._stages.append((forward, backward, jobs, (*numbers, inputs, outputs), rounded, taps))
            self.nbytes += forward.nbytes + backward.nbytes

    def _job(
        self, source: int, table: windows.Windows, inputs: int, outputs: int, strides: tuple[int, int], bfloat: bool,
        rest: bool = False,
    ) -> int:  # fmt: skip
        depth = depth_of(inputs, bfloat)
        return self._packs.add(source, table.offsets, inputs, outputs, strides, depth=depth, bfloat=bfloat, rest=rest)

    def arguments(self, sources: Sequence[Tensor], found: Sequence[Sequence[Tensor]]) -> tuple[list[Any], list[Any]]:
        """The stages' arguments of the native call with these weights, gradients into `found`; and what holds the
        addresses."""
        at, held = self._packs.run(sources)
        stages = []
        for (forward, backward, jobs, numbers, rounded, taps), into in zip(self._stages, found, strict=True):
            ahead, behind, rest, *vectors = (0 if job is None else at[job] for job in jobs)
            conv = (
                forward.arguments, backward.arguments, ahead, len(forward.rows), behind, len(backward.rows),
                *vectors, *[0] * (3 - len(vectors)), *numbers,
            )  # fmt: skip
            to = [tensor.data_ptr() for tensor in into]
            stages.append((conv, rounded, rest, forward.offsets.data_ptr(), taps, *to, *[0] * (5 - len(to))))
        return stages, [self, *held]


@windows.remembered
def _learning(*geometry: Any) -> _Form:
    return _Form(*geometry)


def _native(
    stages: Sequence[windows.StageLike], head: Tensor, x: Tensor, linear: Tensor, square: Tensor, bias: float,
    split: int, bfloat: bool,
) -> Learnt:  # fmt: skip
    x, linear, square = (tensor.detach().resolve_neg().contiguous() for tensor in (x, linear, square))
    sources = [as_source(tensor) for stage in stages for tensor in windows.tensors_of(stage, OP)]
    # Of each weight, and of its bias or the norm's; of the norm's weight, mean and variance.
    found = [
        [
            torch.empty_like(stage.weight, memory_format=torch.contiguous_format),
            *x.new_empty((1 if stage.norm is None else 4, padded(len(stage.weight)))),
        ]
        for stage in stages
    ]
    outputs = head.shape[0]
    # (C, *top) -> (pixel, channel), padded to whole strips
    flat = F.pad(head.detach().flatten(1).T, (0, -outputs % STRIP)).contiguous()
    energies, of_head, of_bias = torch.empty_like(linear), torch.empty_like(flat), linear.new_empty(())
    of_stages, held = _learning(bfloat, splits(), *map(geometry_of, stages)).arguments(sources, found)
    made = [tensor.data_ptr() for tensor in (energies, of_head, of_bias)]
    arguments = [of_stages, flat.data_ptr(), bias, *addresses(OP, x, linear, square), *made, x.shape[0], split]
    threads = torch.get_num_threads()
    workspace = Scratch(native.module().conv_learn_workspace(*arguments, 0, threads))
    native.module().conv_learn_cpu(*arguments, workspace.address, threads)
    del held
    gradient = of_head[:, :outputs].T.reshape(head.shape).contiguous()
    return Learnt(energies, tuple(map(_gradients, stages, found)), gradient, of_bias)


def _gradients(stage: windows.StageLike, found: Sequence[Tensor]) -> StageGradients:
    of_weight, *vectors = found
    shift, *rest = (vector[: len(of_weight)] for vector in vectors)
    if stage.norm is None:
        return StageGradients(of_weight, None if stage.bias is None else shift, None)
    # Batch statistics take a bias off again.
    bias = None if stage.bias is None else torch.zeros_like(shift)
    return StageGradients(of_weight, bias, NormGradients(rest[0], shift, *rest[1:]))


def conv_learn_reference(
    stages: Sequence[windows.StageLike], head: Tensor, x: Tensor, linear: Tensor, square: Tensor, bias: float,
    split: int, dtype: torch.dtype = torch.float64,
) -> Learnt:  # fmt: skip
    """By autograd in `dtype`, rounded to float32 at the end."""
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype, copy=True).requires_grad_()

    with torch.enable_grad():
        h, top, shift = x.detach().to(dtype), leaf(head), leaf(torch.tensor(bias))
        leaves: list[list[Tensor | None]] = []
        moments: list[tuple[Tensor, ...]] = []
        assert top is not None and shift is not None
        for stage in stages:
            norm = stage.norm
            scales = (None, None) if norm is None else (norm.weight, norm.bias)
            weight, b, gamma, beta = tensors = [leaf(t) for t in (stage.weight, stage.bias, *scales)]
            assert weight is not None
            leaves.append(tensors)
            h = convolve(h, weight, b, stage.stride, stage.padding, stage.dilation)
            z, dims = h.detach()[:split], [d for d in range(h.dim()) if d != 1]
            moments.append((z.mean(dims).float(), z.var(dims, correction=0).float()))
            if norm is not None:
                parts = (part for part in (h[:split], h[split:]) if len(part))
                h = torch.cat([F.batch_norm(part, None, None, gamma, beta, True, 0.0, norm.eps) for part in parts])
            h = activate(h, stage.activation, stage.slope)
        energies = (h * top).flatten(1).sum(1) + shift
        loss = (linear.to(dtype) * energies + square.to(dtype) * energies.square()).sum()
        given = [tensor for tensors in leaves for tensor in tensors if tensor is not None]
        *found, of_head, of_bias = torch.autograd.grad(loss, [*given, top, shift])
    rest = iter(gradient.float() for gradient in found)
    gradients = []
    for (_, b, gamma, _), of_z in zip(leaves, moments, strict=True):
        of_weight, of_b = next(rest), None if b is None else next(rest)
        of_norm = None if gamma is None else NormGradients(next(rest), next(rest), *of_z)
        gradients.append(StageGradients(of_weight, of_b, of_norm))
    return Learnt(energies.detach().float(), tuple(gradients), of_head.float(), of_bias.float())
