"""The layers of an energy as a graph, over feature maps, each with its float64 reference.

A value is a map (channels, *size) a sample; a vector of features is a map of one pixel, size (). Value 0 is x, value
i + 1 what layer i gives.
"""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .functions import FUNCTIONS

Size = tuple[int, ...]
# One output of a dimension: its (input index, weight) pairs.
Axis = tuple[tuple[tuple[int, float], ...], ...]


@dataclasses.dataclass(frozen=True)
class Map:
    """The shape of a value."""

    channels: int
    size: Size

    @property
    def pixels(self) -> int:
        return math.prod(self.size)


@dataclasses.dataclass(frozen=True)
class Layer:
    """`inputs`: the values that it reads; `out`: what it gives; `name`: of the module and op, for messages."""

    inputs: tuple[int, ...]
    out: Map
    name: str

    @property
    def rows(self) -> list[int]:
        """The lengths of its constants that hold a row a sample."""
        return []

    def reference(self, *inputs: Tensor) -> Tensor:  # (N, C, *size) -> (N, C', *size')
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Kernel(Layer):
    """What slides a kernel over maps of any number of dimensions."""

    weight: Tensor  # (out, in, *kernel), of a transposed convolution (in, out, *kernel)
    bias: Tensor | None  # (out,)
    stride: Size
    padding: Size
    dilation: Size


