"""An energy read as a stack of convolutions: what every plan but autograd works from.

    h_0 = x;   z_l = W_l * h_{l−1} + b_l;   y_l = z_l, or its batch normalisation;   h_l = a_l(y_l)
    dE/dh_L = head, the same for every sample

An EnergyNet returns −f(x), so its head is minus f's; an nn.Sequential returns E itself. Normalisation by running
statistics (eval mode) is folded into W and b. A batch norm in train mode, or without running statistics, is read as
batch statistics with the exact gradient through them; plans leave its running statistics alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import BackendError
from ..nets import EnergyNet
from ..nets.layers import BN_EPS, BatchStatistics, ConvLayer, LinearHead

_CONVOLUTIONS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_NORMS: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """y = weight · (z − mean) / √(var + eps) + bias, mean and biased variance of a channel over (N, *spatial)."""

    weight: Tensor  # (out,)
    bias: Tensor  # (out,)
    eps: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """One convolution with what follows it. Tensors are float32 and may share memory with the net's parameters."""

    name: str  # module path, for messages
    weight: Tensor  # (out, in, *kernel), as used: divided by its spectral norm, running statistics folded in
    bias: Tensor | None  # (out,); None where batch statistics, which subtract it, follow
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    norm: BatchNorm | None
    activation: str  # none | relu | leaky_relu | silu | elu
    slope: float  # of leaky_relu; 0 for relu, 1 for none
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Stack:
    """At least one stage, and the gradient of the energy in the top map."""

    ndim: int
    channels: int  # of x
    size: tuple[int, ...]  # of x
    stages: tuple[Stage, ...]
    head: Tensor  # (C_top, *top size) = dE/d(top map), the same for every sample
    coupled: bool  # whether any stage has batch statistics


class _Unreadable(Exception):
    """The reason why an energy is no stack."""


def read(energy: Any, x: Tensor) -> Stack | str:  # x: (N, C, *spatial); only its shape, dtype and device are used
    """The stack of `energy` for tensors like x; or the reason, naming the layer, why it cannot be read as one.

    Read are EnergyNet (not its subclasses), and nn.Sequential, nested or not, of Conv1d/2d/3d (zero padding, one
    group), BatchNorm right after a convolution or Linear, ReLU, LeakyReLU, SiLU, ELU (alpha 1), Identity, Dropout that
    does nothing, Flatten and Linear, that ends in Flatten(0), so that it returns (N,).
    """
    try:
        return _read(energy, x)
    except _Unreadable as reason:
        return str(reason)


def reread(energy: Any, x: Tensor, forms: Sequence[tuple[Any, ...]] | None = None) -> Stack:
    """The stack of `energy` as it is now, for a plan that takes layers of these forms alone; None: of any.

    Raises BackendError where the energy is no longer such a stack.
    """
    stack = read(energy, x)
    if isinstance(stack, str):
        raise BackendError(f"refresh: the energy must still be a stack of convolutions, but {stack}")
    if forms is not None and [layout_of(stage) for stage in stack.stages] != list(forms):
        raise BackendError("refresh: the energy's layers must be those that the plan was made for; make a new plan")
    return stack


def layout_of(stage: Stage) -> tuple[Any, ...]:
    """What of a stage a plan cannot change."""
    eps = None if stage.norm is None else stage.norm.eps
    return (
        stage.weight.shape, stage.bias is None, stage.stride, stage.padding, stage.dilation, eps, stage.activation,
        stage.slope,
    )  # fmt: skip


def example_input(stack: Stack) -> Tensor:  # (2, C, *size), without memory of its own
    """What a plan reads its energy again for."""
    return torch.empty((), dtype=torch.float32, device=stack.head.device).expand(2, stack.channels, *stack.size)


@torch.no_grad()
def _read(energy: Any, x: Tensor) -> Stack:
    if type(energy) not in (EnergyNet, nn.Sequential):
        raise _Unreadable(f"{type(energy).__name__} is not an EnergyNet or nn.Sequential")
    if x.dtype != torch.float32:
        raise _Unreadable(f"x is {x.dtype}")
    for path, module in energy.named_modules():
        if any(getattr(module, hook) for hook in _HOOKS) or "forward" in vars(module):
            raise _Unreadable(f"{_label(path, module)} has hooks or a forward of its own")
    tensors = [*energy.named_parameters(), *((n, b) for n, b in energy.named_buffers() if b.is_floating_point())]
    for path, tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device != x.device:
            raise _Unreadable(f"{path} is {tensor.dtype} on {tensor.device}")
    builder = _Builder(x)
    if isinstance(energy, EnergyNet):
        return _read_energy_net(energy, x, builder)
    for path, module in _flat(energy):
        builder.take(path, module)
    return builder.finish()


