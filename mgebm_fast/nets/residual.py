"""ResidualNet: a bottom-up net of pre-activation residual blocks, with average pooling between its stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import finite_number, is_int, number, one_of, positive_int
from ..errors import Refused
from .layers import ACTIVATIONS, ConvLayer, LinearHead, activate
from .score_net import ScoreNet

HEADS = ("linear", "mean", "sum")
_POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


class Activation(nn.Module):
    """An activation as a layer of its own."""

    def __init__(self, activation: str, negative_slope: float) -> None:
        super().__init__()
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, x: Tensor) -> Tensor:
        return activate(x, self.activation, self.negative_slope)


class ResidualBlock(nn.Module):
    """pool(s(x) + conv(a(conv(a(x)))) + b), 3 taps a dimension; s is the identity, or a convolution of one tap where
    the channels change; b the label's bias of each channel, where there are labels; pool the mean over blocks of 2
    pixels a dimension, where asked for."""

    def __init__(
        self, inputs: int, outputs: int, *, pool: bool, activation: str, labels: int | None, **options: Any
    ) -> None:
        super().__init__()
        self.pool, self.activation, self.negative_slope = pool, activation, options["negative_slope"]
        self.first = ConvLayer(inputs, outputs, 3, 1, norm="none", activation=activation, **options)
        self.second = ConvLayer(outputs, outputs, 3, 1, norm="none", activation="none", **options)
        self.shortcut: ConvLayer | None = None
        if inputs != outputs:
            self.shortcut = ConvLayer(inputs, outputs, 1, 1, norm="none", activation="none", **options)
        self.label_bias = None if labels is None else nn.Parameter(torch.zeros(labels, outputs, dtype=torch.float32))

    def forward(self, x: Tensor, label: int | Tensor | None = None) -> Tensor:
        h = self.second(self.first(activate(x, self.activation, self.negative_slope)))
        x = h + (x if self.shortcut is None else self.shortcut(x))
        if self.label_bias is not None:
            bias = self.label_bias[label]  # (C,) or (N, C)
            x = x + bias.reshape(-1, bias.shape[-1], *(1,) * (x.dim() - 2))
        return _POOLS[x.dim() - 2](x, 2) if self.pool else x

    @property
    def convolutions(self) -> list[ConvLayer]:
        return [self.first, self.second, *([] if self.shortcut is None else [self.shortcut])]


def _form(net: nn.Module) -> list[tuple[Any, ...]]:
    """What of a net's modules is no weight."""
    fields = ("activation", "negative_slope", "pool", "stride", "padding")
    return [
        (
            name,
            type(module),
            *(getattr(module, field, None) for field in fields),
            *(p.shape for p in module.parameters()),
        )
        for name, module in net.named_modules()
    ]