@dataclasses.dataclass(frozen=True)
class Forward(Kernel):
    """One whose weight begins with the channels that it makes."""

    def scaled(self, scale: Tensor | None, shift: Tensor | None) -> Forward:
        """Followed by a scale and a shift of each channel."""
        weight, bias = self.weight, self.bias
        if scale is not None:
            weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
            bias = None if bias is None else bias * scale
        if shift is not None:
            bias = shift if bias is None else bias + shift
        return dataclasses.replace(self, weight=weight, bias=bias)

    def reference(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        bias = None if self.bias is None else self.bias.to(x.dtype)
        weight = self.weight.to(x.dtype)
        if x.dim() == 2:
            return F.linear(x, weight, bias)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        groups = x.shape[1] // weight.shape[1]
        out = convolve(x, weight, bias, self.stride, self.padding, self.dilation, groups)
        return out.reshape(len(x), self.out.channels, *self.out.size)


@dataclasses.dataclass(frozen=True)
class Convolution(Forward):
    """W * x + b; a kernel of x's size without padding makes a map one pixel."""

    def covers(self, size: Size) -> bool:
        """Whether it reads all of a map of this size at once: a dense layer on it."""
        return bool(size) and tuple(self.weight.shape[2:]) == size and not any(self.padding)


@dataclasses.dataclass(frozen=True)
class Depthwise(Forward):
    """Every channel convolved by itself, with a kernel of its own: weight (C, 1, *kernel)."""


@dataclasses.dataclass(frozen=True)
class Transposed(Kernel):
    """A transposed convolution, as the data gradient of one that would make x of what this makes."""

    def reference(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        bias = None if self.bias is None else self.bias.to(x.dtype)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[x.dim() - 3]
        numbers = zip(x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        least = [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in numbers]
        more = [n - m for n, m in zip(self.out.size, least, strict=True)]
        return convolve(x, self.weight.to(x.dtype), bias, self.stride, self.padding, more, 1, self.dilation)


@dataclasses.dataclass(frozen=True)
class Gather(Layer):
    """Each output pixel a weighted sum of pixels, dimension by dimension: average pooling, sums and means over pixels,
    upsampling, padding, cropping, flips."""

    axes: tuple[Axis, ...]  # one a dimension of x
    drops: bool = False  # whether the map that it gives is one pixel, size ()

    def reference(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        for dim, axis in enumerate(self.axes):
            matrix = x.new_zeros(len(axis), x.shape[dim + 2])
            for output, taps in enumerate(axis):
                for at, weight in taps:
                    matrix[output, at] += weight
            x = torch.tensordot(x, matrix, ([dim + 2], [1])).movedim(-1, dim + 2)
        return x.flatten(1) if self.drops else x


@dataclasses.dataclass(frozen=True)
class Rearrange(Layer):
    """Elements in another order, each any number of times: out[i] = x[places[i]], both in (channel, pixel) order."""

    places: tuple[int, ...]

    def reference(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return x.flatten(1)[:, list(self.places)].reshape(len(x), self.out.channels, *self.out.size)


@dataclasses.dataclass(frozen=True)
class MaxPool(Layer):
    """The greatest value of each window, the first of them where several are."""

    kernel: Size
    stride: Size
    padding: Size
    dilation: Size

    def reference(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.dim() - 3]
        x = F.pad(x, [p for p in reversed(self.padding) for _ in (0, 1)], value=-math.inf)
        out = pool(x, self.kernel, self.stride, 0, self.dilation)
        for dim, length in enumerate(self.out.size):
            out = out.narrow(dim + 2, 0, length)
        return out


@dataclasses.dataclass(frozen=True)
class Pointwise(Layer):
    """A function of each number."""

    function: str  # a key of FUNCTIONS
    a: float = 0.0
    b: float = 0.0

    def reference(self, *inputs: Tensor) -> Tensor:
        return FUNCTIONS[self.function][1](inputs[0], self.a, self.b)


def is_of_samples(tensor: Tensor, out: Map) -> bool:
    """Whether a constant of an affine layer holds a row a sample: it has a dimension more than a sample's map."""
    return tensor.dim() == len(out.size) + 2


def as_rows(tensor: Tensor, out: Map) -> Tensor:
    """A constant (C,), (C, *size), (N, C, *size) or (N, C, 1, …) as (1 or N, C, 1 or pixels)."""
    samples = len(tensor) if is_of_samples(tensor, out) else 1
    return tensor.reshape(samples, out.channels, -1)


@dataclasses.dataclass(frozen=True)
class Affine(Layer):
    """x · scale + shift, each (C,) or (C, *size), or a row a sample, (N, C, *size) or (N, C, 1, …); None: 1, 0.

    One row stands for any number of samples. It is computed with as several rows are, so that a sample's bits do not
    depend on what the others' rows are.
    """

    scale: Tensor | None
    shift: Tensor | None

    @property
    def rows(self) -> list[int]:
        return [len(t) for t in (self.scale, self.shift) if t is not None and is_of_samples(t, self.out)]

    @property
    def of_channels(self) -> bool:
        return all(t is None or t.dim() == 1 for t in (self.scale, self.shift))

    def reference(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        for tensor, combine in ((self.scale, torch.mul), (self.shift, torch.add)):
            if tensor is not None:
                tensor = tensor.to(x.dtype)
                x = combine(x, tensor if tensor.dim() >= x.dim() - 1 else tensor.reshape(-1, *[1] * (x.dim() - 2)))
        return x


@dataclasses.dataclass(frozen=True)
class Constant(Layer):
    """What does not depend on x: a row a sample (N, C, *size), or one for all (1, C, *size)."""

    value: Tensor

    @property
    def rows(self) -> list[int]:
        return [len(self.value)]

    def reference(self, *inputs: Tensor) -> Tensor:
        return as_rows(self.value, self.out)


@dataclasses.dataclass(frozen=True)
class Add(Layer):
    """inputs[0] + factor · inputs[1]."""

    factor: float = 1.0

    def reference(self, *inputs: Tensor) -> Tensor:
        return inputs[0] + self.factor * inputs[1]


@dataclasses.dataclass(frozen=True)
class Multiply(Layer):
    """inputs[0] · inputs[1], of one shape."""

    def reference(self, *inputs: Tensor) -> Tensor:
        return inputs[0] * inputs[1]


@dataclasses.dataclass(frozen=True)
class GroupNorm(Layer):
    """(x − mean) / √(var + eps) · weight + bias over a group of channels and all pixels of a sample; one group over
    features is a layer norm, as many as channels an instance norm."""

    groups: int
    eps: float
    weight: Tensor | None  # (C,) or (C, *size), as bias
    bias: Tensor | None

    def reference(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        grouped = x.reshape(len(x), self.groups, -1)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, correction=0)
        x = ((grouped - mean) / torch.sqrt(variance + self.eps)).reshape(x.shape)
        return Affine((0,), self.out, "", self.weight, self.bias).reference(x)


@dataclasses.dataclass(frozen=True)
class LogSumExp(Layer):
    """log Σ exp over the channels of one pixel."""

    def reference(self, *inputs: Tensor) -> Tensor:
        return torch.logsumexp(inputs[0], 1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Slice(Layer):
    """Channels start … start + out.channels − 1."""

    start: int

    def reference(self, *inputs: Tensor) -> Tensor:
        return inputs[0][:, self.start : self.start + self.out.channels]


@dataclasses.dataclass(frozen=True)
class Concat(Layer):
    """The channels of all inputs, in order."""

    def reference(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, 1)
