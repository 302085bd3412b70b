"""conv_chain: K Langevin steps of a stack of convolutions in one native call, or its ∇E; CPU.

    z_l = W_l * h_{l−1} + b_l;   h_l = a_l(z_l), or a_l of z_l's batch normalisation;   dE/dh_L = head

Results do not depend on threads, on the batch that a sample is in (but for batch statistics) or on the layout of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import native
from ..backend import choose, register
from ..counters import Counters, seed_or_fresh
from ..langevin_step import langevin_step_reference
from ..state import addresses, why_not_plain
from ..update import Number, Update, check_steps, prepare
from . import resident, windows
from .packed import STRIP, PackedChain, Packs, as_source, finite
from .scratch import Scratch

OP = "conv_chain"
register("conv_chain", cpu=True, cuda=True, traced=False)
ACTIVATIONS = {"none": 0, "leaky_relu": 1, "relu": 1, "silu": 2, "elu": 3}
MAX_STAGES = 32
MAX_PIXELS = 2**31  # of a map: the tables of windows are int32


def has_bfloat() -> bool:
    """Whether the instruction set in use multiplies bfloat16."""
    return native.available() and native.module().isa_has_bfloat()


def prefers_bfloat() -> bool:
    """Whether its bfloat16 is faster than float32: yes with AMX tile registers and on AMD, no with Intel's vectors."""
    return native.available() and native.module().isa_prefers_bfloat()


Geometry = tuple[Any, ...]


def geometry_of(stage: windows.StageLike) -> Geometry:
    """What of a stage is not a number of its weights."""
    return (
        tuple(stage.weight.shape), stage.in_size, stage.out_size, stage.stride, stage.padding, stage.dilation,
        stage.bias is not None, None if stage.norm is None else stage.norm.eps,
        0.0 if stage.activation == "relu" else stage.slope, ACTIVATIONS[stage.activation],
    )  # fmt: skip


