"""What a reading of an energy gives, the stages of a stack of convolutions and the gradient in its top map; and what
turns the layers of a net, one after the other, into these, or gives the reason why one cannot be."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops.conv_chain import ACTIVATIONS
from ..ops.state import why_not_plain

_CONVOLUTIONS: dict[type, int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_NORMS: dict[type, tuple[int, ...]] = {nn.BatchNorm1d: (0, 1), nn.BatchNorm2d: (2,), nn.BatchNorm3d: (3,)}
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
    # Of a shortcut: the index of the stage whose z it reads. It adds to the z of the stage after it, and the stages
    # around it are one behind the other. Only the resident chain takes one.
    shortcut: int | None = None


@dataclasses.dataclass(frozen=True)
class Stack:
    """At least one stage, and the gradient of the energy in the top map."""

    ndim: int
    channels: int  # of x
    size: tuple[int, ...]  # of x
    stages: tuple[Stage, ...]
    head: Tensor  # (C_top, *top size) = dE/d(top map), the same for every sample
    # What was packed of stages of this form, where the reading is kept: `gradient.kept`.
    packed: dict[Any, Any] | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def has_shortcuts(self) -> bool:
        return any(stage.shortcut is not None for stage in self.stages)


class Unreadable(Exception):
    """The reason why an energy is no stack."""


def label(path: str, module: nn.Module) -> str:
    return f"layer {path} ({parametrize.type_before_parametrizations(module).__name__})" if path else "the net"


def _per_dimension(value: Any, ndim: int, least: int, what: str) -> tuple[int, ...]:
    numbers = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(numbers) != ndim or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in numbers):
        raise Unreadable(f"{what} {value!r}")
    return numbers


def _of_length(tensor: Tensor | None, length: int, what: str) -> Tensor | None:
    if tensor is not None and tuple(tensor.shape) != (length,):
        raise Unreadable(f"{what} of shape {tuple(tensor.shape)} for {length} channels")
    return tensor


class Builder:
    """The stages so far, and the shape of the feature map that the last of them returns."""

    def __init__(self, x: Tensor) -> None:
        self.samples, self.ndim = x.shape[0], x.dim() - 2
        if self.ndim not in (1, 2, 3):
            raise Unreadable(f"x must have 1, 2 or 3 spatial dimensions, got shape {tuple(x.shape)}")
        self.x_channels, self.x_size = x.shape[1], tuple(x.shape[2:])
        self.channels, self.size = self.x_channels, self.x_size
        self.stages: list[Stage] = []
        self.open = False  # whether the last stage still takes a normalisation or an activation
        self.flat = self.done = False

    def convolve(
        self, name: str, where: str, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any
    ) -> None:
        if weight.dim() != self.ndim + 2:
            raise Unreadable(f"{where} has a weight of shape {tuple(weight.shape)}")
        if weight.shape[1] != self.channels:
            raise Unreadable(f"{where} takes {weight.shape[1]} channels, got a feature map of {self.channels}")
        kernel = tuple(weight.shape[2:])
        bias = _of_length(bias, weight.shape[0], f"{where} has a bias")
        stride, padding, dilation = (
            _per_dimension(value, self.ndim, least, f"{where} has {name}")
            for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
        )
        out_size = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(self.size, kernel, stride, padding, dilation, strict=True)
        )
        if min(out_size) < 1:
            raise Unreadable(f"{where} has a kernel larger than its feature map of {self.size}")
        self.stages.append(
            Stage(name, weight.detach(), None if bias is None else bias.detach(), stride, padding, dilation, None,
                  "none", 1.0, self.size, out_size)
        )  # fmt: skip
        self.channels, self.size, self.open = weight.shape[0], out_size, True

    def batch_norm(self, where: str, weight: Tensor, bias: Tensor, eps: float) -> None:
        if self.samples * math.prod(self.size) <= 1:
            raise Unreadable(f"{where} has batch statistics, and one value a channel")
        if not eps > 0:
            raise Unreadable(f"{where} has eps {eps}")
        for name, tensor in (("weight", weight), ("bias", bias)):
            _of_length(tensor, self.channels, f"{where} has a norm's {name}")
        norm = BatchNorm(weight.detach(), bias.detach(), eps)
        self.stages[-1] = dataclasses.replace(self.stages[-1], norm=norm, bias=None)

    def activate(self, where: str, activation: str, slope: float) -> None:
        if not self.open:
            raise Unreadable(f"{where} comes right after no convolution")
        if activation not in ACTIVATIONS:
            raise Unreadable(f"{where} is {activation!r}, which no plan computes by hand")
        if isinstance(slope, bool) or not isinstance(slope, (int, float)) or not math.isfinite(slope):
            raise Unreadable(f"{where} has slope {slope!r}")
        self.stages[-1] = dataclasses.replace(self.stages[-1], activation=activation, slope=float(slope))
        self.open = False

    def take(self, path: str, module: nn.Module) -> None:
        """The next layer of a Sequential."""
        where, kind = label(path, module), parametrize.type_before_parametrizations(module)
        # In train mode a parametrisation may change what it gives at every forward, as the spectral norm's does.
        if parametrize.is_parametrized(module) and module.training:
            raise Unreadable(f"{where} has parametrisations and is in train mode")
        for name in getattr(module, "parametrizations", ()):
            if not torch.equal(getattr(module, name), getattr(module, name)):
                raise Unreadable(f"{where} has a {name} that is random")
        if kind is nn.Identity:
            return
        if isinstance(module, _DROPOUTS) and kind in _DROPOUTS:
            if module.training and module.p > 0:
                raise Unreadable(f"{where} is random in train mode")
            return
        if self.done:
            raise Unreadable(f"{where} comes after the Flatten that gives one energy a sample")
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
                raise Unreadable(f"{where} has alpha={module.alpha}")
            self.activate(where, "elu", 1.0)
        else:
            raise Unreadable(f"{where} is of no kind that can be read")

    def _take_convolution(self, path: str, where: str, module: Any, ndim: int) -> None:
        if self.flat or ndim != self.ndim:
            raise Unreadable(f"{where} takes {ndim} spatial dimensions, got {0 if self.flat else self.ndim}")
        if module.groups != 1:
            raise Unreadable(f"{where} has groups={module.groups}")
        if module.padding_mode != "zeros":
            raise Unreadable(f"{where} has padding_mode={module.padding_mode!r}")
        padding = module.padding
        if padding == "valid":
            padding = 0
        elif padding == "same":
            kernel = module.weight.shape[2:]
            total = [d * (k - 1) for d, k in zip(module.dilation, kernel, strict=True)]
            if any(length % 2 for length in total):
                raise Unreadable(f"{where} has padding='same' and an even kernel, which pads unevenly")
            padding = [length // 2 for length in total]
        self.convolve(path, where, module.weight, module.bias, module.stride, padding, module.dilation)

    def _take_linear(self, path: str, where: str, module: nn.Linear) -> None:
        features = self.channels * math.prod(self.size)
        if not self.flat:
            raise Unreadable(f"{where} comes without a Flatten before it")
        if module.weight.dim() != 2 or module.weight.shape[1] != features:
            raise Unreadable(f"{where} takes {module.weight.shape[-1]} features, got {features}")
        weight = module.weight.reshape(-1, self.channels, *self.size)
        self.convolve(path, where, weight, module.bias, 1, 0, 1)

    def _take_norm(self, where: str, module: Any, dims: tuple[int, ...]) -> None:
        if not self.open:
            raise Unreadable(f"{where} comes right after no convolution or Linear")
        if self.flat and math.prod(self.size) != 1:
            raise Unreadable(f"{where} normalises every pixel of a flattened feature map by itself")
        held = (module.weight, module.bias, module.running_mean, module.running_var)
        fits = all(tensor is None or tuple(tensor.shape) == (self.channels,) for tensor in held)
        if (0 if self.flat else self.ndim) not in dims or not fits:
            raise Unreadable(f"{where} does not fit a feature map of shape {(self.channels, *self.size)}")
        stage = self.stages[-1]
        if stage.norm is not None:
            raise Unreadable(f"{where} follows another batch norm")
        weight = stage.weight.new_ones(self.channels) if module.weight is None else module.weight
        bias = torch.zeros_like(weight) if module.bias is None else module.bias
        if module.training or (module.running_mean is None and module.running_var is None):
            self.batch_norm(where, weight, bias, module.eps)
            return
        if module.running_mean is None or module.running_var is None or not module.eps >= 0:
            raise Unreadable(f"{where} has half of its running statistics, or eps {module.eps}")
        scale = weight / torch.sqrt(module.running_var + module.eps)
        mean = module.running_mean if stage.bias is None else module.running_mean - stage.bias
        folded = stage.weight * scale.reshape(-1, *[1] * (self.ndim + 1))
        self.stages[-1] = dataclasses.replace(stage, weight=folded, bias=bias - mean * scale)

    def _take_flatten(self, where: str, module: nn.Flatten) -> None:
        dims = 2 if self.flat else self.ndim + 2
        if not (-dims <= module.start_dim < dims and -dims <= module.end_dim < dims):
            raise Unreadable(f"{where} has dimensions out of the range of {dims}")
        start, end = module.start_dim % dims, module.end_dim % dims
        features = self.channels * math.prod(self.size)
        if end != dims - 1 or start not in (0, 1) or (start == 0 and features != 1):
            raise Unreadable(f"{where} gives neither (N, features) nor one energy a sample")
        self.flat, self.done = True, start == 0

    def finish(self) -> Stack:
        """The stack of a Sequential; a last Linear without an activation becomes its head."""
        if not self.done:
            raise Unreadable(
                f"it returns feature maps of shape {(self.channels, *self.size)}; Linear(…, 1) and Flatten(0) at its "
                "end give one energy a sample"
            )
        if not self.stages:
            raise Unreadable("it has no convolution")
        last = self.stages[-1]
        covers = tuple(last.weight.shape[2:]) == last.in_size and not any(last.padding)
        if covers and last.norm is None and last.activation == "none" and len(self.stages) > 1:
            self.stages.pop()
            return self.stack(last.weight[0])
        return self.stack(last.weight.new_ones(self.channels, *self.size))

    def stack(self, head: Tensor) -> Stack:
        for stage in self.stages:
            norm = () if stage.norm is None else (stage.norm.weight, stage.norm.bias)
            for tensor in (stage.weight, stage.bias, *norm):
                if tensor is not None and (tensor.dtype != torch.float32 or why_not_plain(tensor)):
                    raise Unreadable(f"layer {stage.name} has a {tensor.dtype} weight that is {why_not_plain(tensor)}")
        return Stack(self.ndim, self.x_channels, self.x_size, tuple(self.stages), head.detach())
