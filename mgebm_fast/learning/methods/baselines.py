"""The baselines on one net: CD-K, persistent CD, single-grid CD, short-run chains. Only the chains' starts differ."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ... import noise, ops
from ...errors import ConfigError
from ...models import SingleGrid
from ..config.keys import MOST_SAMPLES, MOST_STEPS, Maybe, Real, Whole, key, pick
from ..config.method import METHODS, Method, register
from ..config.train_config import TrainConfig, merge
from .banks import Slots
from .contrastive import ContrastiveRule
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
    restart: float = key(0.0, Real(0, 1), "probability that a drawn chain begins anew, from noise", fixed=True)
    sample_steps: Any = key(
        None, Maybe(Whole(1, MOST_STEPS)), "further steps of a stored chain that is sampled; none: as in training"
    )


class InitialState:
    """Where the training chains of a method start, and what becomes of where they end."""

    sampled_from = "noise"  # where chains of the trained model start (`SingleGrid`)

    def __init__(self, model: SingleGrid, config: TrainConfig, images: int) -> None:
        self.model, self.config = model, config
        self.attempt = 0

    def try_again(self, attempt: int) -> None:
        """Draw as attempt number `attempt` of the run does, from here on (`noise.retried`)."""
        self.attempt = attempt

    def ids(self, iteration: int, first_sample: int, n: int) -> int | Tensor:
        """The sample ids of n chains, from place `first_sample` of the update's batch on: one for the first, or n."""
        return first_sample

    def at(self, observed: list[Tensor], iteration: int, ids: int | Tensor) -> Tensor:
        """(N, C, S, S) for `observed`, a batch at sizes 1 and S."""
        raise NotImplementedError

    def keep(self, ids: int | Tensor, x: Tensor) -> None:
        """Take what the chains of an update that was applied have come to."""
        return

    def noise(self, n: int, step: int, ids: int | Tensor) -> Tensor:
        """(n, C, S, S) uniform in value_range."""
        return self.model.noise_start(
            n, seed=self.config.seed, step=step, first_sample=ids,
            purpose=noise.retried(noise.Purpose.INITIAL_STATE, self.attempt),
        )  # fmt: skip


class Observed(InitialState):
    """The observed images, with their noise where the net sees them so: contrastive divergence (Hinton, 2002)."""

    def at(self, observed: list[Tensor], iteration: int, ids: int | Tensor) -> Tensor:
        return observed[1]


class Expanded(InitialState):
    """The replicated 1×1 means of the observed images: single-grid CD (Gao et al., CVPR 2018)."""

    sampled_from = "colours"

    def at(self, observed: list[Tensor], iteration: int, ids: int | Tensor) -> Tensor:
        return ops.upsample(observed[0], self.model.sizes[-1])


class Noise(InitialState):
    """Uniform noise, never stored: short-run MCMC (Nijkamp, Hill, Zhu, Wu, NeurIPS 2019)."""

    def at(self, observed: list[Tensor], iteration: int, ids: int | Tensor) -> Tensor:
        return self.noise(len(observed[0]), iteration, ids)


class Persistent(InitialState):
    """Where the chains of the batch's slots ended last: persistent CD (Tieleman, ICML 2008).

    A bank begins as uniform noise, which is also what a restarted chain begins from. The noise of a chain belongs to
    its slot, not to its place in a batch.
    """

    sampled_from = "bank"

    def __init__(self, model: SingleGrid, config: TrainConfig, images: int) -> None:
        super().__init__(model, config, images)
        options = config.options
        if options.bank_size is not None and options.bank_size < config.batch_size:
            raise ConfigError(
                f"{config.method}.bank_size must be at least batch_size ({config.batch_size}), got {options.bank_size}"
            )
        self.slots = self.chosen(images)
        if len(model.bank) != self.slots.size:
            model.bank = self.noise(self.slots.size, 0, 0)

    def try_again(self, attempt: int) -> None:
        super().try_again(attempt)
        self.slots = dataclasses.replace(self.slots, attempt=attempt)

    def chosen(self, images: int) -> Slots:
        """The slots that batches take."""
        config, options = self.config, self.config.options
        return Slots.of(options.bank_size, config.batch_size, images, options.restart, config.seed)

    def ids(self, iteration: int, first_sample: int, n: int) -> Tensor:
        return self.slots.at(iteration, first_sample, n).to(self.model.bank.device)

    def at(self, observed: list[Tensor], iteration: int, ids: int | Tensor) -> Tensor:
        assert isinstance(ids, Tensor)
        x = self.model.bank[ids]
        if self.slots.restart:
            anew = self.slots.restarted(iteration, ids).reshape(-1, *[1] * (x.dim() - 1))
            x = torch.where(anew, self.noise(len(ids), iteration + 1, ids), x)  # step 0 made the bank itself
        return x

    def keep(self, ids: int | Tensor, x: Tensor) -> None:
        self.model.bank[ids] = x


