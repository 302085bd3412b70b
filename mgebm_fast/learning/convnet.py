"""Generative ConvNet (Xie, Lu, Zhu, Wu, ICML 2016, arXiv 1602.03264): persistent chains from zero images, and a net
that grows layer by layer while the layers beneath keep learning."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..nets import ConvSpec
from ..sampling import GenerativeConvNet
from .baselines import SingleGridRule, narrow
from .config import TrainConfig
from .passes import CHAIN_STEP, LEARNING

__all__ = ["ConvNetRule", "build_model", "layers_of", "narrow", "work"]


class ConvNetRule(SingleGridRule):
    """`ContrastiveRule` of a `GenerativeConvNet`.

    With `grow` g > 0, update t trains layers 1 … p of L alone, p = min(L, 1 + ⌊t (L − 1) / (g·steps)⌋): the head is the
    sum of layer p's map, the layers above are left out of the energy and out of learning. Chains go on where they were.
    """

    model: GenerativeConvNet

    @property
    def grows(self) -> bool:
        return getattr(self.config.options, "grow", 0.0) > 0 and self.model.layers > 1

    def depth(self, iteration: int) -> int | None:
        """Layers in use at update `iteration`; None: all."""
        return depth_at(self.config, self.model.layers, iteration) if self.grows else None

    @property
    def nets(self) -> Sequence[nn.Module]:
        return [self.model.energy]

    def update(self, batch: Tensor, iteration: int, *, detail: bool = False) -> dict[str, float]:
        self.model.depth = self.depth(iteration)
        return super().update(batch, iteration, detail=detail)

    def headline(self, metrics: Mapping[str, float]) -> str:
        layers = f"{self.model.depth} layers, " if self.grows else ""
        return layers + super().headline(metrics)

    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        """The persistent chains beside the data: samples from zero images would cost more than the updates between."""
        size, chains = self.model.sizes[-1], self.model.bank[: len(observed)]
        shown = (("chains", chains), ("data", self.observed(observed[: len(chains)])[-1]))
        return [(f"{title} {size}x{size}", self.model.to_uint8(images)) for title, images in shown], 2

    def before_stored(self, iteration: int) -> None:
        """What is stored has the noise, and the layers, of its last update."""
        super().before_stored(iteration)
        self.model.depth = self.depth(max(0, iteration - 1))


def depth_at(config: TrainConfig, layers: int, iteration: int) -> int:
    """Layers in use at update `iteration` of a net of `layers`."""
    growing = config.options.grow * config.steps
    return min(layers, 1 + int(iteration * (layers - 1) / max(1.0, growing))) if growing > 0 else layers


def work(model: GenerativeConvNet, config: TrainConfig) -> float:
    """`work_of_chains` of the layers in use, on average over the updates."""
    depths = collections.Counter(depth_at(config, model.layers, i) for i in range(config.steps))
    passes = CHAIN_STEP * model.langevin[0].steps + 2 * LEARNING
    total = 0
    for model.depth, updates in depths.items():
        total += updates * passes * model.energy.macs()
    return total / max(1, config.steps)


def layers_of(config: TrainConfig) -> tuple[ConvSpec, ...]:
    """The convolutions that the method's keys describe, `width` times their channels."""
    return tuple(
        ConvSpec(max(1, round(channels * config.width)), kernel, stride)
        for channels, kernel, stride in config.options.layers
    )


def build_model(config: TrainConfig) -> GenerativeConvNet:
    """The untrained model."""
    one = narrow(config)
    options = one.options
    return GenerativeConvNet(
        one.sizes[-1],
        layers_of(one),
        head=options.head,
        init_std=options.init_std,
        sample_steps=options.sample_steps,
        **one.model_arguments(),
    )
