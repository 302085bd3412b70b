"""Generative ConvNet (Xie, Lu, Zhu, Wu, ICML 2016, arXiv 1602.03264): persistent chains from zero images, and a net
that grows layer by layer while the layers beneath keep learning."""

from __future__ import annotations

import collections
import dataclasses
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...models import GenerativeConvNet
from ...nets import ConvSpec, EnergyNet
from ..config.keys import MOST_CHANNELS, MOST_SAMPLES, MOST_STEPS, Choice, Many, Maybe, Real, Whole, key, pick
from ..config.method import Method, register
from ..config.train_config import TrainConfig
from .baselines import SingleGridRule, Zeros, narrow
from .work import CHAIN_STEP, LEARNING


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """`[generative-convnet]`: the net, its growth, and its persistent chains."""

    layers: tuple = key(
        ((48, 9, 2), (48, 5, 1), (32, 3, 1)),
        Many(Many(Whole(1, MOST_CHANNELS), 3), least=1, most=64),
        "[channels, kernel, stride] of each layer",
        fixed=True,
    )
    head: str = key(
        "sum", Choice(("sum", "linear")), "sum of the top map, for images of any size, or linear over it", fixed=True
    )
    grow: float = key(
        0.0,
        Real(0, 1, below=True),
        "share of the updates, in equal parts, that stacks of fewer layers are trained for",
        fixed=True,
    )
    init_std: Any = key(
        None,
        Maybe(Real(0, above=True)),
        "standard deviation of normal initial weights; none: Xavier-uniform ones",
        fixed=True,
    )
    bank_size: Any = key(
        None, Maybe(Whole(1, MOST_SAMPLES)), "chains that batches are drawn from; none: as many as a batch", fixed=True
    )
    restart: float = key(0.0, Real(0, 1), "probability that a drawn chain starts again from the zero image", fixed=True)
    sample_steps: int = key(300, Whole(1, MOST_STEPS), "steps of a sample's chain from the zero image")


class ChainsRule(SingleGridRule):
    """`SingleGridRule` of persistent chains from zero images, which it shows: samples would cost more than updates."""

    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        size, chains = self.model.sizes[-1], self.model.bank[: len(observed)]
        shown = (("chains", chains), ("data", self.observed(observed[: len(chains)])[-1]))
        return [(f"{title} {size}x{size}", self.model.to_uint8(images)) for title, images in shown], 2


class ConvNetRule(ChainsRule):
    """`ContrastiveRule` of a `GenerativeConvNet`.

    With `grow` g > 0, update t trains layers 1 … p of L alone, p = min(L, 1 + ⌊t (L − 1) / (g·steps)⌋): the head is the
    sum of layer p's feature map, the layers above are left out of the energy and out of learning. Chains go on where
    they were.
    """

    model: GenerativeConvNet

    def firsts(self) -> dict[nn.Parameter, int]:
        if not self.grows:
            return super().firsts()
        (net,) = self.model.energy_nets("grown", EnergyNet)
        layers, updates = self.model.layers, range(self.config.steps)
        assert isinstance(net, EnergyNet)
        firsts = [bisect_left(updates, p, key=lambda t: depth_at(self.config, layers, t)) for p in range(1, layers + 1)]
        found = dict.fromkeys(net.parameters(), firsts[-1])  # a linear head is of the whole net alone
        for layer, first in zip(net.layers, firsts, strict=True):
            found.update(dict.fromkeys(layer.parameters(), first))
        return found

    @property
    def grows(self) -> bool:
        return self.config.options.grow > 0 and self.model.layers > 1

    def arrange(self, iteration: int) -> None:
        super().arrange(iteration)
        self.model.depth = depth_at(self.config, self.model.layers, iteration)

    def headline(self, metrics: Mapping[str, float]) -> str:
        layers = f"{self.model.depth} layers, " if self.grows else ""
        return layers + super().headline(metrics)


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
        total += updates * passes * model.net.macs()
    return total / max(1, config.steps)


def layers_of(config: TrainConfig) -> tuple[ConvSpec, ...]:
    """The convolutions that the method's keys describe, `width` times their channels."""
    return tuple(
        ConvSpec(max(1, round(channels * pick(config.width, -1))), kernel, stride)
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


register(
    Method(
        "generative-convnet",
        "one net of one's own layers, persistent chains from zero images",
        GenerativeConvNet,
        ConvNetRule,
        build_model,
        work,
        ConvNetConfig,
        narrow=narrow,
        start=Zeros,
    )
)
