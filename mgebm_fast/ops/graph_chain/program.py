"""A graph as a program: its layers forward, then backward to x, as steps over buffers.

The energy's value is never needed, its gradient alone: what no gradient reads is not computed. On the backward pass a
step takes the slope of the function before it with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..conv_chain import windows
from . import layers, packing
from .forward import ForwardPass
from .graph import Graph
from .packing import (
    affine_vectors,
    as_features,
    by_tap,
    gather_tables,
    norm_vectors,
    padded,
    places_of,
    tap_numbers,
    transposed,
)
from .steps import BUFFERS, FINISHING, MAX_BUFFERS, MAX_STEPS, Buffer, Step

_LINEAR = (
    layers.Kernel, layers.Gather, layers.Rearrange, layers.Affine, layers.Add, layers.Slice, layers.Concat,
)  # fmt: skip


class Program(ForwardPass):
    """The steps that give dE/dx of a graph, with its constants packed; `state` and `slope`: the buffers of x and dE/dx.

    bfloat: products in bfloat16, with float32 sums, where they read what is no pixel of x and are large enough.
    split: dense layers as the sum of three products of bfloat16, where they are large enough.

    Raises ValueError where the graph is larger than the engine takes.
    """

    def __init__(self, graph: Graph, bfloat: bool = False, split: bool = False) -> None:
        super().__init__(graph.folded(), bfloat, split)
        self._grad: dict[int, int] = {}  # of a value, its gradient so far
        self._backward()
        if 0 not in self._grad:
            raise ValueError("graph_chain: the energy must depend on x, got a graph that does not")
        self.slope = self._grad[0]
        self._drop_unused()
        self._end_at_top()
        self._place_split()
        self.sample_floats = self._place()
        if len(self.steps) > MAX_STEPS or len(self.buffers) > MAX_BUFFERS:
            raise ValueError(f"graph_chain: a program has at most {MAX_STEPS} steps, got {len(self.steps)}")

    def _backward(self) -> None:
        last = len(self._graph.layers)
        # Gradients that are the same for every sample, as above the last function, are known now, while each of their
        # numbers is a weight, or a multiple: of sums and products of weights no table packs new ones (`refill`).
        known = {last: torch.ones(1, dtype=torch.float32)}
        of_weights = set[int]()
        for value in range(last, -1, -1):
            layer = self._graph.layers[value - 1] if value else None
            constant = known.pop(value, None)
            if constant is not None:
                weighted = _has_weights(layer)
                mixes = weighted and (value in of_weights or not _is_head(layer))
                if isinstance(layer, _LINEAR) and not layer.rows and not mixes and value not in self._grad:
                    for source, share in self._constant_shares(layer, constant):
                        known[source] = known[source] + share if source in known else share
                        if weighted or value in of_weights:
                            of_weights.add(source)
                    continue
                vectors = affine_vectors(None, _uniform(constant), self._graph.value(value))
                self._give(value, value, "fill", **vectors.fields())
            if layer is not None and value in self._grad:
                getattr(self, f"_backward_{type(layer).__name__}")(layer, value, self._grad.pop(value))

    def _constant_shares(self, layer: layers.Layer, constant: Tensor) -> list[tuple[int, Tensor]]:
        """What a linear layer passes on of a gradient (C, *size) to the values that it reads."""
        sources = list(dict.fromkeys(layer.inputs))
        maps = [self._graph.value(source) for source in sources]
        with torch.inference_mode(False), torch.enable_grad():
            plain: dict[str, Any] = {
                name: tensor.clone()  # autograd keeps no tensor that was made in inference mode
                for name, tensor in vars(layer).items()
                if isinstance(tensor, Tensor) and tensor.is_inference()
            }
            layer = dataclasses.replace(layer, **plain)
            at = [torch.zeros(1, m.channels, *m.size, dtype=torch.float32, requires_grad=True) for m in maps]
            out = layer.reference(*(at[sources.index(source)] for source in layer.inputs))
            # Of a sum: with gradients to start from, torch imports its compiler's shapes first (seconds).
            shares = torch.autograd.grad((out * constant.reshape(out.shape)).sum(), at)
        return [(source, share[0]) for source, share in zip(sources, shares, strict=True)]

    def _give(self, value: int, layer_value: int, kind: str, **fields: object) -> None:
        """One more share of the gradient of `value`, which layer_value's step gives; with it the slope of the function
        that gave `value`, where it is the last share."""
        function = self._pointwise(value)
        earlier = value in self._grad
        joins = kind in FINISHING and "slope" not in fields and (not earlier or kind == "convolve")
        if function is not None and joins and self._is_last(value, layer_value):
            if earlier:
                fields["second"] = self._grad.pop(value)
            fields |= self._slopes[value]
            value = function.inputs[0]
        others = [g for v, g in self._grad.items() if v != value] + [fields.get(name) for name in BUFFERS]
        if value in self._grad and self._grad[value] in others:
            # It is read by others, or by this step: a copy of its own.
            own = self._map(self._graph.value(value))
            self._step("affine", source=self._grad[value], out=own)
            self._grad[value] = own
        accumulate = value in self._grad
        if not accumulate:
            self._grad[value] = self._map(self._graph.value(value))
        self._step(kind, out=self._grad[value], accumulate=accumulate, **fields)

    def _is_last(self, value: int, layer_value: int) -> bool:
        """Whether all that reads `value` but `layer_value` has given its share of the gradient."""
        return all(v >= layer_value for v in self._consumers[value])

    def _share(self, value: int, layer_value: int, grad: int) -> None:
        """One more share of the gradient of `value` that is the whole of `grad`."""
        if value in self._grad:
            self._give(value, layer_value, "affine", source=grad)
        else:
            self._grad[value] = grad

    def _backward_Convolution(self, layer: layers.Convolution, value: int, grad: int) -> None:
        self._give(layer.inputs[0], value, "convolve", **self._transposed_products(layer, grad))
        if layer.covers(self._graph.value(layer.inputs[0]).size):
            self._view_as_features(self.steps[-1])

    def _backward_Transposed(self, layer: layers.Transposed, value: int, grad: int) -> None:
        inputs, outputs, *kernel = layer.weight.shape
        taps = math.prod(kernel)
        fields = self._product(
            False, self._transposed_geometry(layer), layer.weight, outputs, inputs, (taps, outputs * taps),
            self._pays_in_bfloat(taps, outputs),
        )  # fmt: skip
        self._give(layer.inputs[0], value, "convolve", source=grad, **fields)

    def _transposed_products(self, layer: layers.Convolution, grad: int) -> dict[str, object]:
        outputs, inputs, *kernel = layer.weight.shape
        taps = math.prod(kernel)
        geometry, weight, strides = self._geometry(layer), layer.weight, (inputs * taps, taps)
        if layer.covers(self._graph.value(layer.inputs[0]).size):
            # All pixels at once, as the features of one.
            weight = as_features(weight)
            inputs, taps, geometry, strides = weight.shape[1], 1, ((),) * 6, (weight.shape[1], 1)
        bfloat = self._pays_in_bfloat(taps, outputs)
        return {"source": grad, **self._product(True, geometry, weight, outputs, inputs, strides, bfloat)}

    def _view_as_features(self, step: Step) -> None:
        """The buffers of a dense layer's backward pass as maps of one pixel."""
        for name in ("out", "second", "slope"):
            buffer = getattr(step, name)
            if buffer >= 0:
                setattr(step, name, self._as_features(buffer))

    def _backward_Depthwise(self, layer: layers.Depthwise, value: int, grad: int) -> None:
        table = windows.backward_windows(*self._geometry(layer))
        weights = by_tap(layer.weight, table)
        self._give(layer.inputs[0], value, "depthwise", source=grad, windows=table, weights=weights)

    def _backward_Gather(self, layer: layers.Gather, value: int, grad: int) -> None:
        (source,) = layer.inputs
        size = self._graph.value(source).size
        axes = [transposed(axis, length) for axis, length in zip(layer.axes, size, strict=True)]
        table, weights = gather_tables(axes, tuple(map(len, layer.axes)))
        self._give(source, value, "gather", source=grad, windows=table, weights=weights)

    def _backward_Rearrange(self, layer: layers.Rearrange, value: int, grad: int) -> None:
        (source,) = layer.inputs
        self._give(source, value, "rearrange_back", source=grad, place=places_of(layer, self._graph.value(source)))

    def _backward_MaxPool(self, layer: layers.MaxPool, value: int, grad: int) -> None:
        table = windows.backward_windows(*self._pool_geometry(layer))
        self._give(
            layer.inputs[0], value, "max_pool_back", source=grad, second=self._kept[value], windows=table,
            weights=tap_numbers(table, layer.kernel),
        )  # fmt: skip

    def _backward_Pointwise(self, layer: layers.Pointwise, value: int, grad: int) -> None:
        self._give(layer.inputs[0], value, "pointwise", source=grad, **self._slopes[value])

    def _backward_Affine(self, layer: layers.Affine, value: int, grad: int) -> None:
        if layer.scale is None:
            self._share(layer.inputs[0], value, grad)
        else:
            vectors = affine_vectors(layer.scale, None, layer.out)
            self._give(layer.inputs[0], value, "affine", source=grad, **vectors.fields())

    def _backward_Constant(self, layer: layers.Constant, value: int, grad: int) -> None:
        """It has none: the steps that made `grad` are taken out."""

    def _backward_Add(self, layer: layers.Add, value: int, grad: int) -> None:
        self._share(layer.inputs[0], value, grad)
        if layer.factor == 1.0:
            self._share(layer.inputs[1], value, grad)
        else:
            scale = torch.full((padded(layer.out.channels),), layer.factor, dtype=torch.float32)
            self._give(layer.inputs[1], value, "affine", source=grad, weights=scale)

    def _backward_Multiply(self, layer: layers.Multiply, value: int, grad: int) -> None:
        for which, other in ((0, 1), (1, 0)):
            self._give(layer.inputs[which], value, "multiply", source=grad, second=self._source(layer, other))

    def _backward_GroupNorm(self, layer: layers.GroupNorm, value: int, grad: int) -> None:
        vectors = norm_vectors(layer)
        self._give(
            layer.inputs[0], value, "norm_back", source=grad, second=self._kept[value], third=self._source(layer),
            weights=vectors.scale, per_element=vectors.per_element, inputs=layer.out.channels, groups=layer.groups,
        )  # fmt: skip

    def _backward_LogSumExp(self, layer: layers.LogSumExp, value: int, grad: int) -> None:
        channels = self._graph.value(layer.inputs[0]).channels
        self._give(layer.inputs[0], value, "softmax", source=self._source(layer), second=grad, inputs=channels)

    def _backward_Slice(self, layer: layers.Slice, value: int, grad: int) -> None:
        (source,) = layer.inputs
        if source not in self._grad:
            self._grad[source] = self._map(self._graph.value(source))
            self._clear(self._grad[source])
        self._give(source, value, "copy", source=grad, outputs=layer.out.channels, to_channel=layer.start)

    def _backward_Concat(self, layer: layers.Concat, value: int, grad: int) -> None:
        start = 0
        for source in layer.inputs:
            channels = self._graph.value(source).channels
            if source not in self._grad:
                self._grad[source] = self._map(self._graph.value(source))
                self._clear(self._grad[source])
            self._give(source, value, "copy", source=grad, outputs=channels, from_channel=start)
            start += channels

    # ---- what is left to do of it, and where ----

    def _root(self, buffer: int) -> int:
        of = self.buffers[buffer].of
        return buffer if of is None else of

    def _drop_unused(self) -> None:
        """Take out the steps whose results nothing reads on the way to dE/dx."""
        wanted, kept = {self._root(self.slope)}, []
        for step in reversed(self.steps):
            if {self._root(b) for b in step.writes()} & wanted:
                wanted |= {self._root(b) for b in step.reads()}
                kept.append(step)
        self.steps = kept[::-1]

    def _end_at_top(self) -> None:
        """A convolution's last function whose gradient is known is not evaluated: its slope times that is. Whatever
        else reads the function's value gave a share of its gradient, to which a fill adds, and takes no slope."""
        makers = {step.slope if step.slope >= 0 else step.out: step for step in self.steps if step.kind == "convolve"}
        for fill in [step for step in self.steps if step.kind == "fill" and step.slope in makers]:
            maker = makers[fill.slope]
            plain = not (fill.accumulate or fill.row_floats or maker.accumulate) and maker.keep < 0
            if plain and maker.function:
                maker.top, maker.per_element = fill.bias, fill.per_element
                maker.out, maker.slope = fill.out, -1
                self.steps = [step for step in self.steps if step is not fill]

    def _place_split(self) -> None:
        """Where the weights of each split product begin, among those of the steps that are left: the engine has room
        for these alone."""
        at = 0
        for step in self.steps:
            if step.split >= 0:
                step.split = at
                at += 2 * -(-step.inputs // packing.BFLOAT_DEPTH) * packing.BFLOAT_DEPTH * padded(step.outputs)

    def _place(self) -> int:
        """Offsets such that no two buffers share memory while both are alive; the floats of a sample in all."""
        end = len(self.steps)
        state, slope = self.state, self._root(self.slope)
        used: dict[int, Buffer] = {}
        for at, step in enumerate(self.steps):
            for index in step.reads() | step.writes():
                root = self.buffers[self._root(index)]
                if self._root(index) not in used:
                    used[self._root(index)] = root
                    root.first = at
                root.last = at
        for index in (state, slope):
            used.setdefault(index, self.buffers[index]).last = end
        used[state].first = 0
        placed: list[Buffer] = []
        for buffer in sorted(used.values(), key=lambda b: -b.pixels * b.depth):
            offset = 0
            alive = (b for b in placed if b.first <= buffer.last and buffer.first <= b.last)
            for other in sorted(alive, key=lambda b: b.offset):
                if other.offset - offset >= buffer.pixels * buffer.depth:
                    break
                offset = max(offset, other.offset + other.pixels * other.depth)
            buffer.offset = offset
            placed.append(buffer)
        for buffer in self.buffers:
            if buffer.of is not None:
                buffer.offset = self.buffers[buffer.of].offset
        self._number([*used])
        return max(b.offset + b.pixels * b.depth for b in placed)

    def _number(self, roots: Sequence[int]) -> None:
        """Keep the buffers that are used, under new numbers."""
        held = [i for i, b in enumerate(self.buffers) if i in roots or (b.of is not None and b.of in roots)]
        number = {-1: -1} | {old: new for new, old in enumerate(held)}
        for step in self.steps:
            for name in (*BUFFERS, "out"):
                setattr(step, name, number[getattr(step, name)])
        self.state, self.slope = number[self.state], number[self.slope]
        self.buffers = [self.buffers[i] for i in held]

    @property
    def arguments(self) -> tuple[list[tuple], list[tuple], int, int, int]:
        buffers = [(b.offset, b.pixels, b.depth) for b in self.buffers]
        return buffers, [step.arguments for step in self.steps], self.sample_floats, self.state, self.slope


def _has_weights(layer: layers.Layer | None) -> bool:
    """Whether it multiplies by numbers that a net may have learnt, and not by one for all."""
    numbers = getattr(layer, "scale" if isinstance(layer, layers.Affine) else "weight", None)
    return numbers is not None and bool((numbers != numbers.flatten()[0]).any())


def _is_head(layer: layers.Layer | None) -> bool:
    """Whether each number that it reads meets one of its weights."""
    if isinstance(layer, layers.Convolution):
        return layer.out.channels == 1 and (layer.out.pixels == 1 or math.prod(layer.weight.shape[2:]) == 1)
    return isinstance(layer, layers.Affine)


def _uniform(constant: Tensor) -> Tensor:  # (C, *size) -> (C,) where all pixels are equal
    pixels = constant.flatten(1) if constant.dim() > 1 else constant[:, None]
    return pixels[:, 0] if bool((pixels == pixels[:, :1]).all()) else constant
