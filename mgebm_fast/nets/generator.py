"""Generator: a top-down ConvNet from latent variables to images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import interval, one_of, positive_int
from .layers import ACTIVATIONS, activate

OUTPUTS = ("tanh", "none")
_BASE, _CAP = 4, 256  # side of the first map below which nothing is halved, and most channels of a built-in generator


@dataclasses.dataclass(frozen=True)
class DeconvSpec:
    """One transposed convolution: output channels, kernel and stride; it makes a map `stride` times as large."""

    channels: int
    kernel: int
    stride: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = positive_int(getattr(self, field.name), field.name, "DeconvSpec")
            object.__setattr__(self, field.name, value)
        if self.kernel < self.stride:
            raise ValueError(f"DeconvSpec: kernel must be at least stride, {self.stride}, got {self.kernel}")


class DeconvLayer(nn.Module):
    """Transposed convolution whose output is exactly `stride` times its input, then the activation."""

    def __init__(self, inputs: int, spec: DeconvSpec, activation: str, negative_slope: float) -> None:
        super().__init__()
        self.stride, self.padding = spec.stride, (spec.kernel - spec.stride + 1) // 2
        self.rest = spec.stride - spec.kernel + 2 * self.padding  # 1 where kernel − stride is odd
        self.weight = nn.Parameter(torch.empty(inputs, spec.channels, spec.kernel, spec.kernel, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(spec.channels, dtype=torch.float32))
        self.activation, self.negative_slope = activation, negative_slope
        self._squares = 2.0 / (1.0 + negative_slope**2) if activation != "none" else 1.0

    def reset(self, generator: torch.Generator) -> None:
        """Normal weights that keep the scale of the map (He et al., 2015, for the taps that reach a pixel)."""
        inputs, _, kernel, _ = self.weight.shape
        taps = inputs * (kernel / self.stride) ** 2
        nn.init.normal_(self.weight, std=math.sqrt(self._squares / taps), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] == (1, 1) and self.weight.shape[2] == self.stride:  # one stamp; torch has no fast path for it
            stamps = (x.flatten(1) @ self.weight.flatten(1)).unflatten(1, self.weight.shape[1:])
            return activate(stamps + self.bias[:, None, None], self.activation, self.negative_slope)
        x = F.conv_transpose2d(x, self.weight, self.bias, self.stride, self.padding, self.rest)
        return activate(x, self.activation, self.negative_slope)


class Generator(nn.Module):
    """x = g(z), g = output(layer_L(… layer_1(z))), layer = activation(transposed convolution).

    Args:
        latent: d, the length of z, at each place of its map.
        layers: the transposed convolutions; the last one's channels are the image's, and it has no activation. From a
            1×1 map, a kernel as large as its stride is a linear layer.
        latent_map: m, the side of the map of z. With m > 1 the net is one of a stationary texture: `forward` takes
            maps of any size, and a larger one makes a larger image.
        activation, negative_slope: of the hidden layers, as in `EnergyNet`.
        output: "tanh": pixels lo + (hi − lo)(1 + tanh)/2 of `value_range` (lo, hi); "none": as they are.
        seed: of the normal weights; biases are zero.

    Input z (N, d) for a map of 1×1, or (N, d, m, m); output (N, C, S, S), S = m times all strides. There are no batch
    statistics: the z that explains an image should not depend on the other images of its batch.

    Source: the top-down nets of Han, Lu, Zhu, Wu (AAAI 2017) and of Xie, Lu, Gao, Zhu, Wu (2016, arXiv 1609.09408),
    whose batch normalisation is left out.
    """

    def __init__(
        self,
        latent: int,
        layers: Sequence[DeconvSpec],
        *,
        latent_map: int = 1,
        activation: str = "leaky_relu",
        negative_slope: float = 0.2,
        output: str = "tanh",
        value_range: tuple[float, float] = (-1.0, 1.0),
        seed: int = 0,
    ) -> None:
        super().__init__()
        latent = positive_int(latent, "latent", "Generator")
        latent_map = positive_int(latent_map, "latent_map", "Generator")
        one_of(activation, ACTIVATIONS, "activation", "Generator")
        one_of(output, OUTPUTS, "output", "Generator")
        self.specs = tuple(layers)
        if not self.specs:
            raise ValueError("Generator: layers must hold at least one DeconvSpec, got none")
        self.latent, self.latent_map = latent, latent_map
        self.value_range = interval(value_range, "value_range", "Generator")
        self.activation, self.negative_slope, self.output = activation, negative_slope, output
        self.channels = self.specs[-1].channels
        self.size = latent_map * math.prod(spec.stride for spec in self.specs)
        self.layers = nn.ModuleList()
        inputs, weights = latent, torch.Generator().manual_seed(seed)
        for spec in self.specs:
            last = spec is self.specs[-1]
            layer = DeconvLayer(inputs, spec, "none" if last else activation, negative_slope)
            layer.reset(weights)
            self.layers.append(layer)
            inputs = spec.channels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one z: (d,), or (d, m, m) for a map."""
        return (self.latent,) if self.latent_map == 1 else (self.latent, self.latent_map, self.latent_map)

    def forward(self, z: Tensor) -> Tensor:  # (N, d) or (N, d, m, m) -> (N, C, S, S)
        """The images g(z)."""
        x = z[:, :, None, None] if z.dim() == 2 else z
        if x.dim() != 4 or x.shape[1] != self.latent:
            expected = ", ".join(map(str, self.latent_shape))
            raise ValueError(f"Generator: z must have shape (N, {expected}), got {tuple(z.shape)}")
        for layer in self.layers:
            x = layer(x)
        if self.output == "none":
            return x
        low, high = self.value_range
        return torch.tanh(x) * ((high - low) / 2) + (high + low) / 2

    def macs(self) -> int:
        """Multiply-accumulates of one image's forward pass."""
        total, side = 0, self.latent_map
        for spec, layer in zip(self.specs, self.layers, strict=True):
            total += layer.get_parameter("weight").numel() * side**2  # every place of the map is stamped once
            side *= spec.stride
        return total

    def config(self) -> dict[str, Any]:
        """What `from_config` rebuilds this architecture from, in plain JSON types."""
        return {
            "latent": self.latent,
            "layers": [[spec.channels, spec.kernel, spec.stride] for spec in self.specs],
            "latent_map": self.latent_map,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "output": self.output,
            "value_range": list(self.value_range),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], *, seed: int = 0) -> Generator:
        """The architecture that `config()` described, with fresh weights."""
        rest = {key: value for key, value in config.items() if key not in ("layers", "value_range")}
        layers = [DeconvSpec(*layer) for layer in config["layers"]]
        return cls(layers=layers, value_range=tuple(config["value_range"]), seed=seed, **rest)


