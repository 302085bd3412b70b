"""conv_chain: K Langevin steps of a stack of convolutions in one native call, or its ∇E; CPU.

    z_l = W_l * h_{l−1} + b_l;   h_l = a_l(z_l), or a_l of z_l's batch normalisation;   dE/dh_L = head

Results do not depend on threads, on the batch that a sample is in (but for batch statistics) or on the layout of x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import native
from ..backend import choose, register
from ..counters import Counters, seed_or_fresh
from ..langevin_step import langevin_step_reference
from ..state import addresses, all_finite, why_not_plain
from ..update import Number, Update, check_steps, prepare
from . import resident, windows
from .packed import PackedChain, pack
from .scratch import Scratch

OP = "conv_chain"
register("conv_chain", cpu=True, cuda=True, traced=False)
ACTIVATIONS = {"none": 0, "leaky_relu": 1, "relu": 1, "silu": 2, "elu": 3}
MAX_STAGES = 32
MAX_PIXELS = 2**31  # of a map: the tables of windows are int32
_EDGE_CHANNELS = 4


def has_bfloat() -> bool:
    """Whether the instruction set in use multiplies bfloat16."""
    return native.available() and native.module().isa_has_bfloat()


def prefers_bfloat() -> bool:
    """Whether its bfloat16 is faster than float32: yes with AMX tile registers and on AMD, no with Intel's vectors."""
    return native.available() and native.module().isa_prefers_bfloat()


@dataclasses.dataclass(frozen=True)
class _Stage:
    """One stage packed: the arguments of the native call, and the tensors that they point into."""

    arguments: tuple
    held: tuple[Tensor | Scratch | windows.Windows, ...]


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
            self._stages = [self._pack(stage, first=index == 0) for index, stage in enumerate(stages)]
            # (C, *top) -> (pixel, channel), padded to whole strips
            self._head = _padded(head.detach().float().flatten(1).T, 1)
            # An activation may hide a NaN (ReLU makes it 0): every gradient of such weights is NaN, as autograd's are.
            self.finite = all_finite([*tensors, head])
            if not self.finite:
                self._head.fill_(torch.nan)
        self._size = stages[0].in_size
        # Pixels of the smallest map with batch statistics; 2 where there are none.
        self._smallest = min((math.prod(stage.out_size) for stage in stages if stage.norm is not None), default=2)
        self._channels = stages[0].weight.shape[1]

    def _pack(self, stage: windows.StageLike, *, first: bool) -> _Stage:
        weight = stage.weight.detach().float().contiguous()
        outputs, inputs = weight.shape[:2]
        kernel = tuple(weight.shape[2:])
        taps = math.prod(kernel)
        geometry = (stage.in_size, stage.out_size, kernel, stage.stride, stage.padding, stage.dilation)
        forward = windows.forward_windows(*geometry)
        # The first stage reads the state, which is float32 and not padded.
        ahead = self._packed(weight, forward.offsets, inputs, outputs, taps, inputs * taps, whole=not first)
        if first:
            backward = windows.edge_windows(*geometry)
            behind = self._packed_edge(weight, backward)
        else:
            backward = windows.backward_windows(*geometry)
            behind = self._packed(weight, backward.offsets, outputs, inputs, inputs * taps, taps, whole=True)
        bias = _padded(weight.new_zeros(outputs) if stage.bias is None else stage.bias.detach().float(), 0)
        norm = stage.norm
        # Copies: the parameters may change later, this chain keeps the weights of now.
        gamma, beta = (None, None) if norm is None else (_copy(norm.weight), _copy(norm.bias))
        eps = 0.0 if norm is None else norm.eps
        slope = 0.0 if stage.activation == "relu" else stage.slope
        arguments = (
            forward.arguments, backward.arguments, ahead.address, len(forward.rows), behind.address,
            len(backward.rows), bias.data_ptr(), 0 if gamma is None else gamma.data_ptr(),
            0 if beta is None else beta.data_ptr(), eps, slope, ACTIVATIONS[stage.activation],
            math.prod(stage.in_size), math.prod(stage.out_size), inputs, outputs,
        )  # fmt: skip
        held = tuple(part for part in (forward, backward, ahead, behind, bias, gamma, beta) if part is not None)
        return _Stage(arguments, held)

    def _packed(
        self, source: Tensor, rows: Tensor, inputs: int, outputs: int, input_stride: int, output_stride: int,
        *, whole: bool,
    ) -> Scratch:  # fmt: skip
        """[strip][row][channel][16], bfloat16 with channels in pairs; `whole`: in the chain's type, padded."""
        bfloat = self.bfloat and whole
        unit = 32 if bfloat else 16
        depth = -(-inputs // unit) * unit if whole else inputs
        return pack(source, rows, inputs, outputs, (input_stride, output_stride), depth=depth, bfloat=bfloat)

    def _packed_edge(self, weight: Tensor, edge: windows.Windows) -> Scratch:
        """The edge's weights: strip = four channels of x, lane = 4 (channel mod 4) + pixel of the run."""
        outputs, inputs = weight.shape[:2]
        flat = torch.cat([weight.flatten(2), weight.new_zeros(outputs, inputs, 1)], 2)  # the last tap is none
        pixels = windows.EDGE_PIXELS
        chosen = flat[:, :, edge.offsets.reshape(-1)]
        dense = chosen.reshape(outputs, inputs, len(edge.rows), pixels).permute(2, 0, 1, 3)  # row, out, in, pixel
        groups = -(-inputs // _EDGE_CHANNELS)
        dense = F.pad(dense, (0, 0, 0, groups * _EDGE_CHANNELS - inputs)).contiguous()
        lanes = groups * _EDGE_CHANNELS * pixels
        rows = torch.arange(len(edge.rows), device="cpu") * (outputs * lanes)
        return self._packed(dense, rows, outputs, lanes, lanes, 1, whole=True)

    def _call(
        self, x: Tensor, gradient: Tensor | None, mask: Tensor | None, steps: int, numbers: Update, place: Counters
    ) -> None:
        module = native.module()
        stages = [stage.arguments for stage in self._stages]
        arguments = [
            stages, self.bfloat, *addresses(OP, self._head, x, gradient, mask), x.shape[0], steps, self._channels,
            math.prod(self._size), self._size[-1], numbers.native_arguments, place.native_arguments,
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


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True).contiguous()


def _padded(tensor: Tensor, dim: int) -> Tensor:
    """float32, `dim` filled up with zeros to whole strips of 16."""
    missing = -tensor.shape[dim] % 16
    pads = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
    return F.pad(tensor.detach().float(), pads).contiguous()
