"""ScoreNet, what the nets of this package share: a score of layers and a head, and the energy that is its negative."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..checks import number, positive_int
from .layers import BatchStatistics, ConvLayer, LinearHead, SpectralWeight

AnyNet = TypeVar("AnyNet", bound="ScoreNet")


class ScoreNet(nn.Module, abc.ABC):
    """E(x) = −f(x), f = head(layer_L(… layer_1(x))), one number a sample.

    Train and eval mode make no difference. What changes in a forward (running statistics, power iteration of the
    spectral norm) changes only inside `observing()`.
    """

    name: ClassVar[str]  # of the class, as errors begin
    layers: nn.ModuleList
    head: LinearHead | None
    activation: str
    negative_slope: float
    norm: str
    spectral_norm: bool

    def __init__(self, size: int | Sequence[int], channels: int, ndim: int) -> None:
        super().__init__()
        if ndim not in (1, 2, 3):
            raise ValueError(f"{self.name}: ndim must be 1, 2 or 3, got {ndim!r}")
        channels, size = positive_int(channels, "channels", self.name), number(size)
        self.size = (size,) * ndim if isinstance(size, int) else tuple(map(number, size))
        if len(self.size) != ndim:
            raise ValueError(f"{self.name}: size must have {ndim} entries, got {self.size}")
        for length in self.size:
            positive_int(length, "size", self.name)
        self.channels, self.ndim = channels, ndim
        self._input_shape = torch.Size((channels, *self.size))

    def _reset(self, seed: int) -> None:
        """Xavier-uniform weights of `seed`, zero biases."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, SpectralWeight):
                module.reset(generator)

    @property
    def any_size(self) -> bool:
        """Whether inputs of other sizes than `size` will do."""
        return self.head is None

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless x has the shape that this net takes."""
        if x.shape[1:] != self._input_shape and (
            not self.any_size or x.dim() != self.ndim + 2 or x.shape[1] != self.channels
        ):
            expected = ", ".join(map(str, self._input_shape))
            raise ValueError(f"{self.name}: x must have shape (N, {expected}), got {tuple(x.shape)}")

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
    def observing(self: AnyNet) -> Iterator[AnyNet]:
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

    @property
    def convolutions(self) -> list[ConvLayer]:
        """The convolutions below the head, bottom first."""
        return [layer for layer, _ in self.placed()]

    @abc.abstractmethod
    def placed(self) -> Iterator[tuple[ConvLayer, tuple[int, ...]]]:
        """The convolutions below the head, bottom first, each with the size of the map that it takes."""

    def macs(self) -> int:
        """Multiply-accumulates of one sample's forward pass."""
        total = sum(layer.macs(size) for layer, size in self.placed())
        return total + (self.head.weight.numel() if self.head is not None else 0)

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """What `nets.from_config` rebuilds this architecture from, in plain JSON types.

        ValueError where a layer was changed by hand since, so that no other net is stored in this one's name.
        """

    @classmethod
    @abc.abstractmethod
    def from_config(cls: type[AnyNet], config: dict[str, Any], *, seed: int = 0) -> AnyNet:
        """The architecture that `config()` described, with fresh weights."""

    @abc.abstractmethod
    def freeze_norm(self: AnyNet) -> AnyNet:
        """A new net whose samples are independent of each other: running statistics are folded into its weights."""

    def copied(self: AnyNet) -> AnyNet:
        """A new net of the same architecture and weights."""
        net = self.from_config(self.config())
        net.load_state_dict(self.state_dict())
        return net.to(next(self.parameters()).device)