def _read_energy_net(net: EnergyNet, x: Tensor, builder: _Builder) -> Stack:
    known = (EnergyNet, nn.ModuleList, ConvLayer, BatchStatistics, LinearHead)
    for path, module in net.named_modules():
        if type(module) not in known:
            raise _Unreadable(f"{_label(path, module)} is not one of EnergyNet's own")
        if getattr(module, "observe", False):
            raise _Unreadable("the net is observing data")
    try:
        net.check_input(x)
    except ValueError as error:
        raise _Unreadable(str(error)) from None
    for index, layer in enumerate(net.convolutions):
        where = f"layer layers.{index} (ConvLayer)"
        builder.convolve(f"layers.{index}", where, layer.effective_weight(), layer.bias, layer.stride, layer.padding, 1)
        if layer.norm is not None:
            builder.batch_norm(where, layer.norm.weight, layer.norm.bias, BN_EPS)
        slope = {"leaky_relu": net.negative_slope, "relu": 0.0}.get(net.activation, 1.0)
        builder.activate(where, net.activation, slope)
    shape = (builder.channels, *builder.size)
    head = x.new_ones(shape) if net.head is None else net.head.effective_weight().reshape(shape)
    return builder.stack(-head)


def _label(path: str, module: nn.Module) -> str:
    return f"layer {path} ({parametrize.type_before_parametrizations(module).__name__})" if path else "the net"