class _Form:
    """A stack but for the numbers of its weights: tables, and where everything lies in one buffer of packed weights.

    The first convolution reads the state, which is float32 and not padded; its data gradient is the edge's.
    """

    def __init__(self, bfloat: bool, *stages: Geometry) -> None:
        self._packs, self._stages, self.nbytes, source = Packs(), [], 0, 0
        for index, (shape, in_size, out_size, *geometry, has_bias, eps, slope, activation) in enumerate(stages):
            outputs, inputs, *kernel = shape
            taps = math.prod(kernel)
            window = in_size, out_size, tuple(kernel), *geometry
            forward = windows.forward_windows(*window)
            run = 1
            if index:
                backward = windows.backward_windows(*window)
            elif windows.in_patches(inputs, in_size):
                backward, run = windows.patch_windows(*window), windows.EDGE_PIXELS**2
            else:
                backward, run = windows.edge_windows(*window), windows.EDGE_PIXELS
            unit = 32 if bfloat else STRIP
            ahead = self._packs.add(
                source, forward.offsets, inputs, outputs, (taps, inputs * taps), bfloat=bfloat and index > 0,
                depth=-(-inputs // unit) * unit if index else inputs,
            )  # fmt: skip
            behind = self._packs.add(
                source, backward.offsets, outputs, inputs, (inputs * taps, taps), bfloat=bfloat,
                depth=-(-outputs // unit) * unit, run=run,
            )  # fmt: skip
            bias = self._packs.vector(source + 1 if has_bias else None, outputs)
            source += 2 if has_bias else 1
            norm: list[int] = []
            if eps is not None:
                norm = [self._packs.vector(source, outputs), self._packs.vector(source + 1, outputs)]
                source += 2
            numbers = (0.0 if eps is None else eps, slope, activation, math.prod(in_size), math.prod(out_size))
            self._stages.append((forward, backward, ahead, behind, bias, norm, (*numbers, inputs, outputs)))
            self.nbytes += forward.nbytes + backward.nbytes

    def packed(self, sources: Sequence[Tensor]) -> tuple[list[tuple], list[Any]]:
        """The stages' arguments of the native call with these weights, and what holds their addresses."""
        at, held = self._packs.run(sources)
        return [
            (
                forward.arguments, backward.arguments, at[ahead], len(forward.rows), at[behind], len(backward.rows),
                at[bias], *((at[norm[0]], at[norm[1]]) if norm else (0, 0)), *rest,
            )
            for forward, backward, ahead, behind, bias, norm, rest in self._stages
        ], [self, *held]  # fmt: skip


@windows.remembered
def _form(*geometry: Any) -> _Form:
    return _Form(*geometry)


class ConvChain(PackedChain):
    """A stack with its weights packed for the instruction set in use; `bfloat` as its convolutions' operands.

    The first convolution, the sums, the statistics and the state are float32 in either case.
    """

    op = OP

    def __init__(self, stages: Sequence[windows.StageLike], head: Tensor, *, bfloat: bool = False) -> None:
        if not 1 <= len(stages) <= MAX_STAGES:
            raise ValueError(f"conv_chain: stages must be 1 to {MAX_STAGES}, got {len(stages)}")
        for stage in stages:
            if stage.shortcut is not None:
                raise ValueError("conv_chain: stages must have no shortcut but on a GPU, got one")
            for size in (stage.in_size, stage.out_size):
                if math.prod(size) >= MAX_PIXELS:
                    got = "×".join(map(str, size))
                    raise ValueError(f"conv_chain: stages must have maps of fewer than 2**31 pixels, got {got}")
        if bfloat and not has_bfloat():
            raise ValueError(f"conv_chain: bfloat needs AVX512_BF16 or AMX, got the {native.isa()} instruction set")
        self.bfloat = bfloat
        tensors = [tensor for stage in stages for tensor in windows.tensors_of(stage, OP)]
        addresses(OP, head, *tensors)
        top = (stages[-1].weight.shape[0], *stages[-1].out_size)
        if tuple(head.shape) != top:
            raise ValueError(f"{OP}: head must be {top}, as the last map is, got {tuple(head.shape)}")
        with torch.no_grad():
            sources = [as_source(tensor) for tensor in tensors]
            self._stages, self._held = _form(bfloat, *map(geometry_of, stages)).packed(sources)
            # (C, *top) -> (pixel, channel), padded to whole strips
            self._head = _padded(head.detach().float().flatten(1).T, 1)
            # An activation may hide a NaN (ReLU makes it 0): every gradient of such weights is NaN, as autograd's are.
            self.finite = finite([*sources, self._head])
            if not self.finite:
                self._head.fill_(torch.nan)
        self._size = stages[0].in_size
        # Pixels of the smallest map with batch statistics; 2 where there are none.
        self._smallest = min((math.prod(stage.out_size) for stage in stages if stage.norm is not None), default=2)
        self._channels = stages[0].weight.shape[1]
        self._rows = self._size[-2] if windows.in_patches(self._channels, self._size) else 0

    def _call(
        self, x: Tensor, gradient: Tensor | None, mask: Tensor | None, steps: int, numbers: Update, place: Counters
    ) -> None:
        module = native.module()
        arguments = [
            self._stages, self.bfloat, *addresses(OP, self._head, x, gradient, mask), x.shape[0], steps, self._channels,
            math.prod(self._size), self._size[-1], self._rows, numbers.native_arguments, place.native_arguments,
        ]  # fmt: skip
        threads = torch.get_num_threads()
        workspace = Scratch(module.conv_chain_workspace(*arguments, 0, threads))
        module.conv_chain_cpu(*arguments, workspace.address, threads)

    def _check_shape(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != (self._channels, *self._size) or x.dim() == 0:
            expected = ", ".join(map(str, (self._channels, *self._size)))
            raise ValueError(f"{OP}: x must have shape (N, {expected}), got {tuple(x.shape)}")
        if 0 < x.shape[0] * self._smallest <= 1:
            shape = tuple(x.shape)
            raise ValueError(f"{OP}: batch statistics need more than one value a channel, got x of shape {shape}")


def conv_chain(
    stages: Sequence[windows.StageLike],
    head: Tensor,  # (C_top, *top size): dE/dh_L
    x: Tensor,  # (N, C, *size) float32
    *,
    steps: int,
    bfloat: bool = False,
    step_size: Number | None = None,
    noise_scale: Number = 1.0,
    drift: Number | None = None,
    noise_std: Number | None = None,
    reference_std: Number | None = None,
    reference_mean: float | Tensor = 0.0,
    grad_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int | Tensor = 0,
    first_step: int | Tensor = 0,
    stream: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The state `steps` steps after x, a new contiguous tensor.

        for k in 0 … K − 1:   x ← `langevin_step_`(x, ∇E(x), …) at step first_step + k

    Args:
        bfloat: the native backend's convolutions on bfloat16 operands (AVX512_BF16 or AMX).
        step_size … mask, seed … stream: as in `langevin_step_`; first_step a number or a 0-dim int64 tensor.
        backend: "native", on a GPU the resident kernel in float16 (ValueError where a block cannot hold the net); or
            "reference": float64 gradients by autograd, x rounded to float32 at each step.

    Raises: TypeError, ValueError, BackendError.
    """
    seed = seed_or_fresh(seed, x, OP)
    if backend == "auto" and why_not_plain(x.resolve_neg()):
        backend = "reference"
    backend = choose(OP, backend, x.device)
    if bfloat and backend == "reference":
        raise ValueError(f"{OP}: bfloat=True needs the native backend, got the reference")
    check_steps(steps, OP)
    numbers, mask, place = prepare(
        OP, x, mask, steps=steps, step_size=step_size, noise_scale=noise_scale, drift=drift, noise_std=noise_std,
        reference_std=reference_std, reference_mean=reference_mean, grad_clamp=grad_clamp, clamp=clamp, seed=seed,
        first_sample=first_sample, step=first_step, stream=stream,
    )  # fmt: skip
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if backend == "reference":
        conv_chain_reference(stages, head, out, steps=steps, numbers=numbers, place=place, mask=mask)
    elif x.device.type == "cuda":
        resident.run(stages, head, out, steps=steps, numbers=numbers, place=place, mask=mask)
    else:
        ConvChain(stages, head, bfloat=bfloat).advance_(out, steps, numbers, place, mask)
    return out


def gradient_reference(stages: Sequence[windows.StageLike], head: Tensor, x: Tensor) -> Tensor:  # -> float64
    """∇E by autograd in float64."""
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    with torch.enable_grad():
        leaf = h = x.detach().double().requires_grad_()
        zs: list[Tensor] = []  # of every stage, where a shortcut may read it
        added: Tensor | float = 0.0
        for stage in stages:
            bias = None if stage.bias is None else stage.bias.detach().double()
            read = h if stage.shortcut is None else zs[stage.shortcut]
            z = convolve(read, stage.weight.detach().double(), bias, stage.stride, stage.padding, stage.dilation)
            zs.append(z)
            if stage.shortcut is not None:
                added = z
                continue
            zs[-1] = z = z + added
            added = 0.0
            if stage.norm is not None:
                scale, shift = stage.norm.weight.detach().double(), stage.norm.bias.detach().double()
                z = F.batch_norm(z, None, None, scale, shift, True, 0.0, stage.norm.eps)
            h = activate(z, stage.activation, stage.slope)
        return torch.autograd.grad((h * head.detach().double()).sum(), leaf)[0]


def conv_chain_reference(
    stages: Sequence[windows.StageLike],
    head: Tensor,
    x: Tensor,
    *,
    steps: int,
    numbers: Update,
    place: Counters,
    mask: Tensor | None = None,
) -> None:
    """The steps in place: gradients in float64, the state rounded to float32 after each."""
    for k, here in enumerate(place.steps(0, steps)):
        langevin_step_reference(x, gradient_reference(stages, head, x), mask, numbers.steps(k, k + 1), here)


def activate(h: Tensor, name: str, slope: float) -> Tensor:
    if name in ("leaky_relu", "relu"):
        return F.leaky_relu(h, 0.0 if name == "relu" else slope)
    if name == "none":
        return h
    return F.silu(h) if name == "silu" else F.elu(h)


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """float32, `dim` filled up with zeros to whole strips of 16."""
    missing = -tensor.shape[dim] % 16
    pads = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
    return F.pad(tensor.detach().float(), pads).contiguous()
