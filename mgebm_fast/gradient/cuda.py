"""∇E and whole chains of 2-D stacks on GPUs: library convolutions in 16 bits, one kernel of ours between two of them.

    forward    z_l = W_l * h_{l−1};  h_l = a_l(z_l + b_l), or of z_l's batch normalisation    bias_act, batch_norm_act
    top        dE/dz_L from the head and the signs of z_L: h_L itself is never made           the same ops
    backward   dE/dz_{l−1} = a′ · (W_lᵀ * dE/dz_l), through the statistics where there are    the same ops
    edge       x ← Langevin step with W_1ᵀ * dE/dz_1, which never goes to memory              edge_step_

Feature maps are channels-last. Kept for the backward pass are 1-bit masks, or z where the slope or the statistics need
it. x enters the first convolution as the sum of two 16-bit numbers, in twice the channels (padded to eights, which
tensor cores need): pixels of 0–255 then lose nothing. A net of small dense layers (`dense`) makes all its steps in one
kernel instead.

float16 has few exponents: the head is scaled as in the conv plan, and `bad_step` notes the first step at which
something overflowed: an entry of ∇E, or of the top map, where an overflow of the forward pass ends.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..ops import backend as backends
from ..ops import counters, edge_step
from ..ops.batch_norm_act import launch as launch_norm
from ..ops.batch_norm_act import launch_backward as launch_norm_backward
from ..ops.batch_norm_act import workspace
from ..ops.bias_act import MASKED
from ..ops.bias_act import launch as launch_bias
from ..ops.bias_act import launch_backward as launch_bias_backward
from ..ops.dense_net import why_not_dense
from ..ops.edge_step import NO_BAD_STEP
from ..ops.update import Update
from .base import GradientPlan, PlanReport
from .conv import TYPES, scaled_head
from .dense import DenseSteps
from .exact import exact_cudnn
from .stack import Stack, Stage, example_input, layout_of, reread

aten = torch.ops.aten
OPS = ("bias_act", "batch_norm_act", "edge_step", "dense_chain")


def why_not(stack: Stack, x: Tensor, precision: str, backend: str = "triton") -> str:
    """Why the fused plan cannot run `stack` on tensors like x; an empty string when it can."""
    if precision == "fp32":
        return "it is for 16 bits"
    for op in OPS:
        if missing := backends.unavailable(op, backend, x.device):
            return missing
    if stack.ndim != 2:
        return f"its kernels are of 2-D maps, x has {stack.ndim} spatial dimensions"
    first = stack.stages[0]
    if max(first.stride) > 2:
        return f"{first.name} has stride {max(first.stride)}, its edge kernel takes up to 2"
    stride = (first.stride[0], first.stride[1])
    if (wide := edge_step.columns(stack.channels, stride)) > edge_step.MAX_COLUMNS:
        return (
            f"{first.name} has {stack.channels} channels, and stride² · channels is {wide}, above the edge kernel's 64"
        )
    return ""


@dataclasses.dataclass
class _Layer:
    """A stage in buffers of its own, which `load` fills again in place."""

    stage: Stage  # without its tensors
    fixed: tuple[Any, ...]
    weight: Tensor  # 16 bits, channels-last; of the first stage [W, W, 0 …] over the channels
    bias: Tensor | None  # float32
    norm: tuple[Tensor, Tensor] | None  # weight and bias, float32
    geometry: tuple[Any, ...]

    @classmethod
    def of(cls, stage: Stage, dtype: torch.dtype, channels: int) -> _Layer:
        shape = (stage.weight.shape[0], channels, *stage.weight.shape[2:])
        weight = torch.zeros(shape, dtype=dtype, device=stage.weight.device).to(memory_format=torch.channels_last)
        norm = None if stage.norm is None else (stage.norm.weight.clone(), stage.norm.bias.clone())
        bias = None if stage.bias is None else stage.bias.clone()
        geometry = (list(stage.stride), list(stage.padding), list(stage.dilation), False, [0, 0], 1)
        return cls(dataclasses.replace(stage, weight=weight, bias=None), layout_of(stage), weight, bias, norm, geometry)

    def load(self, stage: Stage) -> None:
        inputs = stage.weight.shape[1]
        self.weight[:, :inputs].copy_(stage.weight)
        if self.weight.shape[1] > inputs:
            self.weight[:, inputs : 2 * inputs].copy_(stage.weight)
        if self.bias is not None and stage.bias is not None:
            self.bias.copy_(stage.bias)
        if self.norm is not None and stage.norm is not None:
            self.norm[0].copy_(stage.norm.weight)
            self.norm[1].copy_(stage.norm.bias)


@dataclasses.dataclass(frozen=True)
class _Kept:
    shape: torch.Size  # of the convolution's input
    kept: Tensor | None = None  # bits of a mask, or z
    statistics: Tensor | None = None


class FusedPlan(GradientPlan):
    """∇E and Langevin steps of a 2-D stack with the weights that it had at the last `refresh()`.

    Nothing is kept between calls and there is no host sync, so that a CUDA graph can capture a call.
    """

    backends = ("native", "triton")  # backends of the update that `advance_` can make steps with
    bad_step: Tensor

    def __init__(
        self, stack: Stack, energy: Any, precision: str, backend: str = "triton", *, not_resident: str = ""
    ) -> None:
        self._energy, self.precision, self._backend = energy, precision, backend
        self._slower = (f"the resident chain cannot run: {not_resident}",) if not_resident else ()
        self._dtype = TYPES[precision]
        self._shape = (stack.channels, *stack.size)
        device, last = stack.head.device, stack.stages[-1]
        with torch.inference_mode(False), torch.no_grad():
            self.bad_step = torch.full((), NO_BAD_STEP, device=device)
            inputs = -(-2 * stack.channels // 8) * 8
            widths = [inputs, *(stage.weight.shape[1] for stage in stack.stages[1:])]
            self._layers = [_Layer.of(stage, self._dtype, n) for stage, n in zip(stack.stages, widths, strict=True)]
            first = stack.stages[0]
            self._edge = edge_step.edge_weights(
                first.weight, stride=first.stride, padding=first.padding, dilation=first.dilation, dtype=self._dtype
            )
            self._head = torch.empty(
                stack.head.numel(), dtype=torch.float32, device=device
            )  # in the order of a channels-last sample
            self._unscale = torch.ones((), dtype=torch.float32, device=device)
            self._workspace = workspace(max(s.weight.shape[0] for s in stack.stages), device)
            self._example = example_input(stack)
            small = not why_not_dense(stack)
            self._dense = DenseSteps(stack, self._dtype, backend) if small else None
        self._checks_top = self._dtype == torch.float16 and last.norm is None
        self._load(stack)

    def refresh(self) -> None:
        """Take the energy's present weights, in place. BackendError where it is no longer the same stack."""
        self._load(reread(self._energy, self._example, [layer.fixed for layer in self._layers]))

    def _load(self, stack: Stack) -> None:
        with torch.no_grad(), torch.inference_mode(False):
            for layer, stage in zip(self._layers, stack.stages, strict=True):
                layer.load(stage)
            self._edge.update_(stack.stages[0].weight)
            head, unscale = scaled_head(stack.head) if self._dtype == torch.float16 else (stack.head, self._unscale)
            self._unscale.copy_(unscale)
            self._head.copy_(head.movedim(0, -1).reshape(-1))
            if self._dense is not None:
                self._dense.load(stack, self._unscale)

    def takes(self, numbers: Update) -> bool:
        return not numbers.by_sample  # the kernels read one set of numbers a step

    def advance_(self, x: Tensor, place: counters.Counters, steps: int, numbers: Update, mask: Tensor | None) -> None:
        """`steps` Langevin steps on x in place; `place` has the counters of the first."""
        self._check(x)
        if x.shape[0] == 0 or steps == 0:
            return
        with torch.no_grad(), exact_cudnn(x.device):
            if self._dense is not None and len(x) <= self._dense.most_samples(x.device):
                self._dense.advance_(x, place, steps, numbers, mask, self.bad_step)
                return
            first_input = self._first_input(x)
            peaks = torch.zeros(steps, dtype=torch.float32, device=x.device) if self._checks_top else None
            places = place.steps(0, steps)
            for k, here in enumerate(places):
                own = numbers.steps(k, k + 1)
                upstream = self._upstream(x, first_input, None if peaks is None else peaks[k])
                edge_step.launch(
                    x, upstream, self._edge, self._unscale, 1.0, mask, self.bad_step, own, here, self._backend
                )
            if peaks is not None:
                note_bad_steps_(self.bad_step, peaks, places)

    def gradient(self, x: Tensor) -> Tensor:  # (N, C, H, W) float32 -> the same, contiguous
        """∇E(x), float32; what overflowed in 16 bits is inf or NaN."""
        self._check(x)
        with torch.no_grad(), exact_cudnn(x.device):
            peak = torch.zeros((), dtype=torch.float32, device=x.device) if self._checks_top else None
            upstream = self._upstream(x, self._first_input(x), peak)
            low = self._input_gradient(upstream, self._edge.weight, x.shape, self._layers[0].geometry)
            gradient = low.to(torch.float32, memory_format=torch.contiguous_format).mul_(self._unscale)
            return gradient if peak is None else gradient.add_(peak * 0.0)

    def _check(self, x: Tensor) -> None:
        if tuple(x.shape[1:]) != self._shape:
            expected = ", ".join(map(str, self._shape))
            raise ValueError(f"gradient: x must have shape (N, {expected}), got {tuple(x.shape)}")

    def _first_input(self, x: Tensor) -> Tensor:
        """The first convolution's input, for `_upstream` to fill."""
        shape = (x.shape[0], self._layers[0].weight.shape[1], *x.shape[2:])
        return torch.zeros(shape, dtype=self._dtype, device=x.device).to(memory_format=torch.channels_last)

    def _upstream(self, x: Tensor, first_input: Tensor, peak: Tensor | None) -> Tensor:
        """dE/dz_1 over `unscale`, 16 bits, channels-last; `peak` takes the top map's largest entry."""
        channels = x.shape[1]
        high = first_input[:, :channels].copy_(x)
        torch.sub(x, high, out=first_input[:, channels : 2 * channels])  # in float32, in one kernel
        h, records = first_input, []
        for layer in self._layers[:-1]:
            h, record = self._forward(layer, h)
            records.append(record)
        top = self._layers[-1]
        upstream = self._top_upstream(top, h, peak)
        shape = h.shape
        del h
        for index in range(len(self._layers) - 2, -1, -1):
            above, layer, record = self._layers[index + 1], self._layers[index], records.pop()
            upstream = self._input_gradient(upstream, above.weight, shape, above.geometry)
            self._backward_(layer, upstream, record)
            shape = record.shape
        return upstream

    def _convolve(self, layer: _Layer, h: Tensor) -> Tensor:
        z = aten.convolution(h, layer.weight, None, *layer.geometry)
        return z.contiguous(memory_format=torch.channels_last)

    def _forward(self, layer: _Layer, h: Tensor) -> tuple[Tensor, _Kept]:
        stage, z = layer.stage, self._convolve(layer, h)
        if layer.norm is not None and stage.norm is not None:
            out = torch.empty_like(z)
            statistics = torch.empty(2, z.shape[1], dtype=torch.float32, device=z.device)
            self._normalise(layer, z, statistics, out, stage.norm.eps)
            return out, _Kept(h.shape, z, statistics)
        if stage.activation in MASKED:
            bits = torch.empty(-(-z.numel() // 8), dtype=torch.uint8, device=z.device)
            self._activate(layer, z, out=z, mask=bits)
            return z, _Kept(h.shape, bits)
        out = z if stage.activation == "none" else torch.empty_like(z)
        self._activate(layer, z, out=out)
        return out, _Kept(h.shape, None if out is z else z)

    def _top_upstream(self, layer: _Layer, h: Tensor, peak: Tensor | None) -> Tensor:
        """dE/dz of the last stage."""
        stage, z = layer.stage, self._convolve(layer, h)
        if layer.norm is not None and stage.norm is not None:
            out = torch.empty_like(z)
            statistics = torch.empty(2, z.shape[1], dtype=torch.float32, device=z.device)
            self._normalise(layer, z, statistics, None, stage.norm.eps)
            self._normalise_backward(layer, z, statistics, out, head=self._head)
            return out
        if peak is not None:
            torch.linalg.vector_norm(z, math.inf, dtype=torch.float32, out=peak)
        self._activate(layer, z, out=z, head=self._head)
        return z

    def _backward_(self, layer: _Layer, grad: Tensor, record: _Kept) -> None:
        """dE/dz of a stage from dE/dh, in place."""
        stage = layer.stage
        if layer.norm is not None:
            assert record.kept is not None and record.statistics is not None
            self._normalise_backward(layer, record.kept, record.statistics, grad, grad=grad)
        elif stage.activation != "none":
            bias = None if stage.activation in MASKED else layer.bias
            launch_bias_backward(
                grad, kept=record.kept, bias=bias, out=grad, activation=stage.activation, slope=stage.slope,
                backend=self._backend,
            )  # fmt: skip

    def _activate(
        self, layer: _Layer, z: Tensor, *, out: Tensor, mask: Tensor | None = None, head: Tensor | None = None
    ) -> None:
        stage = layer.stage
        launch_bias(
            z, bias=layer.bias, head=head, out=out, mask=mask, activation=stage.activation, slope=stage.slope,
            backend=self._backend,
        )  # fmt: skip

    def _normalise(self, layer: _Layer, z: Tensor, statistics: Tensor, out: Tensor | None, eps: float) -> None:
        """The statistics of z, and with `out` the activated map."""
        assert layer.norm is not None
        weight, bias = layer.norm
        launch_norm(
            z, weight=weight, bias=bias, out=out, statistics=statistics, workspace=self._workspace, eps=eps,
            activation=layer.stage.activation, slope=layer.stage.slope, backend=self._backend,
        )  # fmt: skip

    def _normalise_backward(
        self, layer: _Layer, z: Tensor, statistics: Tensor, out: Tensor, *, grad: Tensor | None = None,
        head: Tensor | None = None,
    ) -> None:  # fmt: skip
        """dE/dz through activation and statistics, of dE/dh as a map (`grad`) or as the head."""
        assert layer.norm is not None
        weight, bias = layer.norm
        launch_norm_backward(
            grad, z=z, statistics=statistics, weight=weight, bias=bias, head=head, out=out, workspace=self._workspace,
            activation=layer.stage.activation, slope=layer.stage.slope, backend=self._backend,
        )  # fmt: skip

    def _input_gradient(self, upstream: Tensor, weight: Tensor, shape: torch.Size, geometry: tuple[Any, ...]) -> Tensor:
        """Wᵀ * upstream, for a convolution whose input had this shape."""
        source = upstream.new_empty(()).expand(shape)  # only its shape is used
        mask = [True, False, False]
        found = aten.convolution_backward(upstream, source, weight, None, *geometry, mask)[0]
        return found.contiguous(memory_format=torch.channels_last)

    def explain(self) -> PlanReport:
        if self._dense is not None:
            how = "small maps as matrices; sums, statistics and x in fp32"
            most = self._dense.most_samples(self._head.device)
            above = f" for at most {most} samples, above that library convolutions" if most < math.inf else ""
            chain = f"all steps in one kernel{above}"
            return PlanReport("dense", self.precision, how, chain, self._slower)
        return PlanReport(
            "fused", self.precision,
            f"library convolutions and a kernel between them; x as a sum of two {self.precision} numbers; sums, "
            "statistics and the step in fp32",
            why_not_faster=self._slower,
        )  # fmt: skip


def note_bad_steps_(bad_step: Tensor, peaks: Tensor, places: list[counters.Counters]) -> None:
    """bad_step ← its minimum with the counters of the steps whose peak is not finite; no synchronisation."""
    tensors = [place.step_tensor for place in places if place.step_tensor is not None]
    first = places[0].step
    steps = torch.stack(tensors) if tensors else torch.arange(first, first + len(places), device=peaks.device)
    noted = torch.where(torch.isfinite(peaks), NO_BAD_STEP, steps).min()
    bad_step.copy_(torch.minimum(bad_step, noted))
