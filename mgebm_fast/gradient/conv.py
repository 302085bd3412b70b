"""∇E of a stack of convolutions by the chain rule written out: data gradient only, weights prepared once, no graph.

    forward    h_0 = x;  z_l = W_l * h_{l−1} + b_l;  y_l = z_l or BN(z_l);  h_l = a_l(y_l)
    backward   g_L = head;  u_l = g_l · a_l′(y_l);  v_l = u_l, or through BN;  g_{l−1} = W_lᵀ * v_l;  ∇E = g_0

BN, with the mean and the biased variance of a channel over the M = N·|map| values of the batch, x̂ = (z − mean)·r,
r = 1/√(var + ε), y = w·x̂ + b, has the gradient through its statistics too

    v = w·r·( u − Σu/M − x̂·Σ(u·x̂)/M )

In float32 these are the very operators that autograd calls, and with piecewise linear activations the result is
autograd's bit for bit; what goes is the graph, the head's forward, and the spectral norm's value at every step.

In 16 bits every convolution but the first forward one runs on 16-bit operands with float32 accumulation (pixels of
0–255 would lose up to half a unit there); statistics are float32, the first stage's of the float32 map. float16 has few
exponents: the head is scaled so that its largest entry is in [2, 4), which the linear backward carries down to x, where
float32 takes it out again. An overflow in either pass nevertheless shows as inf or NaN in the gradient.

Kept from forward to backward, in the plan's dtype: h_l where its sign gives the slope, y_l where not; and z_l or x̂_l
where statistics follow. Bits in place of h_l would be 1/16 of it, but torch has no operator that packs them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..ops.conv_chain import prefers_bfloat
from ..ops.conv_chain.resident import scaled_head
from .base import GradientPlan, PlanReport
from .exact import exact_cudnn
from .stack import Stack, Stage, example_input, layout_of, reread

aten = torch.ops.aten
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The head's largest entry in float16: gradients may grow 2¹⁴-fold on their way to x, and shrink by as much.
# backward(upstream, kept): `kept` is the activation's output, or its input where the output does not give the slope.
Backward = Callable[[Tensor, Tensor], Tensor]


def bfloat16_is_fast(device_type: str) -> bool:
    """Whether the CPU multiplies bfloat16 faster than float32: AMX, or AVX512_BF16 on AMD's."""
    if device_type != "cpu":
        return False
    if native.available():
        return prefers_bfloat()
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


# Gradients that shrink from layer to layer underflow in float16, the sooner the more layers there are.
_FLOAT16_LAYERS = 8


def auto_precision(device_type: str, layers: int = 1) -> str:
    """What "auto" means for stacks of so many layers: on CUDA float16, or bfloat16, which has float32's range, for deep
    ones; on CPUs bfloat16 where that is faster than float32."""
    if device_type == "cuda":
        return "fp16" if layers <= _FLOAT16_LAYERS else "bf16"
    return "bf16" if bfloat16_is_fast(device_type) else "fp32"


@dataclasses.dataclass(frozen=True)
class _Kept:
    """What the backward pass of one stage needs."""

    slope: Tensor  # h where its sign gives the activation's slope, else y
    z: Tensor | None = None  # what batch statistics normalised, and how: mean, 1/std, weight
    mean: Tensor | None = None
    rstd: Tensor | None = None
    weight: Tensor | None = None


