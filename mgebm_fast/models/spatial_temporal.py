"""SpatialTemporal: one net over time and space, or over time alone, and its persistent chains: videos and sounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import is_int
from ..nets import ConvSpec, EnergyNet
from .model import Group
from .single import OneNet


class SpatialTemporal(OneNet):
    """A model of videos (C, T, H, W) or of sounds (1, L), whose time is a spatial dimension as any other.

    Sample i is the persistent chain i mod M of the M of training, `sample_steps` steps on.

    Args:
        size: (T, H, W) or (L,).
        layers: the convolutions, bottom first, each the same along every dimension.
        head: "linear" over the top feature map, or its "sum", which makes every place alike.
        rate: frames or samples a second.
        sample_steps: None: as many as `langevin` has.

    Other arguments as `EnergyModel`'s. State: the net's; `colours` (1, C), the data's mean, where chains begin; `bank`
    (M, C, *size), the persistent chains.

    Source: Xie, Zhu, Wu, Synthesizing dynamic patterns by spatial-temporal generative ConvNet (CVPR 2017).
    """

    kind = "SpatialTemporal"
    start = "bank"  # in model files

    def __init__(
        self,
        size: Sequence[int],
        layers: Sequence[ConvSpec] = (),
        *,
        head: str = "linear",
        rate: float = 25.0,
        channels: int = 3,
        activation: str | None = None,
        norm: str = "none",
        spectral_norm: bool = False,
        sample_steps: int | None = None,
        seed: int = 0,
        nets: Sequence[nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        shape = tuple(size)
        if len(shape) not in (1, 3) or not all(is_int(s, 2) for s in shape):
            raise ValueError(f"SpatialTemporal: size must be [T, H, W] or [L], ints from 2 on, got {list(shape)}")
        if nets is None:
            net = EnergyNet(
                shape, channels, layers, norm=norm, activation=activation or "silu", spectral_norm=spectral_norm,
                head=head, ndim=len(shape), seed=seed % 2**63,
            )  # fmt: skip
            nets = [net]
        self.shape, self.rate = shape, float(rate)
        super().__init__(shape[-1], sample_steps=sample_steps, channels=channels, nets=nets, seed=seed, **arguments)
        self._register_rows("bank", channels, *shape)

    @property
    def is_video(self) -> bool:
        return len(self.shape) == 3

    def zeros(self, n: int) -> Tensor:  # (n, C, *size)
        """The data's mean everywhere: the zeros of the paper, which subtracts it. Chains begin there."""
        mean = (
            self.colours.mean(0)
            if len(self.colours)
            else self.colours.new_full((self.channels,), sum(self.value_range) / 2)
        )
        return mean.reshape(1, -1, *[1] * len(self.shape)).repeat(n, 1, *self.shape)

    def sample_shape(self, size: int) -> tuple[int, ...]:
        return self.channels, *self.shape

    def _start(self, group: Group) -> Tensor:
        if group.mask is not None:
            raise ValueError("sample: mask must be None for a model of videos or of sounds")
        if len(self.bank) == 0:
            raise ValueError("sample: the model must hold chains of training, got none: train it first")
        return self.bank[(torch.arange(group.n, device=self.bank.device) + group.first_sample) % len(self.bank)]

    def grids(self, x: Tensor) -> list[Tensor]:
        return [x]

    def config(self) -> dict[str, Any]:
        own = {"start": self.start, "sample_steps": self.sample_steps, "shape": list(self.shape), "rate": self.rate}
        return {**super().config(), **own}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SpatialTemporal:
        return cls(config["shape"], rate=config["rate"], sample_steps=config["sample_steps"], **cls._arguments(config))
