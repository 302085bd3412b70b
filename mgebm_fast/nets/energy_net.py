"""EnergyNet: a bottom-up ConvNet whose score f(x) is one number a sample; its energy is −f(x)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..checks import finite_number, one_of, positive_int
from .layers import ACTIVATIONS, ConvLayer, LinearHead
from .score_net import ScoreNet

NORMS = ("batch", "frozen", "none")
HEADS = ("linear", "sum")


@dataclasses.dataclass(frozen=True, slots=True)
class ConvSpec:
    """One convolution: output channels, kernel length and stride, the same along every spatial dimension."""

    channels: int
    kernel: int
    stride: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, positive_int(getattr(self, field.name), field.name, "ConvSpec"))


def _described(layer: nn.Module | None) -> tuple[ConvSpec, str, float] | None:
    """The numbers of a layer as it runs now; None where it is no layer of this kind."""
    if type(layer) is not ConvLayer:
        return None
    channels, kernel = layer.weight.shape[0], layer.weight.shape[2]
    spec = ConvSpec(channels, kernel, layer.stride) if layer.padding == kernel // 2 else None
    return None if spec is None else (spec, layer.activation, layer.negative_slope)


class EnergyNet(ScoreNet):
    """E(x) = −f(x), f = head(layer_L(… layer_1(x))), layer = activation(norm(conv(x))).

    Args:
        size: spatial size of the input, one int for all dimensions or one for each.
        channels: channels of the input.
        layers: the convolutions, zero-padded by kernel // 2 on every side (TensorFlow's SAME differs by one pixel
            at even strides: a shifted function).
        norm: "batch": batch statistics in every forward, with the exact gradient through them, so the samples of
            a batch are coupled; "none": samples are independent; "frozen": what `freeze_norm()` returns.
            A convolution has a bias where norm is not "batch".
        activation: "leaky_relu" (with `negative_slope`), "relu", "silu", "elu" or "none".
        spectral_norm: divide every weight by its largest singular value (Miyato et al., 2018).
        head: "linear" over the whole top map, or "sum" of the top map (then any input size will do).
        ndim: number of spatial dimensions, 1, 2 or 3.
        seed: Xavier-uniform weights are drawn from it; biases are zero.

    Input (N, channels, *size) float; output (N,) energies, low where data are likely.
    """

    name = "EnergyNet"

    def __init__(
        self,
        size: int | Sequence[int],
        channels: int,
        layers: Sequence[ConvSpec],
        *,
        norm: str = "batch",
        activation: str = "leaky_relu",
        negative_slope: float = 0.2,
        spectral_norm: bool = False,
        head: str = "linear",
        ndim: int = 2,
        seed: int = 0,
    ) -> None:
        one_of(norm, NORMS, "norm", self.name)
        one_of(activation, ACTIVATIONS, "activation", self.name)
        one_of(head, HEADS, "head", self.name)
        super().__init__(size, channels, ndim)
        self.specs = tuple(layers)
        if not self.specs:
            raise ValueError("EnergyNet: layers must hold at least one ConvSpec, got none")
        self.norm, self.spectral_norm, self.head_kind = norm, spectral_norm, head

        inputs, top = self.channels, self.size
        self.layers = nn.ModuleList()
        for spec in self.specs:
            layer = ConvLayer(
                inputs, spec.channels, spec.kernel, spec.stride, norm=norm, activation=activation,
                negative_slope=negative_slope, spectral_norm=spectral_norm, ndim=ndim,
            )  # fmt: skip
            self.layers.append(layer)
            inputs, top = spec.channels, tuple(layer.map_size(s) for s in top)
        self.activation, self.negative_slope = activation, negative_slope
        features = inputs
        for length in top:
            features *= length
        self.head = LinearHead(features, spectral_norm) if head == "linear" else None
        self._reset(seed)

    @property
    def activation(self) -> str:
        """The activation of every layer; setting it changes them all."""
        return self._activation

    @activation.setter
    def activation(self, activation: str) -> None:
        one_of(activation, ACTIVATIONS, "activation", "EnergyNet")
        self._activation = activation
        for layer in self.convolutions:
            layer.activation = activation

    @property
    def negative_slope(self) -> float:
        """The slope of every layer's leaky_relu below zero; setting it changes them all."""
        return self._negative_slope

    @negative_slope.setter
    def negative_slope(self, slope: float) -> None:
        self._negative_slope = slope = finite_number(slope, "negative_slope", "EnergyNet")
        for layer in self.convolutions:
            layer.negative_slope = slope

    def placed(self) -> Iterator[tuple[ConvLayer, tuple[int, ...]]]:
        size = self.size
        for layer in self.layers:
            if isinstance(layer, ConvLayer):
                yield layer, size
                size = tuple(layer.map_size(s) for s in size)

    @torch.no_grad()
    def freeze_norm(self) -> EnergyNet:
        """A new net with the running statistics of a norm="batch" net folded into its convolutions.

        Its samples are independent of each other. It equals this net only as far as the running statistics equal
        those of the batch. Weights divided by a spectral norm are stored divided. A net without batch statistics
        gives a copy of itself.
        """
        if self.norm != "batch":
            return self.copied()
        net = EnergyNet.from_config({**self.config(), "norm": "frozen", "spectral_norm": False})
        for source, target in zip(self.convolutions, net.convolutions, strict=True):
            assert source.norm is not None and target.bias is not None  # what "batch" and "frozen" mean
            scale, shift = source.norm.scale_and_shift()
            target.weight.copy_(source.effective_weight() * scale.reshape(-1, *[1] * (self.ndim + 1)))
            target.bias.copy_(shift)
        if self.head is not None and net.head is not None:
            assert net.head.bias is not None and self.head.bias is not None  # a linear head always has one
            net.head.weight.copy_(self.head.effective_weight())
            net.head.bias.copy_(self.head.bias)
        return net.to(next(self.parameters()).device)

    def config(self) -> dict[str, Any]:
        for index, (spec, layer) in enumerate(itertools.zip_longest(self.specs, self.layers)):
            if spec is None or _described(layer) != (spec, self.activation, self.negative_slope):
                raise ValueError(
                    "EnergyNet: layers must be those that it was built with to be described and stored, but "
                    f"layers.{index} was changed since"
                )
        return {
            "size": list(self.size),
            "channels": self.channels,
            "layers": [[spec.channels, spec.kernel, spec.stride] for spec in self.specs],
            "norm": self.norm,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "spectral_norm": self.spectral_norm,
            "head": self.head_kind,
            "ndim": self.ndim,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], *, seed: int = 0) -> EnergyNet:
        rest = {key: value for key, value in config.items() if key != "layers"}
        return cls(layers=[ConvSpec(*layer) for layer in config["layers"]], seed=seed, **rest)