def generator_layers(size: int, channels: int, width: int = 32, latent_map: int = 1) -> tuple[DeconvSpec, ...]:
    """The layers of a generator of images of any size.

    From z of 1×1: a linear layer to a map of 4×4 (or of what is left when `size` is halved until it is odd), then
    kernels 4 of stride 2 with half the channels each, the last of them `width`, then 3×3 to the image. From a map of
    z: 3×3 in place of the linear layer; `size` must be latent_map times a power of 2.
    """
    given = {"size": size, "channels": channels, "width": width, "latent_map": latent_map}
    size, channels, width, latent_map = (positive_int(v, name, "generator_layers") for name, v in given.items())
    doublings, extent = 0, size
    while extent % 2 == 0 and extent > (_BASE if latent_map == 1 else latent_map):
        doublings, extent = doublings + 1, extent // 2
    if latent_map > 1 and extent != latent_map:
        raise ValueError(f"generator_layers: size must be latent_map, {latent_map}, times a power of 2, got {size}")
    widths = [min(width * 2**k, max(_CAP, width)) for k in range(doublings, -1, -1)]
    first = DeconvSpec(widths[0], 3) if latent_map > 1 else DeconvSpec(widths[0], extent, extent)
    return (first, *(DeconvSpec(w, 4, 2) for w in widths[1:]), DeconvSpec(channels, 3))
