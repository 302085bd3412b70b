"""The baselines on one net: CD-K, persistent CD, single-grid CD, short-run chains. Only the chains' starts differ."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ... import noise, ops
from ...errors import ConfigError
from ...models import OneNet, SingleGrid
from ...sampling.graphs import Graph
from ..config.keys import MOST_SAMPLES, MOST_STEPS, Maybe, Real, Whole, key, pick
from ..config.method import METHODS, Method, register
from ..config.train_config import TrainConfig
from ..config.values import merge
from .banks import Slots
from .contrastive import ContrastiveRule
from .synthesis import Synthesis
from .work import work_of_chains


@dataclasses.dataclass(frozen=True)
class CdConfig:
    """`[cd]`: contrastive divergence, whose K training steps never leave the data far enough to sample by."""

    sample_steps: int = key(1000, Whole(1, MOST_STEPS), "steps from noise of a chain that samples the trained model")


@dataclasses.dataclass(frozen=True)
class PcdConfig:
    """`[pcd]`: persistent chains."""

    bank_size: Any = key(
        None,
        Maybe(Whole(1, MOST_SAMPLES)),
        "chains of one bank that batches are drawn from; none: each batch of an epoch has its own",
        fixed=True,
    )
    restart: float = key(0.0, Real(0, 1), "probability that a drawn chain starts again from noise", fixed=True)
    sample_steps: Any = key(
        None, Maybe(Whole(1, MOST_STEPS)), "further steps of a stored chain that is sampled; none: as in training"
    )


class InitialState(abc.ABC):
    """Where the training chains of a method start, and what becomes of where they end."""

    sampled_from = "noise"  # where chains of the trained model start (`SingleGrid`)
    at_reference_mean = False  # whether chains begin at `langevin.reference_mean`, even without a reference
    persistent = False  # whether chains go on where they ended, which keeps a bank in one process

    def __init__(self, model: OneNet, config: TrainConfig, images: int) -> None:
        self.model: Any = model  # of the class that the method's entry names
        self.config = config

    @abc.abstractmethod
    def begin(
        self, observed: list[Tensor], iteration: int, first_sample: int, attempt: int
    ) -> tuple[int | Tensor, Tensor]:
        """The sample ids (the first, or one each) and the starts (N, C, S, S) of the chains of an update.

        Args:
            observed: a part of the batch, at sizes 1 and S.
            first_sample: the place of its first image in the whole batch.
            attempt: of the run, `noise.retried`.
        """

    def keep(self, made: Synthesis) -> None:
        """Take what the chains of an update that was applied have come to."""
        return

    def noise(self, n: int, step: int, ids: int | Tensor, attempt: int = 0) -> Tensor:
        """(n, C, S, S) uniform in value_range."""
        purpose = noise.retried(noise.Purpose.INITIAL_STATE, attempt)
        return self.model.noise_start(n, seed=self.config.seed, step=step, first_sample=ids, purpose=purpose)


class Observed(InitialState):
    """The observed images, with their noise where the net sees them so: contrastive divergence (Hinton, 2002)."""

    def begin(self, observed: list[Tensor], iteration: int, first_sample: int, attempt: int) -> tuple[int, Tensor]:
        return first_sample, observed[1]


class Expanded(InitialState):
    """The replicated 1×1 means of the observed images: single-grid CD (Gao et al., CVPR 2018)."""

    sampled_from = "colours"

    def begin(self, observed: list[Tensor], iteration: int, first_sample: int, attempt: int) -> tuple[int, Tensor]:
        return first_sample, ops.upsample(observed[0], self.model.sizes[-1])


class Noise(InitialState):
    """Uniform noise, never stored: short-run MCMC (Nijkamp, Hill, Zhu, Wu, NeurIPS 2019)."""

    def begin(self, observed: list[Tensor], iteration: int, first_sample: int, attempt: int) -> tuple[int, Tensor]:
        return first_sample, self.noise(len(observed[0]), iteration, first_sample, attempt)


class Persistent(InitialState):
    """Where the chains of the batch's slots ended last: persistent CD (Tieleman, ICML 2008).

    A bank begins as what a restarted chain starts from, `fresh`. The noise of a chain belongs to its slot, not to its
    place in a batch.
    """

    sampled_from = "bank"
    persistent = True
    by_batch = (
        True  # without a bank_size: True, each batch of an epoch has its own chains; False, all batches share one bank
    )

    def __init__(self, model: OneNet, config: TrainConfig, images: int) -> None:
        super().__init__(model, config, images)
        size, batch_size = config.options.bank_size, config.batch_size
        if size is not None and size < batch_size:
            raise ConfigError(f"{config.method}.bank_size must be at least batch_size ({batch_size}), got {size}")
        if size is None and not self.by_batch:
            size = batch_size
        self.slots = Slots.of(size, batch_size, images, config.options.restart, config.seed)
        if len(model.bank) != self.slots.size:
            model.bank = self.fresh(self.slots.size, 0, 0)

    @abc.abstractmethod
    def fresh(self, n: int, step: int, ids: int | Tensor, attempt: int = 0) -> Tensor:
        """What chains `ids` begin from, (n, C, S, S)."""

    def begin(self, observed: list[Tensor], iteration: int, first_sample: int, attempt: int) -> tuple[Tensor, Tensor]:
        ids = self.slots.at(iteration, first_sample, len(observed[0]), attempt).to(self.model.bank.device)
        x = self.model.bank[ids]
        if self.slots.restart:
            again = self.slots.restarted(iteration, ids, attempt).reshape(-1, *[1] * (x.dim() - 1))
            # Counter 0 was used to fill the bank, so restarts begin at 1.
            x = torch.where(again, self.fresh(len(ids), iteration + 1, ids, attempt), x)
        return ids, x

    def keep(self, made: Synthesis) -> None:
        self.model.bank[made.ids] = made.images[0]


class PersistentNoise(Persistent):
    """Persistent chains that begin as uniform noise."""

    def fresh(self, n: int, step: int, ids: int | Tensor, attempt: int = 0) -> Tensor:
        return self.noise(n, step, ids, attempt)


class Zeros(Persistent):
    """Persistent chains that begin as the model's `zeros`."""

    at_reference_mean = True
    by_batch = False

    def fresh(self, n: int, step: int, ids: int | Tensor, attempt: int = 0) -> Tensor:
        return self.model.zeros(n)


