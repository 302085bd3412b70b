"""GeneratorModel: a generator by itself. CoopNets: a generator and the descriptor that refines what it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..nets import Generator
from ..sampling.langevin import Langevin
from .latent import Generates, Inference
from .model import Group, Model
from .single import OneNet

COMPLETE_STEPS = 300


class GeneratorModel(Generates, Model):
    """x = g(z) + s ε, z ~ N(0, I): a sample is g(z) of a draw z.

    Where pixels are known, z is inferred from them and g(z) fills the rest.

    Args:
        generator: of square images.
        inference: the chain on z; its `std` is s.
        complete_steps: of the chain that explains known pixels from a draw of the prior.
        value_range, batch_size: as in `EnergyModel`.

    State: parameters of the generator, and the buffer `latents` (M, *latent_shape) float32, z of the training images.
    """

    kind = "GeneratorModel"
    latents: Tensor

    def __init__(
        self,
        generator: Generator,
        inference: Inference,
        *,
        complete_steps: int = COMPLETE_STEPS,
        value_range: tuple[float, float] = (-1.0, 1.0),
        batch_size: int | None = None,
    ) -> None:
        super().__init__((1, generator.size), generator.channels, value_range, batch_size)
        self.generator, self.inference, self.complete_steps = generator, inference, complete_steps
        self._register_rows("latents", *generator.latent_shape)

    @property
    def sampling(self) -> tuple[Langevin, ...]:
        return ()

    def _sample_group(self, group: Group) -> list[Tensor]:
        return self.grids(self.draw(group))

    def config(self) -> dict[str, Any]:
        return {
            "sizes": list(self.sizes),
            "channels": self.channels,
            "value_range": list(self.value_range),
            "batch_size": self.batch_size,
            **_described(self),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GeneratorModel:
        parts = _parts(config)
        return cls(
            parts.pop("generator"), parts.pop("inference"), **parts, value_range=tuple(config["value_range"]),
            batch_size=config["batch_size"],
        )  # fmt: skip


class CoopNets(Generates, OneNet):
    """A descriptor, one energy net, and a generator: a sample is g(z) of a draw z ~ N(0, I), refined by the
    descriptor's chain.

    Where pixels are known, the start is completed by inference of z, and the chain holds them.

    Args:
        size: of the images.
        generator: of images of that size.
        inference, complete_steps: as in `GeneratorModel`.
        Other arguments as `EnergyModel`'s.

    Source: Xie, Lu, Gao, Zhu, Wu, "Cooperative training of descriptor and generator networks" (arXiv 1609.09408).
    """

    kind = "CoopNets"

    def __init__(
        self,
        size: int,
        generator: Generator,
        inference: Inference,
        *,
        complete_steps: int = COMPLETE_STEPS,
        channels: int = 3,
        **arguments: Any,
    ) -> None:
        super().__init__(size, channels=channels, **arguments)
        if generator.size != size or generator.channels != channels:
            raise ValueError(
                f"CoopNets: generator must make images of {channels} x {size} x {size}, got {generator.channels} x "
                f"{generator.size} x {generator.size}"
            )
        self.generator, self.inference, self.complete_steps = generator, inference, complete_steps

    def _start(self, group: Group) -> Tensor:
        return self.draw(group)

    def config(self) -> dict[str, Any]:
        return {**super().config(), **_described(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> CoopNets:
        parts = _parts(config)
        return cls(
            config["sizes"][-1], parts.pop("generator"), parts.pop("inference"), **parts, **cls._arguments(config)
        )


def _described(model: Generates) -> dict[str, Any]:
    return {
        "generator": model.generator.config(),
        "inference": dataclasses.asdict(model.inference),
        "complete_steps": model.complete_steps,
    }


def _parts(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "generator": Generator.from_config(config["generator"]),
        "inference": Inference(**config["inference"]),
        "complete_steps": config["complete_steps"],
    }