class Zeros(Persistent):
    """Persistent chains that begin, and begin anew, as the model's `zeros`; as many as a batch unless `bank_size` says
    more."""

    def chosen(self, images: int) -> Slots:
        config, options = self.config, self.config.options
        return Slots.of(options.bank_size or config.batch_size, config.batch_size, images, options.restart, config.seed)

    def noise(self, n: int, step: int, ids: int | Tensor) -> Tensor:
        return self.model.zeros(n)  # type: ignore[attr-defined,operator]


class SingleGridRule(ContrastiveRule):
    """`ContrastiveRule` of one net, whose K-step chains start where the method says (`InitialState`)."""

    model: SingleGrid

    def __init__(self, model: SingleGrid, config: TrainConfig, *, images: int) -> None:
        super().__init__(model, narrow(config), images=images)
        self.initial = self.begin(images)
        self.divisible = not isinstance(self.initial, Persistent)  # a bank lives in one process
        self._ended: dict[int, tuple[int | Tensor, Tensor]] = {}  # by first sample: chains may be run again

    def begin(self, images: int) -> InitialState:
        """Where chains start, by the method's name."""
        return METHODS[self.config.method].start(self.model, self.config, images)

    def synthesise(self, observed: list[Tensor], iteration: int, first_sample: int = 0) -> list[Tensor]:
        ids = self.initial.ids(iteration, first_sample, len(observed[0]))
        x = self.chain_of_one(self.initial.at(observed, iteration, ids), iteration, ids)
        self._ended[first_sample] = ids, x
        return [x]

    def update(self, batch: Tensor, iteration: int, *, detail: bool = False) -> dict[str, float]:
        self._ended.clear()
        if self.initial.attempt != self.attempt:
            self.initial.try_again(self.attempt)
        metrics = super().update(batch, iteration, detail=detail)
        for ids, x in self._ended.values():
            self.initial.keep(ids, x)
        self._ended.clear()
        return metrics


def narrow(config: TrainConfig) -> TrainConfig:
    """The configuration of the finest net alone: sizes (1, S), and the last of values that are given by net.

    Single-grid CD takes as many steps in its one chain as the grids of a multi-grid model do together.
    """
    steps = [pick(config.langevin.steps, net) for net in range(len(config.sizes) - 1)]
    total = sum(steps) if config.method == "single-grid-cd" else steps[-1]
    return merge(config, {"sizes": [1, config.sizes[-1]], "langevin": {"steps": total}})


def build_model(config: TrainConfig) -> SingleGrid:
    """The untrained model of a baseline."""
    one = narrow(config)
    return SingleGrid(
        one.sizes[-1],
        start=METHODS[config.method].start.sampled_from,
        sample_steps=getattr(one.options, "sample_steps", None),
        width=one.width,
        variant=one.variant,
        **one.model_arguments(),
    )


def _register(name: str, about: str, start: type[InitialState], table: type | None = None) -> None:
    register(
        Method(name, about, SingleGrid, SingleGridRule, build_model, work_of_chains, table, narrow=narrow, start=start)
    )


_register("cd", "one net, chains from the observed images", Observed, CdConfig)
_register("pcd", "one net, chains that persist", Persistent, PcdConfig)
_register("single-grid-cd", "the finest net alone, from the 1×1 means, as many steps in all", Expanded)
_register("short-run", "one net, chains from uniform noise", Noise)
