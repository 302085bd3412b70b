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
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BackendError
from ..nets import EnergyNet, Negative, ResidualNet
from ..nets.layers import BN_EPS, BatchStatistics, ConvLayer, LinearHead
from ..nets.residual import Activation, ResidualBlock
from ..ops.conv_chain.sharing import once
from ..ops.state import why_not_plain
from .builder import BatchNorm, Builder, Stack, Stage, Unreadable, label
from .trust import why_not_read

__all__ = ["BatchNorm", "Stack", "Stage", "example_input", "layout_of", "read", "reread"]


def read(energy: Any, x: Tensor, *, blocks: bool = False) -> Stack | str:  # x: (N, C, *spatial); its form alone counts
    """The stack of `energy` for tensors like x; or the reason, naming the layer, why it cannot be read as one.

    Read are EnergyNet (not its subclasses), the `Negative` of what is read, and nn.Sequential, nested or not, of
    Conv1d/2d/3d (zero padding, one group), BatchNorm right after a convolution or Linear, ReLU, LeakyReLU, SiLU, ELU
    (alpha 1), Identity, Dropout that does nothing, Flatten and Linear, that ends in Flatten(0), so that it returns
    (N,). Hooks, methods put on an instance and tensors that are not plain memory make a net one that is not read.
    With `blocks` a ResidualNet without labels is read too, as stages with shortcuts.
    """

    def make() -> Stack | str:
        try:
            return _read(energy, x, blocks)
        except Unreadable as reason:
            return str(reason)

    return once(("stack", id(energy), x.shape, x.dtype, x.device, blocks), energy, make)


def reread(energy: Any, x: Tensor, forms: Sequence[tuple[Any, ...]] | None = None, *, blocks: bool = False) -> Stack:
    """The stack of `energy` as it is now, for a plan that takes layers of these forms alone; None: of any.

    Raises BackendError where the energy is no longer such a stack.
    """
    stack = read(energy, x, blocks=blocks)
    if isinstance(stack, str):
        raise BackendError(f"refresh: the energy must still be a stack of convolutions, but {stack}")
    if forms is not None and [layout_of(stage) for stage in stack.stages] != list(forms):
        raise BackendError("refresh: the energy's layers must be those that the plan was made for; make a new plan")
    return stack


def layout_of(stage: Stage) -> tuple[Any, ...]:
    """The properties of a stage that are fixed when a plan is made."""
    eps = None if stage.norm is None else stage.norm.eps
    return (
        stage.weight.shape, stage.bias is None, stage.stride, stage.padding, stage.dilation, eps, stage.activation,
        stage.slope, stage.shortcut,
    )  # fmt: skip


def example_input(stack: Stack) -> Tensor:  # (2, C, *size), expanded from one element
    """An x of the shape that a plan was made for, to read its energy again with."""
    return torch.empty((), dtype=torch.float32, device=stack.head.device).expand(2, stack.channels, *stack.size)


@torch.no_grad()
def _read(energy: Any, x: Tensor, blocks: bool) -> Stack:
    if type(energy) is Negative:
        stack = _read(energy.f, x, blocks)
        if reason := why_not_read(energy):
            raise Unreadable(reason)
        return dataclasses.replace(stack, head=-stack.head)
    if type(energy) not in ((EnergyNet, nn.Sequential, ResidualNet) if blocks else (EnergyNet, nn.Sequential)):
        raise Unreadable(f"{type(energy).__name__} is not an EnergyNet or nn.Sequential")
    if x.dtype != torch.float32:
        raise Unreadable(f"x is {x.dtype}")
    builder = Builder(x)
    if reason := why_not_read(energy):
        raise Unreadable(reason)
    tensors = [*energy.named_parameters(), *((n, b) for n, b in energy.named_buffers() if b.is_floating_point())]
    for path, tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device != x.device:
            raise Unreadable(f"{path} is {tensor.dtype} on {tensor.device}")
        if reason := why_not_plain(tensor):
            raise Unreadable(f"{path} is {reason}")
    if isinstance(energy, EnergyNet):
        return _read_energy_net(energy, x, builder)
    if isinstance(energy, ResidualNet):
        return _read_residual_net(energy, x)
    for path, module in _flat(energy):
        builder.take(path, module)
    return builder.finish()


def _read_energy_net(net: EnergyNet, x: Tensor, builder: Builder) -> Stack:
    known = (EnergyNet, nn.ModuleList, ConvLayer, BatchStatistics, LinearHead)
    for path, module in net.named_modules():
        if type(module) not in known:
            raise Unreadable(f"{label(path, module)} is not one of EnergyNet's own")
        if getattr(module, "observe", False):
            raise Unreadable("the net is observing data")
    try:
        net.check_input(x)
    except ValueError as error:
        raise Unreadable(str(error)) from None
    for index, layer in enumerate(net.layers):
        where = f"layer layers.{index} (ConvLayer)"
        if not isinstance(layer, ConvLayer) or not isinstance(layer.norm, (BatchStatistics, NoneType)):
            raise Unreadable(f"layer layers.{index} is not a layer that an EnergyNet makes")
        builder.convolve(f"layers.{index}", where, layer.effective_weight(), layer.bias, layer.stride, layer.padding, 1)
        if layer.norm is not None:
            builder.batch_norm(where, layer.norm.weight, layer.norm.bias, BN_EPS)
        slope = {"leaky_relu": layer.negative_slope, "relu": 0.0}.get(layer.activation, 1.0)
        builder.activate(where, layer.activation, slope)
    shape = (builder.channels, *builder.size)
    if net.head is None:
        return builder.stack(-x.new_ones(shape))
    if not isinstance(net.head, LinearHead) or tuple(net.head.weight.shape) != (1, math.prod(shape)):
        raise Unreadable(f"the head does not fit a feature map of shape {shape}")
    return builder.stack(-net.head.effective_weight().reshape(shape))