class _Layer:
    """A stage in buffers of its own, which `load` fills again in place."""

    def __init__(self, stage: Stage, index: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
        self.fixed, self.dtype, self.layout = layout_of(stage), dtype, layout
        unsafe = dtype != torch.float32 and _library_is_wrong(stage)
        self.exact = dtype != torch.float32 and (index == 0 or unsafe)  # whether the forward runs in float32
        low = torch.float32 if unsafe else dtype
        self.low = torch.empty_like(stage.weight, dtype=low, memory_format=layout)
        self.weight = torch.empty_like(stage.weight, memory_format=torch.contiguous_format) if self.exact else self.low
        self.bias = None if stage.bias is None else torch.empty_like(stage.bias, dtype=self.weight.dtype)
        self.norm = stage.norm
        if self.norm is not None:
            weight, bias = torch.empty_like(self.norm.weight), torch.empty_like(self.norm.bias)
            self.norm = dataclasses.replace(self.norm, weight=weight, bias=bias)
        self.activate, self.slope_backward, self.keeps_output = _activation(stage.activation, stage.slope)
        ndim = len(stage.in_size)
        self.geometry = (list(stage.stride), list(stage.padding), list(stage.dilation), False, [0] * ndim, 1)
        self.per_channel = (1, -1, *[1] * ndim)

    def load(self, stage: Stage) -> None:
        """The weights of `stage`, which has this one's shapes, at the addresses that they have here."""
        pairs = [(self.low, stage.weight), (self.weight, stage.weight), (self.bias, stage.bias)]
        if self.norm is not None and stage.norm is not None:
            pairs += [(self.norm.weight, stage.norm.weight), (self.norm.bias, stage.norm.bias)]
        for buffer, value in pairs:
            if buffer is not None and value is not None:
                buffer.copy_(value)

    def forward(self, h: Tensor) -> tuple[Tensor, _Kept]:
        y = aten.convolution(h.to(self.weight.dtype), self.weight, self.bias, *self.geometry)
        statistics: tuple[Tensor, ...] = ()
        if self.norm is not None:
            weight, bias, eps = self.norm.weight, self.norm.bias, self.norm.eps
            if self.exact:
                # x̂ stands in for z: rounded to 16 bits, z would lose by the size of its mean.
                y, mean, rstd = aten.native_batch_norm(y, None, None, None, None, True, 0.0, eps)
                statistics = self._lower(y), torch.zeros_like(mean), torch.ones_like(rstd), weight * rstd
                y.mul_(weight.view(self.per_channel)).add_(bias.view(self.per_channel))
            else:
                z = y
                y, mean, rstd = aten.native_batch_norm(z, weight, bias, None, None, True, 0.0, eps)
                statistics = z, mean, rstd, weight
        h = self.activate(y)
        if self.exact:
            y, h = (h, self._lower(h)) if self.keeps_output else (self._lower(y), self._lower(h))
        return h, _Kept(h if self.keeps_output else y, *statistics)

    def _lower(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype, memory_format=self.layout)

    def backward(self, upstream: Tensor, kept: _Kept) -> Tensor:
        """dE/dz of this stage, from dE/dh."""
        upstream = self.slope_backward(upstream, kept.slope)
        if self.norm is None:
            return upstream
        return aten.native_batch_norm_backward(
            upstream, kept.z, kept.weight, None, None, kept.mean, kept.rstd, True, self.norm.eps,
            [True, False, False],
        )[0]  # fmt: skip

    def down(self, upstream: Tensor, source: Tensor) -> Tensor:
        """Wᵀ * upstream; of `source`, the convolution's input, only the shape matters."""
        low = self.low.dtype
        source = source.to(low, memory_format=self.layout)
        return aten.convolution_backward(
            upstream.to(low), source, self.low, None, *self.geometry, [True, False, False]
        )[0].to(self.dtype)  # fmt: skip


class ConvPlan(GradientPlan):
    """∇E of a stack, with the weights that it had when the plan was made, or at its last `refresh()`.

    Batches of any size. A call makes no host sync, so that a CUDA graph can capture it, and keeps nothing.
    """

    def __init__(self, stack: Stack, energy: Any, precision: str, reason: str = "") -> None:
        self._energy, self.precision, self._reason = energy, precision, reason
        self._dtype = TYPES[precision]
        self._shape = (stack.channels, *stack.size)
        # Pixels of the smallest feature map with batch statistics, which need two values a channel.
        self._statistics = min((math.prod(s.out_size) for s in stack.stages if s.norm is not None), default=None)
        device = stack.head.device
        layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
        low = device.type == "cuda" and precision != "fp32"
        self._layout = layouts.get(stack.ndim, torch.contiguous_format) if low else torch.contiguous_format
        with torch.inference_mode(False):
            self._layers = [_Layer(stage, i, self._dtype, self._layout) for i, stage in enumerate(stack.stages)]
            self._head = torch.empty_like(stack.head, dtype=self._dtype).unsqueeze(0)
            self._unscale = torch.ones((), dtype=torch.float32, device=device)
            self._example = example_input(stack)
        self._load(stack)

    def refresh(self) -> None:
        """Take the energy's present weights, in place: every tensor of the plan stays where it is.

        Raises BackendError where the energy is no longer the stack that the plan was made for.
        """
        self._load(reread(self._energy, self._example, [layer.fixed for layer in self._layers]))

    def _load(self, stack: Stack) -> None:
        with torch.no_grad(), torch.inference_mode(False):
            for layer, stage in zip(self._layers, stack.stages, strict=True):
                layer.load(stage)
            head = stack.head
            if self._dtype == torch.float16:
                head, unscale = scaled_head(head)
                self._unscale.copy_(unscale)
            self._head.copy_(head.unsqueeze(0))

    def gradient(self, x: Tensor) -> Tensor:  # (N, C, *spatial) float32 -> the same, float32 or bfloat16
        if tuple(x.shape[1:]) != self._shape:
            expected = ", ".join(map(str, self._shape))
            raise ValueError(f"gradient: x must have shape (N, {expected}), got {tuple(x.shape)}")
        if self._statistics is not None and len(x) * self._statistics < 2:
            raise ValueError(
                f"gradient: batch statistics need two values a channel, got {len(x)} samples on a feature map of "
                f"{self._statistics} pixels"
            )
        with torch.no_grad(), exact_cudnn(x.device):
            # One layout inside: a channels-last x then gives the same bits.
            bottom = h = x.contiguous()
            kept = []
            for layer in self._layers:
                h, record = layer.forward(h)
                kept.append(record)
            upstream = self._top(h)
            del h, record
            for layer in reversed(self._layers):
                upstream = layer.backward(upstream, kept.pop())
                upstream = layer.down(upstream, kept[-1].slope if kept else bottom)
            if self._dtype != torch.float16:
                return upstream.contiguous()
            return upstream.to(torch.float32, memory_format=torch.contiguous_format).mul_(self._unscale)

    def _top(self, h: Tensor) -> Tensor:
        """dE/dh_L, the head for every sample; in float16 with what overflowed in the forward pass as NaN."""
        if self._dtype == torch.float16:
            return torch.mul(h, 0.0).add_(self._head)
        return self._head.expand(h.shape).clone(memory_format=self._layout)

    def explain(self) -> PlanReport:
        where = "" if self.precision == "fp32" else "; first convolution, statistics and accumulation in fp32"
        why = (self._reason,) if self._reason else ()
        return PlanReport("conv", self.precision, f"the chain rule by hand{where}", why_not_faster=why)


def _library_is_wrong(stage: Stage) -> bool:
    """Where oneDNN's 16-bit convolutions on CPUs (torch 2.13, AMX) give wrong feature maps (one pixel wide at a stride)
    or crash (dilated over small maps). These stages run in float32."""
    column = stage.out_size[-1] == 1 and math.prod(stage.out_size) > 1 and stage.stride[-1] > 1
    return stage.weight.device.type == "cpu" and (column or max(stage.dilation) > 1)


def _activation(name: str, slope: float) -> tuple[Callable[[Tensor], Tensor], Backward, bool]:
    """(forward, backward, whether the backward reads the output).

    The backward function overwrites its upstream; the forward function its input, unless that is needed again.
    """
    if name == "none":
        return lambda z: z, lambda g, _: g, True
    if name == "relu":
        return torch.relu_, lambda g, out: aten.threshold_backward(g, out, 0, grad_input=g), True
    if name == "leaky_relu":
        # The output has the input's sign only for a positive slope.
        in_place = slope > 0
        return (
            functools.partial(torch.nn.functional.leaky_relu, negative_slope=slope, inplace=in_place),
            lambda g, kept: aten.leaky_relu_backward(g, kept, slope, in_place, grad_input=g),
            in_place,
        )
    if name == "silu":
        return torch.nn.functional.silu, lambda g, z: aten.silu_backward(g, z, grad_input=g), False
    elu_backward = aten.elu_backward
    return torch.nn.functional.elu, lambda g, z: elu_backward(g, 1.0, 1.0, 1.0, False, z, grad_input=g), False