class ResidualNet(ScoreNet):
    """E(x) = −f(x), f = head(a(block_L(… block_1(conv(x))))): a convolution, stages of residual blocks (as in
    `ResidualBlock`), each but the last ending in average pooling, and an activation.

    Args:
        size: spatial size of the input, one int for all dimensions or one for each.
        channels: channels of the input.
        stages: channels of each stage. A stage halves the map of the one before; what is left over of an odd length is
            dropped.
        depth: residual blocks a stage.
        activation: "silu", "leaky_relu" (with `negative_slope`), "relu", "elu" or "none".
        spectral_norm: divide every weight by its largest singular value (Miyato et al., 2018).
        head: "linear" over the whole top map; or linear over the "mean" or the "sum" of its pixels (then any input size
            with a pixel left in the top map will do).
        ndim: number of spatial dimensions, 1, 2 or 3.
        labels: how many classes or noise levels there are; None: none. Each block then adds a bias a channel, learnt
            for each label, zero at first, and `forward(x, label)` takes one for all samples, an int, or (N,) int64.
        seed: Xavier-uniform weights are drawn from it; biases are zero.

    Input (N, channels, *size) float; output (N,) energies, low where data are likely. It has no normalisation: samples
    are independent. Source: He et al. (ECCV 2016) for the blocks; Du & Mordatch (NeurIPS 2019) for their use here.
    """

    name = "ResidualNet"
    norm = "none"

    def __init__(
        self,
        size: int | Sequence[int],
        channels: int,
        stages: Sequence[int],
        *,
        depth: int = 1,
        activation: str = "silu",
        negative_slope: float = 0.2,
        spectral_norm: bool = False,
        head: str = "linear",
        ndim: int = 2,
        labels: int | None = None,
        seed: int = 0,
    ) -> None:
        one_of(activation, ACTIVATIONS, "activation", self.name)
        one_of(head, HEADS, "head", self.name)
        self.depth = positive_int(depth, "depth", self.name)
        self.labels = labels = positive_int(labels, "labels", self.name, none=True)
        negative_slope = finite_number(negative_slope, "negative_slope", self.name)
        super().__init__(size, channels, ndim)
        self.stages = tuple(positive_int(width, "stages", self.name) for width in stages)
        if not self.stages:
            raise ValueError("ResidualNet: stages must hold at least one number of channels, got none")
        self.activation, self.negative_slope = activation, negative_slope
        self.spectral_norm, self.head_kind = spectral_norm, head
        top = tuple(length >> (len(self.stages) - 1) for length in self.size)
        if min(top) < 1:
            most = min(self.size).bit_length()
            raise Refused("stages", f"be at most {most} for size {self.size}", len(self.stages), self.name)

        options: dict[str, Any] = {
            "activation": activation, "negative_slope": negative_slope, "spectral_norm": spectral_norm, "ndim": ndim
        }  # fmt: skip
        stem = ConvLayer(self.channels, self.stages[0], 3, 1, norm="none", **{**options, "activation": "none"})
        self.layers = nn.ModuleList([stem])
        for inputs, outputs, pool in self._blocks():
            self.layers.append(ResidualBlock(inputs, outputs, pool=pool, labels=labels, **options))
        self.layers.append(Activation(activation, negative_slope))
        self.top_pixels = math.prod(top)
        features = self.stages[-1] * (self.top_pixels if head == "linear" else 1)
        self.head: LinearHead = LinearHead(features, spectral_norm)
        self._reset(seed)

    def _blocks(self) -> Iterator[tuple[int, int, bool]]:
        """(inputs, outputs, whether pooling follows) of every block."""
        inputs = self.stages[0]
        for stage, outputs in enumerate(self.stages, start=1):
            for block in range(1, self.depth + 1):
                yield inputs, outputs, block == self.depth and stage < len(self.stages)
                inputs = outputs

    @property
    def any_size(self) -> bool:
        return self.head_kind != "linear"

    def check_input(self, x: Tensor) -> None:
        super().check_input(x)
        least = 1 << (len(self.stages) - 1)
        if min(x.shape[2:]) < least:
            raise Refused("x", f"have at least {least} pixels a dimension", tuple(x.shape), self.name)

    def check_label(self, label: int | Tensor | None, samples: int) -> None:
        """Raise unless `label` is what this net takes with so many samples."""
        if self.labels is None:
            if label is not None:
                raise Refused("label", "be None for a net without labels", type(label).__name__, self.name)
            return
        must = f"be an int in [0, {self.labels}), or an int64 tensor ({samples},) of such"
        if not isinstance(label, Tensor):
            if not is_int(label, 0) or label not in range(self.labels):
                raise Refused("label", must, repr(label), self.name)
        elif label.dtype != torch.int64 or label.shape != (samples,):
            raise Refused("label", must, f"{label.dtype} of shape {tuple(label.shape)}", self.name)
        elif label.is_cpu and samples and not torch.compiler.is_compiling():
            # As Python's numbers: torch's ops on them would bind a reading of the energy to their range.
            low, high = min(values := label.tolist()), max(values)
            if low < 0 or high >= self.labels:
                raise Refused("label", must, f"values from {low} to {high}", self.name)

    def forward(self, x: Tensor, label: int | Tensor | None = None) -> Tensor:  # (N, C, *size) -> (N,)
        """The energies −f(x), of images of a label where the net has labels."""
        return -self.score(x, label)

    def score(self, x: Tensor, label: int | Tensor | None = None) -> Tensor:  # (N, C, *size) -> (N,)
        self.check_input(x)
        label = number(label)
        self.check_label(label, len(x))
        for layer in self.layers:
            x = layer(x, label) if isinstance(layer, ResidualBlock) else layer(x)
        if self.head_kind != "linear":
            x = x.flatten(2).mean(2) if self.head_kind == "mean" else x.flatten(2).sum(2)
        return self.head(x)

    def placed(self) -> Iterator[tuple[ConvLayer, tuple[int, ...]]]:
        size = self.size
        for layer in self.layers:
            if isinstance(layer, ResidualBlock):
                yield from ((convolution, size) for convolution in layer.convolutions)
                size = tuple(length // 2 for length in size) if layer.pool else size
            elif isinstance(layer, ConvLayer):
                yield layer, size

    @torch.no_grad()
    def freeze_norm(self) -> ResidualNet:
        """A copy of this net: its samples are independent of each other already."""
        return self.copied()

    def config(self) -> dict[str, Any]:
        found = {
            "kind": self.name,
            "size": list(self.size),
            "channels": self.channels,
            "stages": list(self.stages),
            "depth": self.depth,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "spectral_norm": self.spectral_norm,
            "head": self.head_kind,
            "ndim": self.ndim,
            **({} if self.labels is None else {"labels": self.labels}),
        }
        if _form(self) != _form(ResidualNet.from_config(found)):
            raise ValueError(
                "ResidualNet: layers must be those that it was built with to be described and stored, but they were "
                "changed since"
            )
        return found

    @classmethod
    def from_config(cls, config: dict[str, Any], *, seed: int = 0) -> ResidualNet:
        rest = {key: value for key, value in config.items() if key not in ("kind", "stages")}
        return cls(stages=config["stages"], seed=seed, **rest)
