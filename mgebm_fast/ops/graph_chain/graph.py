"""An energy as a graph: its layers, each reading values before it; the last value is the energy, one channel of one
pixel."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from .layers import Affine, Forward, Layer, Map


@dataclasses.dataclass(frozen=True)
class Graph:
    """An energy: x's shape, and its layers, each reading values before it."""

    x: Map
    layers: tuple[Layer, ...]

    def value(self, index: int) -> Map:
        return self.x if index == 0 else self.layers[index - 1].out

    @property
    def samples(self) -> int | None:
        """How many samples it is an energy of, where its constants hold several rows; None: of any number."""
        return next((n for layer in self.layers for n in layer.rows if n > 1), None)

    def consumers(self) -> list[list[int]]:
        """Of each value, the values that are computed from it."""
        found: list[list[int]] = [[] for _ in range(len(self.layers) + 1)]
        for place, layer in enumerate(self.layers):
            for value in dict.fromkeys(layer.inputs):
                found[value].append(place + 1)
        return found

    def folded(self) -> Graph:
        """The same energy, with scales and shifts of channels right after a convolution in its weights."""
        consumers, found = self.consumers(), list[Layer]()
        now = {0: 0}  # value -> the same one in the new graph
        for value, layer in enumerate(self.layers, 1):
            inputs = tuple(now[v] for v in layer.inputs)
            before = found[inputs[0] - 1] if inputs and inputs[0] else None
            alone = before is not None and value < len(self.layers) and consumers[layer.inputs[0]] == [value]
            alone = alone and self.value(layer.inputs[0]) == layer.out
            if isinstance(layer, Affine) and isinstance(before, Forward) and alone and layer.of_channels:
                found[inputs[0] - 1] = before.scaled(layer.scale, layer.shift)
                now[value] = inputs[0]
            else:
                found.append(dataclasses.replace(layer, inputs=inputs))
                now[value] = len(found)
        return Graph(self.x, tuple(found))

    def energies(self, x: Tensor) -> Tensor:  # (N, C, *size) -> (N,), in x's dtype
        """By the layers' references."""
        values = [x.reshape(len(x), self.x.channels, *self.x.size)]
        for layer in self.layers:
            value = layer.reference(*(values[i] for i in layer.inputs)).to(x.dtype)
            values.append(value.expand(len(x), *value.shape[1:]).reshape(len(x), layer.out.channels, *layer.out.size))
        return values[-1].reshape(len(x))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """The constants of every layer, with its name."""
        return [
            (layer.name, value)
            for layer in self.layers
            for value in (getattr(layer, field.name) for field in dataclasses.fields(layer))
            if isinstance(value, Tensor)
        ]
