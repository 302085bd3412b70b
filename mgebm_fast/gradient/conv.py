"""∇E of an EnergyNet by the chain rule written out: data gradient only, weights prepared once, no graph.

    forward    h_0 = x;  z_l = W_l * h_{l−1} + b_l;  h_l = a(z_l)
    backward   g_L = −(head weight, or ones);  g_{l−1} = W_lᵀ * (g_l · a′(z_l))

In float32 these are the very convolutions that autograd calls, and with piecewise linear activations the result is
autograd's bit for bit; what goes is the graph, the head's forward, and for the spectral norm its value at every step.
In bfloat16 all convolutions but the first forward one run on 16-bit operands with float32 accumulation: there pixels of
0–255 would lose up to half a unit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..nets import EnergyNet

aten = torch.ops.aten
# backward(upstream, kept): `kept` is the activation's output, or its input where the output does not tell the slope.
Backward = Callable[[Tensor, Tensor], Tensor]


@functools.cache
def bfloat16_is_fast(device_type: str) -> bool:
    """Whether the CPU multiplies bfloat16 natively (AVX512_BF16 or AMX): elsewhere it is emulated, and slower."""
    if device_type != "cpu":
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in checks)


def why_not(energy: Any, x: Tensor) -> str:
    """Why the conv plan cannot take `energy` on tensors like x; an empty string when it can."""
    if type(energy) is not EnergyNet:
        return f"{type(energy).__name__} is not an EnergyNet"
    if energy.norm == "batch":
        return "norm='batch' couples the samples"
    if x.dtype != torch.float32:
        return f"x is {x.dtype}"
    if x.device.type != "cpu":
        return f"its kernels for {x.device.type} tensors are not written"
    if any(module.observe for module in energy.modules() if hasattr(module, "observe")):
        return "the net is observing data"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in energy.named_modules():
        if any(getattr(module, hook) for hook in hooks) or hasattr(module, "parametrizations"):
            return f"{name or 'the net'} has hooks or parametrisations"
    wrong = next((p for p in energy.parameters() if p.dtype != torch.float32 or p.device != x.device), None)
    if wrong is not None:
        return f"a parameter is {wrong.dtype} on {wrong.device}"
    return ""


class ConvPlan:
    """∇E for one EnergyNet without batch statistics, with the weights that it has now."""

    def __init__(self, net: EnergyNet, precision: str) -> None:
        self._net, self._precision = net, precision
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._activate, self._backward, self._keeps_output = _activation(net.activation, net.negative_slope)
        ones = [1] * net.ndim
        self._layers = []
        with torch.no_grad():
            for index, layer in enumerate(net.convolutions):
                assert layer.bias is not None  # there is one wherever norm is not "batch"
                weight = layer.effective_weight().detach()
                low = weight.to(self._dtype)
                forward = weight if index == 0 else low
                bias = layer.bias.detach().to(forward.dtype)
                geometry = ([layer.stride] * net.ndim, [layer.padding] * net.ndim, ones)
                self._layers.append((forward, bias, low, geometry))
            self._head = None if net.head is None else -net.head.effective_weight().detach()
        self._no_shift = [0] * net.ndim

    def gradient(self, x: Tensor) -> Tensor:  # (N, C, *spatial) float32 -> the same, float32 or bfloat16
        self._net.check_input(x)
        with torch.no_grad():
            # One layout inside: a channels-last x then gives the same bits.
            h = x.contiguous()
            inputs, kept = [], []
            for index, (weight, bias, _, (stride, padding, dilation)) in enumerate(self._layers):
                inputs.append(h)
                z = aten.convolution(h, weight, bias, stride, padding, dilation, False, self._no_shift, 1)
                h = self._activate(z)
                if index == 0:
                    z, h = (h, h.to(self._dtype)) if self._keeps_output else (z.to(self._dtype), h.to(self._dtype))
                kept.append(h if self._keeps_output else z)
            upstream = self._top(h)
            for index in range(len(self._layers) - 1, -1, -1):
                _, _, weight, (stride, padding, dilation) = self._layers[index]
                upstream = self._backward(upstream, kept[index])
                source = inputs[index] if index else inputs[0].to(self._dtype)
                upstream = aten.convolution_backward(
                    upstream, source, weight, None, stride, padding, dilation, False, self._no_shift, 1,
                    [True, False, False],
                )[0]  # fmt: skip
            return upstream

    def _top(self, h: Tensor) -> Tensor:
        """dE/dh_L: minus the head's weight, the same for every sample."""
        if self._head is None:
            return h.new_full((), -1.0).expand(h.shape).contiguous()
        return self._head.to(h.dtype).reshape(1, *h.shape[1:]).expand(h.shape).contiguous()

    def explain(self) -> str:
        if self._precision == "bf16":
            return "conv, bf16, the chain rule by hand, first convolution and accumulation in fp32"
        return "conv, fp32, the chain rule by hand"


def _activation(name: str, slope: float) -> tuple[Callable[[Tensor], Tensor], Backward, bool]:
    """(forward, backward, whether the backward reads the output): in place wherever the input is not needed again."""
    if name == "none":
        return lambda z: z, lambda g, _: g, True
    if name == "relu":
        return torch.relu_, lambda g, out: aten.threshold_backward(g, out, 0), True
    if name == "leaky_relu":
        leaky = functools.partial(torch.nn.functional.leaky_relu, negative_slope=slope)
        # The output has the input's sign only for a positive slope.
        if slope > 0:
            return (
                functools.partial(leaky, inplace=True),
                lambda g, out: aten.leaky_relu_backward(g, out, slope, True),
                True,
            )
        return leaky, lambda g, z: aten.leaky_relu_backward(g, z, slope, False), False
    if name == "silu":
        return torch.nn.functional.silu, lambda g, z: aten.silu_backward(g, z), False
    return torch.nn.functional.elu, lambda g, z: aten.elu_backward(g, 1.0, 1.0, 1.0, False, z), False