def _read_residual_net(net: ResidualNet, x: Tensor) -> Stack:
    """Pooling, the mean over blocks of 2 pixels a dimension, is made a part of the convolution before it, whose kernel
    it widens to 4, at stride 2, and of the shortcut's."""
    if net.labels is not None:
        raise Unreadable("the net takes labels")
    if any(getattr(module, "observe", False) for module in net.modules()):
        raise Unreadable("the net is observing data")
    try:
        net.check_input(x)
    except ValueError as error:
        raise Unreadable(str(error)) from None
    ndim, stages = x.dim() - 2, list[Stage]()
    one, slope = (1,) * ndim, {"leaky_relu": net.negative_slope, "relu": 0.0}.get(net.activation, 1.0)

    def check(name: str, layer: Any, kind: type, activation: str, kernel: int = 0) -> None:
        form = [type(layer), getattr(layer, "activation", None), getattr(layer, "negative_slope", None)]
        form += [layer.stride, layer.padding, layer.norm, layer.weight.shape[2:]] if form[0] is ConvLayer else []
        known = [kind, activation, net.negative_slope]
        if form != known + ([1, kernel // 2, None, (kernel,) * ndim] if kind is ConvLayer else []):
            raise Unreadable(f"layer {name} is not a layer that a ResidualNet makes")

    def add(name: str, weight: Tensor, bias: Tensor | None, size: tuple[int, ...], shortcut: int | None = None) -> None:
        stride, padding = (2 if weight.shape[2] % 2 == 0 else 1,) * ndim, ((weight.shape[2] - 1) // 2,) * ndim
        out = tuple(length // stride[0] for length in size)
        activation = net.activation if shortcut is None else "none"
        stages.append(
            Stage(name, weight, bias, stride, padding, one, None, activation, slope, size, out, shortcut=shortcut)
        )

    layers: Any = net.layers  # of types that are checked here
    for index, layer in enumerate(layers):
        name, size = f"layers.{index}", stages[-1].out_size if stages else tuple(x.shape[2:])
        if not stages:
            check(name, layer, ConvLayer, "none", 3)
            add(name, layer.effective_weight(), layer.bias, size)
        elif index + 1 == len(layers):
            check(name, layer, Activation, net.activation)
        else:
            check(name, layer, ResidualBlock, net.activation)
            check(f"{name}.first", layer.first, ConvLayer, net.activation, 3)
            check(f"{name}.second", layer.second, ConvLayer, "none", 3)
            source, last = len(stages) - 1, layer.second.effective_weight()
            add(f"{name}.first", layer.first.effective_weight(), layer.first.bias, size)
            bias: Tensor | None = layer.second.bias
            skip = torch.eye(len(last), device=x.device).reshape(-1, len(last), *one)
            if layer.shortcut is not None:
                check(f"{name}.shortcut", layer.shortcut, ConvLayer, "none", 1)
                assert layer.second.bias is not None and layer.shortcut.bias is not None
                bias, skip = layer.second.bias + layer.shortcut.bias, layer.shortcut.effective_weight()
            if layer.pool:
                last, skip = _pooled(last), _pooled(skip)
            add(f"{name}.shortcut", skip, None, size, shortcut=source)
            add(f"{name}.second", last, bias, size)
    channels, top = net.stages[-1], stages[-1].out_size
    head = -net.head.effective_weight().reshape(channels, *(top if net.head_kind == "linear" else one))
    if net.head_kind == "mean":
        head = head / math.prod(top)
    return Stack(ndim, net.channels, tuple(x.shape[2:]), tuple(stages), head.expand(channels, *top))


def _pooled(weight: Tensor) -> Tensor:  # (out, in, *kernel) -> one tap more a dimension, for stride 2
    """The convolution whose result is the mean over blocks of 2 pixels a dimension of that of `weight`."""
    for dim in range(2, weight.dim()):
        pads = [0, 0] * (weight.dim() - 1 - dim)
        weight = (F.pad(weight, [*pads, 0, 1]) + F.pad(weight, [*pads, 1, 0])) / 2
    return weight


def _flat(module: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of a Sequential in order, those of nested ones in their place, with their paths."""
    for name, child in module._modules.items():  # named_children() leaves out a module's second place
        if child is None:
            raise Unreadable(f"layer {prefix}{name} is None")
        if type(child) is nn.Sequential:
            yield from _flat(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child
