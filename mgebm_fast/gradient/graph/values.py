"""The graph that is read from an energy while its own code runs: its layers so far, and which of them a tensor is."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...ops.graph_chain import layers
from ...ops.graph_chain.graph import Graph
from ...ops.graph_chain.layers import Map
from ..builder import Unreadable
from .tape import memory_of

MAX_MATRIX = 1 << 22  # entries of the matrix of a linear op that has no layer of its own
SMALL = 32  # elements that are moved faster by a matrix than one by one


@dataclasses.dataclass(frozen=True)
class Value:
    """A tensor (N, *shape) that depends on x, and the graph's value that holds it.

    The value is a map (C, *size) with shape its own or flattened, or features: one pixel, whose channels are the
    elements of `shape` in order. merged: the tensor is (1, N·C, *size), as an instance norm sees its input; rows: it is
    (N·T, D), as a dense layer sees tokens of shape (T, D).
    """

    index: int
    held: Map
    shape: tuple[int, ...]
    merged: bool = False
    rows: bool = False

    def tensor_shape(self, samples: int) -> tuple[int, ...]:
        if self.rows:
            return (samples * math.prod(self.shape[:-1]), self.shape[-1])
        return (1, samples * self.held.channels, *self.held.size) if self.merged else (samples, *self.shape)

    @property
    def is_map(self) -> bool:
        return bool(self.held.size)

    @property
    def map_shape(self) -> tuple[int, ...]:
        return (self.held.channels, *self.held.size)

    @property
    def flattened(self) -> bool:
        return self.is_map and self.shape != self.map_shape


@dataclasses.dataclass(frozen=True)
class ChannelsLast:
    """A tensor (N, *size, C) that holds the numbers of a map (C, *size); `joined` of its dimensions are one with the
    batch's, all of them where a dense layer takes pixels for samples."""

    map: Value
    joined: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.map.held.size, self.map.held.channels)

    def tensor_shape(self, samples: int) -> tuple[int, ...]:
        first, rest = self.map.held.size[: self.joined], self.shape[self.joined :]
        return (samples * math.prod(first), *rest)


