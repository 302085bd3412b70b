"""EnergyNet: a bottom-up ConvNet whose score f(x) is one number a sample; its energy is −f(x)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import is_number, one_of, positive_int
from ..errors import Refused
from .layers import ACTIVATIONS, BatchStatistics, ConvLayer, LinearHead, SpectralWeight

NORMS = ("batch", "frozen", "none")
HEADS = ("linear", "sum")


@dataclasses.dataclass(frozen=True)
class ConvSpec:
    """One convolution: output channels, kernel length and stride, the same along every spatial dimension."""

    channels: int
    kernel: int
    stride: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            positive_int(getattr(self, field.name), field.name, "ConvSpec")


def _described(layer: nn.Module | None) -> tuple[ConvSpec, str, float] | None:
    """The numbers of a layer as it runs now; None where it is no layer of this kind."""
    if type(layer) is not ConvLayer:
        return None
    channels, kernel = layer.weight.shape[0], layer.weight.shape[2]
    spec = ConvSpec(channels, kernel, layer.stride) if layer.padding == kernel // 2 else None
    return None if spec is None else (spec, layer.activation, layer.negative_slope)


class EnergyNet(nn.Module):
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

    Input (N, channels, *size) float; output (N,) energies, low where data are likely. Train and eval mode make no
    difference. What changes in a forward (running statistics, power iteration of the spectral norm) changes only
    inside `observing()`.
    """

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
        super().__init__()
        one_of(norm, NORMS, "norm", "EnergyNet")
        one_of(activation, ACTIVATIONS, "activation", "EnergyNet")
        one_of(head, HEADS, "head", "EnergyNet")
        if ndim not in (1, 2, 3):
            raise ValueError(f"EnergyNet: ndim must be 1, 2 or 3, got {ndim!r}")
        positive_int(channels, "channels", "EnergyNet")
        self.size = (size,) * ndim if isinstance(size, int) else tuple(size)
        if len(self.size) != ndim:
            raise ValueError(f"EnergyNet: size must have {ndim} entries, got {self.size}")
        for length in self.size:
            positive_int(length, "size", "EnergyNet")
        self.specs = tuple(layers)
        if not self.specs:
            raise ValueError("EnergyNet: layers must hold at least one ConvSpec, got none")
        self.channels, self.norm = channels, norm
        self.spectral_norm, self.head_kind, self.ndim = spectral_norm, head, ndim

        inputs, top = channels, self.size
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
        generator = torch.Generator().manual_seed(seed)
        for module in self._weighted():
            module.reset(generator)
        self._input_shape = torch.Size((channels, *self.size))

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
        if not is_number(slope) or not math.isfinite(slope):
            raise Refused("negative_slope", "be a finite number", repr(slope), "EnergyNet")
        self._negative_slope = slope
        for layer in self.convolutions:
            layer.negative_slope = slope

    @property
    def convolutions(self) -> list[ConvLayer]:
        """The layers below the head, bottom first."""
        return [layer for layer in self.layers if isinstance(layer, ConvLayer)]

    def _weighted(self) -> Iterator[SpectralWeight]:
        return (module for module in self.modules() if isinstance(module, SpectralWeight))

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x has the shape that this net takes."""
        if x.shape[1:] != self._input_shape and (
            self.head is not None or x.dim() != self.ndim + 2 or x.shape[1] != self.channels
        ):
            expected = ", ".join(map(str, self._input_shape))
            raise ValueError(f"EnergyNet: x must have shape (N, {expected}), got {tuple(x.shape)}")

    def score(self, x: Tensor) -> Tensor:  # (N, C, *size) -> (N,)
        """f(x), high where data are likely: the head's value on the top map."""
        self.check_input(x)
        for layer in self.layers:
            x = layer(x)
        return x.flatten(1).sum(1) if self.head is None else self.head(x)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, *size) -> (N,)
        """The energies −f(x)."""
        return -self.score(x)

    @contextlib.contextmanager
    def observing(self) -> Iterator[EnergyNet]:
        """Inside, a forward is one on observed data: running statistics and power iterations follow it."""
        followers = [m for m in self.modules() if isinstance(m, (SpectralWeight, BatchStatistics))]
        before = [module.observe for module in followers]
        for module in followers:
            module.observe = True
        try:
            yield self
        finally:
            for module, value in zip(followers, before, strict=True):
                module.observe = value

    @torch.no_grad()
    def freeze_norm(self) -> EnergyNet:
        """A new net with the running statistics of a norm="batch" net folded into its convolutions.

        Its samples are independent of each other. It equals this net only as far as the running statistics equal
        those of the batch. Weights divided by a spectral norm are stored divided. A net without batch statistics
        gives a copy of itself.
        """
        config = self.config()
        if self.norm == "batch":
            config.update(norm="frozen", spectral_norm=False)
        net = EnergyNet.from_config(config)
        if self.norm != "batch":
            net.load_state_dict(self.state_dict())
            return net.to(next(self.parameters()).device)
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

    def macs(self) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        total, size = 0, self.size
        for layer in self.convolutions:
            total += layer.macs(size)
            size = tuple(layer.map_size(s) for s in size)
        return total + (self.head.weight.numel() if self.head is not None else 0)

    def config(self) -> dict[str, Any]:
        """What `from_config` rebuilds this architecture from, in plain JSON types.

        ValueError where a layer was changed by hand since, so that no other net is stored in this one's name.
        """
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
        """The architecture that `config()` described, with fresh weights."""
        rest = {key: value for key, value in config.items() if key != "layers"}
        return cls(layers=[ConvSpec(*layer) for layer in config["layers"]], seed=seed, **rest)