def _flat(module: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a Sequential in order, those of nested ones in their place, with their paths."""
    for name, child in module._modules.items():  # named_children() leaves out a module's second place
        assert child is not None
        if type(child) is nn.Sequential:
            yield from _flat(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _per_dimension(value: Any, ndim: int) -> tuple[int, ...]:
    return (value,) * ndim if isinstance(value, int) else tuple(value)


class _Builder:
    """The stages so far, and the map that the last of them gives."""

    def __init__(self, x: Tensor) -> None:
        self.samples, self.ndim = x.shape[0], x.dim() - 2
        if self.ndim not in (1, 2, 3):
            raise _Unreadable(f"x must have 1, 2 or 3 spatial dimensions, got shape {tuple(x.shape)}")
        self.x_channels, self.x_size = x.shape[1], tuple(x.shape[2:])
        self.channels, self.size = self.x_channels, self.x_size
        self.stages: list[Stage] = []
        self.open = False  # whether the last stage still takes a normalisation or an activation
        self.flat = self.done = False

    def convolve(
        self, name: str, where: str, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
    ) -> None:
        if weight.dtype != torch.float32:
            raise _Unreadable(f"{where} has a weight of {weight.dtype}")
        if weight.shape[1] != self.channels:
            raise _Unreadable(f"{where} takes {weight.shape[1]} channels, got a map of {self.channels}")
        kernel = tuple(weight.shape[2:])
        stride, padding, dilation = (_per_dimension(value, self.ndim) for value in (stride, padding, dilation))
        out_size = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(self.size, kernel, stride, padding, dilation, strict=True)
        )
        if min(out_size) < 1:
            raise _Unreadable(f"{where} has a kernel larger than its map of {self.size}")
        self.stages.append(
            Stage(name, weight.detach(), None if bias is None else bias.detach(), stride, padding, dilation, None,
                  "none", 1.0, self.size, out_size)
        )  # fmt: skip
        self.channels, self.size, self.open = weight.shape[0], out_size, True

    def batch_norm(self, where: str, weight: Tensor, bias: Tensor, eps: float) -> None:
        if self.samples * math.prod(self.size) <= 1:
            raise _Unreadable(f"{where} has batch statistics, and one value a channel")
        if eps <= 0:
            raise _Unreadable(f"{where} has eps {eps}")
        norm = BatchNorm(weight.detach(), bias.detach(), eps)
        self.stages[-1] = dataclasses.replace(self.stages[-1], norm=norm, bias=None)

    def activate(self, where: str, activation: str, slope: float) -> None:
        if not self.open:
            raise _Unreadable(f"{where} comes right after no convolution")
        self.stages[-1] = dataclasses.replace(self.stages[-1], activation=activation, slope=float(slope))
        self.open = False

    def take(self, path: str, module: nn.Module) -> None:
        """The next layer of a Sequential."""
        where, kind = _label(path, module), parametrize.type_before_parametrizations(module)
        # In train mode a parametrisation may change what it gives at every forward, as the spectral norm's does.
        if parametrize.is_parametrized(module) and module.training:
            raise _Unreadable(f"{where} has parametrisations and is in train mode")
        if kind is nn.Identity:
            return
        if isinstance(module, _DROPOUTS) and kind in _DROPOUTS:
            if module.training and module.p > 0:
                raise _Unreadable(f"{where} is random in train mode")
            return
        if self.done:
            raise _Unreadable(f"{where} comes after the Flatten that gives one energy a sample")
        if kind in _CONVOLUTIONS:
            self._take_convolution(path, where, module, _CONVOLUTIONS[kind])
        elif isinstance(module, nn.Linear) and kind is nn.Linear:
            self._take_linear(path, where, module)
        elif kind in _NORMS:
            self._take_norm(where, module, _NORMS[kind])
        elif isinstance(module, nn.Flatten) and kind is nn.Flatten:
            self._take_flatten(where, module)
        elif kind is nn.ReLU:
            self.activate(where, "relu", 0.0)
        elif isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
            self.activate(where, "leaky_relu", module.negative_slope)
        elif kind is nn.SiLU:
            self.activate(where, "silu", 1.0)
        elif isinstance(module, nn.ELU) and kind is nn.ELU:
            if module.alpha != 1.0:
                raise _Unreadable(f"{where} has alpha={module.alpha}")
            self.activate(where, "elu", 1.0)
        else:
            raise _Unreadable(f"{where} is of no kind that can be read")

    def _take_convolution(self, path: str, where: str, module: Any, ndim: int) -> None:
        if self.flat or ndim != self.ndim:
            raise _Unreadable(f"{where} takes {ndim} spatial dimensions, got {0 if self.flat else self.ndim}")
        if module.groups != 1:
            raise _Unreadable(f"{where} has groups={module.groups}")
        if module.padding_mode != "zeros":
            raise _Unreadable(f"{where} has padding_mode={module.padding_mode!r}")
        padding = module.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if any(length % 2 for length in total):
                raise _Unreadable(f"{where} has padding='same' and an even kernel, which pads unevenly")
            padding = [length // 2 for length in total]
        self.convolve(path, where, module.weight, module.bias, module.stride, padding, module.dilation)

    def _take_linear(self, path: str, where: str, module: nn.Linear) -> None:
        features = self.channels * math.prod(self.size)
        if not self.flat:
            raise _Unreadable(f"{where} comes without a Flatten before it")
        if module.in_features != features:
            raise _Unreadable(f"{where} takes {module.in_features} features, got {features}")
        weight = module.weight.reshape(-1, self.channels, *self.size)
        self.convolve(path, where, weight, module.bias, 1, 0, 1)

    def _take_norm(self, where: str, module: Any, dims: tuple[int, ...]) -> None:
        if not self.open:
            raise _Unreadable(f"{where} comes right after no convolution or Linear")
        if self.flat and math.prod(self.size) != 1:
            raise _Unreadable(f"{where} normalises every pixel of a flattened map by itself")
        if (0 if self.flat else self.ndim) not in dims or module.num_features != self.channels:
            raise _Unreadable(f"{where} does not fit a map of shape {(self.channels, *self.size)}")
        stage = self.stages[-1]
        if stage.norm is not None:
            raise _Unreadable(f"{where} follows another batch norm")
        weight = stage.weight.new_ones(self.channels) if module.weight is None else module.weight
        bias = torch.zeros_like(weight) if module.bias is None else module.bias
        if module.training or (module.running_mean is None and module.running_var is None):
            self.batch_norm(where, weight, bias, module.eps)
            return
        scale = weight / torch.sqrt(module.running_var + module.eps)
        mean = module.running_mean if stage.bias is None else module.running_mean - stage.bias
        folded = stage.weight * scale.reshape(-1, *[1] * (self.ndim + 1))
        self.stages[-1] = dataclasses.replace(stage, weight=folded, bias=bias - mean * scale)

    def _take_flatten(self, where: str, module: nn.Flatten) -> None:
        dims = 2 if self.flat else self.ndim + 2
        start, end = module.start_dim % dims, module.end_dim % dims
        features = self.channels * math.prod(self.size)
        if end != dims - 1 or start not in (0, 1) or (start == 0 and features != 1):
            raise _Unreadable(f"{where} gives neither (N, features) nor one energy a sample")
        self.flat, self.done = True, start == 0

    def finish(self) -> Stack:
        """The stack of a Sequential; a last Linear without an activation becomes its head."""
        if not self.done:
            raise _Unreadable(
                f"it returns maps of shape {(self.channels, *self.size)}; Linear(…, 1) and Flatten(0) at its end "
                "give one energy a sample"
            )
        if not self.stages:
            raise _Unreadable("it has no convolution")
        last = self.stages[-1]
        covers = tuple(last.weight.shape[2:]) == last.in_size and not any(last.padding)
        if covers and last.norm is None and last.activation == "none" and len(self.stages) > 1:
            self.stages.pop()
            return self.stack(last.weight[0])
        return self.stack(last.weight.new_ones(self.channels, *self.size))

    def stack(self, head: Tensor) -> Stack:
        coupled = any(stage.norm is not None for stage in self.stages)
        return Stack(self.ndim, self.x_channels, self.x_size, tuple(self.stages), head.detach(), coupled)
