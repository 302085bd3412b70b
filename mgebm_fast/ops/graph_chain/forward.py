"""The forward pass of a graph as steps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..conv_chain import windows
from . import layers
from .frames import framed_backward, framed_forward
from .graph import Graph
from .packing import (
    affine_vectors,
    as_features,
    by_tap,
    gather_tables,
    norm_vectors,
    packed,
    padded,
    places_of,
    tap_numbers,
    vector,
)
from .steps import MAX_NORM_CHANNELS, Buffer, Step

# Below so many inputs most of a bfloat16 tile is zeros; and the operands of a run of rows are to stay in a cache.
MIN_BFLOAT_INPUTS, MAX_BFLOAT_ROW = 8, 1 << 16
# Inputs and outputs of a dense layer from which three products of bfloat16 take less time than one of float32, on 64
# samples or more: 1.3 times at 128 and 1.7 at 512, as long at 64. Of a few samples they take longer, but no bit may
# depend on how many there are.
MIN_SPLIT = 128


def pays_in_bfloat(taps: int, inputs: int) -> bool:
    """Whether a product of so many taps of so many channels is computed in bfloat16 where one asks for it."""
    return inputs >= MIN_BFLOAT_INPUTS and taps * inputs <= MAX_BFLOAT_ROW


def pixels_of(graph: Graph) -> set[int]:
    """x, and the values that no convolution stands before: pixels of 0 to 255 would lose half a unit in bfloat16."""
    found = {0}
    for value, layer in enumerate(graph.layers, 1):
        if not isinstance(layer, layers.Kernel) and found.issuperset(layer.inputs):
            found.add(value)
    return found


class ForwardPass:
    """The steps that make each value of a graph, and what the backward pass will read.

    A convolution takes the addition and the function that follow it into its own step.
    """

    def __init__(self, graph: Graph, bfloat: bool = False, split: bool = False) -> None:
        self._graph = graph
        self._bfloat, self.split = bfloat, split
        self._pixels = pixels_of(graph)
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self._value: dict[int, int] = {}  # of a value, its buffer
        self._kept: dict[int, int] = {}  # of a norm or a max pool, what its backward pass reads
        self._slopes: dict[int, dict[str, object]] = {}  # of a function's value, what multiplies by its slope
        self._consumers = graph.consumers()
        self.state = self._value[0] = self._map(graph.x)
        self._forward()

    # ---- buffers ----

    def _map(self, shape: layers.Map) -> int:
        return self._new(shape.pixels, padded(shape.channels))

    def _new(self, pixels: int, depth: int, of: int | None = None) -> int:
        if pixels * depth >= 2**31:
            raise ValueError("graph_chain: a map must have fewer than 2**31 elements a sample")
        self.buffers.append(Buffer(pixels, depth, of))
        return len(self.buffers) - 1

    def _step(self, kind: str, **fields: object) -> None:
        self.steps.append(Step(kind, **fields))  # type: ignore[arg-type]

    def _forward(self) -> None:
        graph = self._graph
        # The addition that a convolution is computed with: its later operand of those that feed nothing else.
        joined: dict[int, int] = {}
        for value, layer in enumerate(graph.layers, 1):
            if isinstance(layer, layers.Add) and layer.factor == 1.0 and layer.inputs[0] != layer.inputs[1]:
                own = [v for v in layer.inputs if v and self._consumers[v] == [value]]
                own = [v for v in own if isinstance(graph.layers[v - 1], layers.Convolution)]
                if own:
                    joined[value] = max(own)
        for value, layer in enumerate(graph.layers, 1):
            if value in self._value or value in joined.values():
                continue
            self._value[value] = self._map(layer.out)
            if value in joined:
                convolution = graph.layers[joined[value] - 1]
                assert isinstance(convolution, layers.Convolution)
                other = next(v for v in layer.inputs if v != joined[value])
                self._forward_Convolution(convolution, value, self._value[other])
            else:
                getattr(self, f"_forward_{type(layer).__name__}")(layer, value)

    def _make(self, kind: str, value: int, **fields: object) -> None:
        """The step that gives `value`, and with it the function that follows it, where there is one."""
        buffer = self._value[value]
        follower = next((v for v in self._consumers[value] if self._pointwise(v) is not None), None)
        if follower is None:
            self._step(kind, out=buffer, **fields)
            return
        layer = self._pointwise(follower)
        assert layer is not None
        self._value[follower] = self._map(layer.out)
        keep = buffer if self._consumers[value] != [follower] else -1
        self._step(kind, out=self._value[follower], keep=keep, **self._applied(layer, follower), **fields)

    def _pointwise(self, value: int) -> layers.Pointwise | None:
        layer = self._graph.layers[value - 1] if value else None
        return layer if isinstance(layer, layers.Pointwise) else None

    def _applied(self, layer: layers.Pointwise, value: int) -> dict[str, object]:
        """A function in the forward pass, its slope kept for the backward one; a leaky ReLU's value shows its slope."""
        fields = {"function": layer.function, "a": layer.a, "b": layer.b}
        if layer.function == "leaky_relu" and layer.a >= 0:
            self._slopes[value] = {"function": layer.function, "a": layer.a, "slope": self._value[value]}
            return fields
        if layer.function == "leaky_relu":
            fields["function"] = "any_leaky_relu"
        kept = self._map(layer.out)
        self._slopes[value] = {"slope": kept}
        return fields | {"slope": kept}

    def _forward_Convolution(self, layer: layers.Convolution, value: int, second: int = -1) -> None:
        fields = self._products(layer)
        source = self._source(layer)
        if fields["inputs"] != layer.weight.shape[1]:
            source = self._as_features(source)
        self._make("convolve", value, source=source, second=second, bias=vector(layer.bias), **fields)

    def _as_features(self, buffer: int) -> int:
        """The same memory as a map of one pixel."""
        held = self.buffers[buffer]
        return self._new(1, held.pixels * held.depth, buffer if held.of is None else held.of)

    def _products(self, layer: layers.Convolution) -> dict[str, object]:
        outputs, inputs, *kernel = layer.weight.shape
        taps = math.prod(kernel)
        bfloat = layer.inputs[0] not in self._pixels and self._pays_in_bfloat(taps, inputs)
        if bfloat and taps > 1 and layer.covers(self._graph.value(layer.inputs[0]).size):
            # Pixels of fewer channels than a tile takes would be filled up one by one.
            depth = taps * padded(inputs)
            return self._product(False, ((),) * 6, as_features(layer.weight), depth, outputs, (1, depth), bfloat)
        strides = (taps, inputs * taps)
        return self._product(False, self._geometry(layer), layer.weight, inputs, outputs, strides, bfloat)

    def _product(
        self, back: bool, geometry: tuple, weight: Tensor, inputs: int, outputs: int, strides: tuple[int, int],
        bfloat: bool,
    ) -> dict[str, object]:  # fmt: skip
        """A step that slides a kernel, or that is the data gradient of one; strides: of weight's inputs and outputs."""
        place = None
        if bfloat:
            table, place = (framed_backward if back else framed_forward)(*geometry)
        else:
            table = (windows.backward_windows if back else windows.forward_windows)(*geometry)
        weights = packed(weight, table.offsets, inputs, outputs, strides, bfloat)
        # A row has the operands of all three.
        pays = min(inputs, outputs) >= MIN_SPLIT and 3 * inputs <= MAX_BFLOAT_ROW
        split = self.split and not bfloat and _is_dense(table) and pays
        return {
            "windows": table, "weights": weights, "bfloat": bfloat, "place": place, "split": 0 if split else -1,
            "rows": len(table.rows), "inputs": inputs, "outputs": outputs,
        }  # fmt: skip

    def _forward_Transposed(self, layer: layers.Transposed, value: int) -> None:
        inputs, outputs, *kernel = layer.weight.shape
        taps = math.prod(kernel)
        bfloat = layer.inputs[0] not in self._pixels and self._pays_in_bfloat(taps, inputs)
        geometry, strides = self._transposed_geometry(layer), (outputs * taps, taps)
        self._make(
            "convolve", value, source=self._source(layer), bias=vector(layer.bias),
            **self._product(True, geometry, layer.weight, inputs, outputs, strides, bfloat),
        )  # fmt: skip

    def _transposed_geometry(self, layer: layers.Transposed) -> tuple:
        """That of the convolution whose data gradient it is."""
        size, kernel = self._graph.value(layer.inputs[0]).size, tuple(layer.weight.shape[2:])
        return layer.out.size, size, kernel, layer.stride, layer.padding, layer.dilation

    def _pays_in_bfloat(self, taps: int, inputs: int) -> bool:
        return self._bfloat and pays_in_bfloat(taps, inputs)

    def _forward_Depthwise(self, layer: layers.Depthwise, value: int) -> None:
        table = windows.forward_windows(*self._geometry(layer))
        self._make(
            "depthwise", value, source=self._source(layer), windows=table, weights=by_tap(layer.weight, table),
            bias=vector(layer.bias),
        )  # fmt: skip

    def _geometry(self, layer: layers.Convolution | layers.Depthwise) -> tuple:
        size = self._graph.value(layer.inputs[0]).size
        kernel = tuple(layer.weight.shape[2:])
        # A kernel that makes a map of size () reads all of it at once; features may make one pixel called (1, 1).
        out = layer.out.size or (1,) * len(size) if size else ()
        return size, out, kernel, layer.stride, layer.padding, layer.dilation

    def _forward_Gather(self, layer: layers.Gather, value: int) -> None:
        table, weights = gather_tables(layer.axes, self._graph.value(layer.inputs[0]).size)
        self._make("gather", value, source=self._source(layer), windows=table, weights=weights)

    def _source(self, layer: layers.Layer, which: int = 0) -> int:
        return self._value[layer.inputs[which]]

    def _forward_Rearrange(self, layer: layers.Rearrange, value: int) -> None:
        places = places_of(layer, self._graph.value(layer.inputs[0]))
        self._step("rearrange", source=self._source(layer), out=self._value[value], place=places)

    def _forward_MaxPool(self, layer: layers.MaxPool, value: int) -> None:
        table = windows.forward_windows(*self._pool_geometry(layer))
        which = self._map(layer.out)
        self._kept[value] = which
        self._step(
            "max_pool", source=self._source(layer), out=self._value[value], keep=which, windows=table,
            weights=tap_numbers(table, layer.kernel),
        )  # fmt: skip

    def _pool_geometry(self, layer: layers.MaxPool) -> tuple:
        size = self._graph.value(layer.inputs[0]).size
        return size, layer.out.size, layer.kernel, layer.stride, layer.padding, layer.dilation

    def _forward_Pointwise(self, layer: layers.Pointwise, value: int) -> None:
        self._step("pointwise", source=self._source(layer), out=self._value[value], **self._applied(layer, value))

    def _forward_Affine(self, layer: layers.Affine, value: int) -> None:
        vectors = affine_vectors(layer.scale, layer.shift, layer.out)
        self._make("affine", value, source=self._source(layer), **vectors.fields())

    def _forward_Constant(self, layer: layers.Constant, value: int) -> None:
        self._make("fill", value, **affine_vectors(None, layer.value, layer.out).fields())

    def _forward_Add(self, layer: layers.Add, value: int) -> None:
        self._make("add", value, source=self._source(layer), second=self._source(layer, 1), factor=layer.factor)

    def _forward_Multiply(self, layer: layers.Multiply, value: int) -> None:
        self._make("multiply", value, source=self._source(layer), second=self._source(layer, 1))

    def _forward_GroupNorm(self, layer: layers.GroupNorm, value: int) -> None:
        if layer.out.channels > MAX_NORM_CHANNELS:
            raise ValueError(
                f"graph_chain: a norm must have at most {MAX_NORM_CHANNELS} channels, got {layer.out.channels}"
            )
        self._kept[value] = self._new(2, padded(layer.out.channels))
        self._make(
            "norm", value, source=self._source(layer), second=self._kept[value], inputs=layer.out.channels,
            groups=layer.groups, eps=layer.eps, **norm_vectors(layer).fields(),
        )  # fmt: skip

    def _forward_LogSumExp(self, layer: layers.LogSumExp, value: int) -> None:
        channels = self._graph.value(layer.inputs[0]).channels
        self._step("log_sum_exp", source=self._source(layer), out=self._value[value], inputs=channels)

    def _forward_Slice(self, layer: layers.Slice, value: int) -> None:
        self._clear(self._value[value])
        self._step(
            "copy", source=self._source(layer), out=self._value[value], outputs=layer.out.channels,
            from_channel=layer.start,
        )  # fmt: skip

    def _forward_Concat(self, layer: layers.Concat, value: int) -> None:
        self._clear(self._value[value])
        to = 0
        for which, source in enumerate(layer.inputs):
            channels = self._graph.value(source).channels
            self._step(
                "copy", source=self._source(layer, which), out=self._value[value], outputs=channels, to_channel=to
            )
            to += channels

    def _clear(self, buffer: int) -> None:
        zeros = torch.zeros(self.buffers[buffer].depth, dtype=torch.float32)
        self._step("fill", out=buffer, bias=zeros)


def _is_dense(table: windows.Windows) -> bool:
    """Whether one output reads the first pixel by one tap."""
    return len(table.output) == len(table.rows) == 1 and int(table.base[0]) == int(table.tap_pixel[0]) == 0