class OneNetRule(ContrastiveRule):
    """`ContrastiveRule` of a model of one net, with one chain."""

    model: OneNet

    def run(self, start: Tensor, iteration: int, ids: int | Tensor, graph: Graph = None) -> Tensor:
        """Where the training chains numbered `ids` come to from `start` at this update."""
        chain = self.model.langevin[0]
        return self.model.run(
            start, chain, attempt=self.attempt, seed=self.config.seed, first_sample=ids,
            first_step=iteration * chain.steps, precision=self.precision, graph=graph,
        )  # fmt: skip


class SingleGridRule(OneNetRule):
    """`OneNetRule` whose K-step chains start where the method says (`InitialState`)."""

    def __init__(self, model: OneNet, config: TrainConfig, *, images: int) -> None:
        super().__init__(model, narrow(config), images=images)
        self.initial: InitialState = METHODS[config.method].start(model, self.config, images)
        self.divisible = not self.initial.persistent

    def synthesise(
        self, observed: list[Tensor], iteration: int, first_sample: int = 0, graph: Graph = None
    ) -> Synthesis:
        ids, start = self.initial.begin(observed, iteration, first_sample, self.attempt)
        return Synthesis([self.run(start, iteration, ids, graph)], ids)

    def keep(self, made: list[Synthesis], iteration: int) -> None:
        for part in made:
            self.initial.keep(part)


def narrow(config: TrainConfig) -> TrainConfig:
    """The configuration of the finest net alone: sizes (1, S), and the last of values that are given by net.

    Single-grid CD takes as many steps in its one chain as the grids of a multi-grid model do together.
    """
    steps = [pick(config.langevin.steps, net) for net in range(len(config.sizes) - 1)]
    total = sum(steps) if config.method == "single-grid-cd" else steps[-1]
    return merge(config, {"sizes": [1, config.sizes[-1]], "begin": 0.0, "langevin": {"steps": total}})


def build_model(config: TrainConfig) -> SingleGrid:
    """The untrained model of a baseline."""
    one = narrow(config)
    return SingleGrid(
        one.sizes[-1],
        start=METHODS[config.method].start.sampled_from,
        sample_steps=None if one.options is None else one.options.sample_steps,
        width=pick(one.width, -1),
        variant=one.variant,
        depth=one.depth,
        **one.model_arguments(),
    )


def _register(name: str, about: str, start: type[InitialState], table: type | None = None) -> None:
    register(
        Method(name, about, SingleGrid, SingleGridRule, build_model, work_of_chains, table, narrow=narrow, start=start)
    )


_register("cd", "one net, chains from the observed images", Observed, CdConfig)
_register("pcd", "one net, chains that persist", PersistentNoise, PcdConfig)
_register("single-grid-cd", "the finest net alone, from the 1×1 means, as many steps in all", Expanded)
_register("short-run", "one net, chains from uniform noise", Noise)