class GraphBuilder:
    """Adds layers; raises Unreadable where there is none for what is asked."""

    def __init__(self, x: Tensor, *, as_map: bool) -> None:
        shape = tuple(x.shape[1:])
        self.samples = x.shape[0]
        held = Map(shape[0], shape[1:]) if as_map else Map(math.prod(shape), ())
        self.x = Value(0, held, shape)
        self.layers: list[layers.Layer] = []
        self.name = ""  # of the op that is read
        self.by_sample = False  # whether constants with a row a sample were met
        self.matrices: dict[int, Tensor] = {}  # by their memory, those of `linear`
        self._flattened: dict[tuple[int, ...], Map] = {}  # what maps were last seen under other shapes

    def graph(self) -> Graph:
        return Graph(self.x.held, tuple(self.layers))

    def add(
        self, kind: type[layers.Layer], sources: Sequence[Value], out: Map, shape: tuple[int, ...], *fields: object
    ) -> Value:
        self.layers.append(kind(tuple(source.index for source in sources), out, self.name, *fields))
        return Value(len(self.layers), out, shape)

    # ---- layers ----

    def pointwise(self, x: Value, function: str, a: float = 0.0, b: float = 0.0) -> Value:
        made = self.add(layers.Pointwise, [x], x.held, x.shape, function, float(a), float(b))
        return dataclasses.replace(made, rows=x.rows)

    def affine(self, x: Value, scale: Tensor | float | None, shift: Tensor | float | None = None) -> Value:
        """x · scale + shift, constants that broadcast to (N, *shape)."""
        scale, shift = (None if c is None else self._constant(x, c) for c in (scale, shift))
        return self.add(layers.Affine, [x], x.held, x.shape, scale, shift)

    def _constant(self, x: Value, value: Tensor | float) -> Tensor:  # as in `layers.Affine`
        if not isinstance(value, Tensor):
            return torch.full((x.held.channels,), value, dtype=torch.float32)
        tensor = value.detach().to(torch.float32)
        if tensor.dim() == 0:
            return tensor.expand(x.held.channels).clone()
        if tensor.dim() > len(x.shape) + 1:
            raise Unreadable(f"{self.name} moves the batch to another place by a constant of {tensor.dim()} dimensions")
        shared = tensor.dim() <= len(x.shape)
        tensor = self.rows(tensor.reshape((1,) * (len(x.shape) + 1 - tensor.dim()) + tuple(tensor.shape)))
        samples = len(tensor)
        try:
            whole = tensor.expand(samples, *x.shape)
        except RuntimeError:
            raise Unreadable(f"{self.name} makes x larger by a constant of shape {tuple(tensor.shape)}") from None
        if not x.is_map:
            constant = whole.reshape(samples, -1)
        elif not x.flattened and all(n == 1 for n in tensor.shape[2:]):
            constant = tensor.reshape(samples, -1).expand(samples, x.held.channels)
            if not shared:
                constant = constant.reshape(samples, -1, *[1] * len(x.held.size))
        else:
            constant = whole.reshape(samples, *x.map_shape)
        return (constant[0] if shared else constant).contiguous()

    def rows(self, tensor: Tensor) -> Tensor:  # (1 or N, …) -> (1, …) where all samples have the same, else (N, …)
        """A constant whose first dimension is the batch's. What holds a row a sample is read with all samples of x."""
        if len(tensor) == 1:
            return tensor
        if len(tensor) != self.samples:
            raise Unreadable(f"{self.name} has a constant of {len(tensor)} rows for {self.samples} samples")
        if tensor.stride(0) == 0:
            return tensor[:1]
        self.by_sample = True
        return tensor[:1] if torch.equal(tensor, tensor[:1].expand_as(tensor)) else tensor

    def constant(self, value: Tensor, shape: tuple[int, ...], like: Value) -> Value:
        """(N, *shape), that does not depend on x, as a value: a map where `like` is one of that size."""
        tensor = self.rows(value.to(torch.float32))
        held = Map(math.prod(shape), ())
        if like.is_map and not like.flattened and shape[1:] == like.held.size:
            held = Map(shape[0], shape[1:])
        return self.add(layers.Constant, [], held, shape, tensor.reshape(-1, held.channels, *held.size).contiguous())

    def dense(self, x: Value, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Value:
        """W x + b of a sample's elements in their logical order; weight (out, elements)."""
        weight = weight.detach()
        out = Map(weight.shape[0], ())
        if not x.is_map:
            return self.add(layers.Convolution, [x], out, shape, weight, bias, (), (), ())
        ones = (1,) * len(x.held.size)
        kernel = weight.reshape(-1, *x.map_shape)
        return self.add(layers.Convolution, [x], out, shape, kernel, bias, ones, (0,) * len(ones), ones)

    def gather(self, x: Value, axes: tuple[layers.Axis, ...], *, drops: bool = False) -> Value:
        """`axes` for each dimension of a map; drops: to one pixel, whose channels become the shape."""
        size = () if drops else tuple(map(len, axes))
        out = Map(x.held.channels, size)
        return self.add(layers.Gather, [x], out, (x.held.channels, *size), axes, drops)

    def rearranged(self, x: Value, places: Tensor, shape: tuple[int, ...]) -> Value:
        """places: where each element of the result stands in x, in x's logical order."""
        found = places.reshape(-1).tolist()
        if not torch.equal(torch.tensor(found), places.reshape(-1)):  # an op, which a tape asks again
            raise Unreadable(f"{self.name} moves elements to other places at each call")
        out = Map(shape[0], shape[1:]) if len(shape) > 1 else Map(math.prod(shape), ())
        return self.add(layers.Rearrange, [x], out, shape, tuple(found))

    def channels_last(self, x: Value) -> ChannelsLast:
        """(N, …, D) with its last dimension as the channels of a map."""
        places = torch.arange(math.prod(x.shape)).reshape(x.shape).movedim(-1, 0)
        joined = len(x.shape) - 1 if x.rows else 0
        return ChannelsLast(self.rearranged(x, places, (x.shape[-1], *x.shape[:-1])), joined)

    def as_map(self, x: Value) -> Value:
        """A value as it is, or a map of its dimensions where they are several, as a gate or a reshaped tensor has."""
        if x.is_map and not x.flattened or len(x.shape) < 2:
            return x
        if x.shape[0] != x.held.channels:
            return self.rearranged(x, torch.arange(math.prod(x.shape)), x.shape)
        return self.add(layers.Affine, [x], Map(x.shape[0], x.shape[1:]), x.shape, None, None)

    def features(self, x: Value) -> Value:
        """A value as features, its elements in their logical order."""
        if not x.is_map:
            return x
        if x.held.pixels == 1:
            axes = tuple((((0, 1.0),),) for _ in x.held.size)
            return self.add(layers.Gather, [x], Map(x.held.channels, ()), x.shape, axes, True)
        elements = math.prod(x.shape)
        flat = self.rearranged(x, torch.arange(elements), (elements,))
        return dataclasses.replace(flat, shape=x.shape)

    def viewed(self, x: Value, shape: tuple[int, ...]) -> Value:
        """x under another shape of as many elements in the same order."""
        if math.prod(shape) != x.held.channels * x.held.pixels:
            raise Unreadable(f"{self.name} makes {shape} of a tensor of shape {x.shape}")
        if not x.is_map or shape == x.map_shape or shape == x.shape:
            return dataclasses.replace(x, shape=shape)
        if len(shape) > 1 and shape[0] == x.held.channels and math.prod(shape[1:]) == x.held.pixels:
            # The same pixels in the same order, in other rows.
            return self.add(layers.Affine, [x], Map(x.held.channels, shape[1:]), shape, None, None)
        self._flattened[shape] = x.held
        return dataclasses.replace(x, shape=shape)

    def linear(self, x: Value, apply: object, shape: tuple[int, ...]) -> Value:
        """An op that is linear in x's elements, by its matrix: `apply` on a basis (elements, *shape)."""
        elements, out = math.prod(x.shape), math.prod(shape)
        if elements * max(out, 1) > MAX_MATRIX or (x.is_map and elements > 1024):
            raise Unreadable(f"{self.name} is done to a map of shape {x.shape}")
        # One row more than elements: no other dimension is as long, so that the batch is seen to stay first.
        basis = torch.eye(elements + 1, elements).reshape(elements + 1, *x.shape)
        moved = apply(basis)  # type: ignore[operator]
        if moved.shape[:1] != (elements + 1,) or moved.numel() != (elements + 1) * out:
            raise Unreadable(f"{self.name} moves the batch to another place")
        matrix = moved.reshape(elements + 1, out)[:-1].T.contiguous()
        self.matrices[memory_of(matrix)] = matrix
        return self.dense(x, matrix, None, shape)

    def moved(self, x: Value, apply: object, shape: tuple[int, ...]) -> Value:
        """An op that puts elements in other places: of a map whose dimensions are moved each by itself, the pixels by a
        gather and the channels by a kernel of ones and zeros; of a few elements by its matrix, else one by one. `apply`
        is as for `linear`."""
        if math.prod(x.shape) <= SMALL and not x.is_map:
            return self.linear(x, apply, shape)
        # As few rows as no other dimension is long, so that the batch is seen to stay first.
        elements, rows = math.prod(x.shape), next(n for n in itertools.count(2) if n not in (*x.shape, *shape))
        places = torch.arange(rows * elements).reshape(rows, *x.shape)
        moved = apply(places)  # type: ignore[operator]
        if moved.shape != (rows, *shape) or not torch.equal(moved[1:], moved[:-1] + elements):
            raise Unreadable(f"{self.name} moves the batch to another place")
        if not x.is_map or x.flattened or len(shape) != len(x.shape):
            return self.rearranged(x, moved[0], shape)
        each, alone = [], torch.zeros((), dtype=torch.int64)
        for dim, n in enumerate(x.shape):
            each.append((moved[0].movedim(dim, 0).flatten(1)[:, 0] // places.stride(dim + 1) % n).tolist())
            along = torch.tensor(each[dim]) * places.stride(dim + 1)
            alone = alone + along.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        if not torch.equal(alone, moved[0]):  # an op, which a tape asks again where `apply` takes places from a tensor
            return self.rearranged(x, moved[0], shape)
        if each[1:] != [list(range(n)) for n in x.held.size]:
            x = self.gather(x, tuple(tuple(((at, 1.0),) for at in axis) for axis in each[1:]))
        if each[0] == list(range(x.held.channels)):
            return x
        held, ones = Map(shape[0], x.held.size), (1,) * len(x.held.size)
        kernel = torch.eye(x.held.channels, dtype=torch.float32)[each[0]].reshape(shape[0], -1, *ones)
        return self.add(layers.Convolution, [x], held, shape, kernel, None, ones, (0,) * len(ones), ones)

    def combined(self, kind: type[layers.Layer], a: Value, b: Value, *fields: object) -> Value:
        """A layer of two values of one shape."""
        if len(a.shape) != len(b.shape):
            raise Unreadable(f"{self.name} moves the batch to another place")
        # `torch.broadcast_shapes` imports torch's compiler first (seconds).
        shape = tuple(m if n == 1 else n for n, m in zip(a.shape, b.shape, strict=True))
        a, b = self.expanded(a, shape, b), self.expanded(b, shape, a)
        if a.held != b.held:
            a, b = self.features(a), self.features(b)
        return self.add(kind, [a, b], a.held, a.shape, *fields)

    def expanded(self, x: Value, shape: tuple[int, ...], like: Value | None = None) -> Value:
        """x broadcast to (N, *shape): a single number as a map, where `like` or another value is one of that shape."""
        if x.shape == shape:
            return x
        held = like.held if like is not None and like.shape == shape else self._flattened.get(shape, Map(1, ()))
        if held.size and x.held.channels * x.held.pixels == 1:
            ones = (1,) * len(held.size)
            one = self.add(layers.Affine, [x], Map(1, ones), (1, *ones), None, None)
            return dataclasses.replace(self.expanded(one, (held.channels, *held.size)), shape=shape)
        if len(shape) > len(x.shape):  # new dimensions come before the batch's
            raise Unreadable(f"{self.name} moves the batch to another place")
        x = self.as_map(x) if len(shape) > 2 and x.shape[:1] == (x.held.channels,) else x
        return self.moved(x, lambda basis: basis.expand(-1, *shape), shape)
