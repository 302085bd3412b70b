"""Going back after divergence: how often a run did, and what is other from there on.

A run that goes back to the state after g updates makes the updates after g again, with

    learning rates · rate                rate = the product of `rollback.lr_factor` over all times it went back
    data noise · data_noise_factor       that of `rollback.data_noise_factor`
    noise of attempt number a            a = how often it went back (`noise.retried`)

for the rest of its life. Where one of several nets ran away, the first two are of that net alone, however often it
does: they cost the others quality. Where the cause is not one of several nets, they are of all nets.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ....errors import DivergenceError
from ...config.train_config import TrainConfig
from ..folder import MODEL, NoFolder
from ..rule import UpdateRule
from .factors import Factors, Growth
from .watch import RunAway, Watch, in_words

MOST_DATA_NOISE = 1e6  # of the noise on observed images, so that it stays a float32
_ADVICE = (  # where a number was not finite
    "a smaller optimiser.lr, optimiser.grad_clip_norm, stabilise.energy_l2 or spectral_norm keep training in bounds"
)


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One return: update number `at` diverged, and the run went on from the state after `to` updates."""

    at: int
    to: int
    factor: float  # of the learning rates from there on
    why: str
    data_noise: float = 1.0  # factor of the noise on observed images from there on; older checkpoints have none
    net: str = ""  # of which net, as metrics name it; "": of all, as in older checkpoints


def _of_data(error: DivergenceError) -> bool:
    """Whether a batch was refused, which no other rate or noise would help."""
    return isinstance(error, RunAway) and error.kind == "batch"


class History:
    """How often a run went back, and what it watches: the part of a run's state that is about divergence."""

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        self.config, self.steps = config.rollback, config.steps
        self.made: list[Rollback] = []
        self.watch, self.growth = Watch(config), Growth(rule.stiffness_bounds, config.log_every)

    @property
    def on(self) -> bool:
        return self.config.attempts > 0

    def ends_at(self, error: DivergenceError) -> bool:
        """Whether a run ends with `error`: it went back often enough, or the same images would come again."""
        return len(self.made) >= self.config.attempts or _of_data(error)

    def factors(self, net: str = "") -> Factors:
        """What numbers of `net` are multiplied by; "": those of nets that nothing is said of."""
        returned = self.returned(net)
        return Factors(returned.rate, returned.data_noise * self.growth.factors.get(net, 1.0))

    def returned(self, net: str = "") -> Factors:
        """Those of them that returns brought."""
        own = [entry for entry in self.made if entry.net in ("", net)]
        data_noise = math.prod(entry.data_noise for entry in own)
        return Factors(math.prod(entry.factor for entry in own), min(data_noise, MOST_DATA_NOISE))

    def went_back(self, made: Sequence[Rollback], at: int, to: int, error: DivergenceError, rule: UpdateRule) -> None:
        """From update number `at` to the state after `to`, after the returns `made`; what is other from there on."""
        part = error.part if isinstance(error, RunAway) else ""
        net = part if part in rule.slowed_alone else ""
        data_noise = self.config.data_noise_factor if net in rule.noisy or (rule.noisy and not net) else 1.0
        self.made = [*made, Rollback(at, to, self.config.lr_factor, str(error), data_noise, net)]

    def tell(self, rule: UpdateRule) -> None:
        """Let `rule` learn as the run does now."""
        rule.attempt = len(self.made)
        nets = ("", *(entry.net for entry in self.made), *self.growth.factors)
        rule.factors = {net: self.factors(net) for net in nets}

    @property
    def changes(self) -> str:
        """What is other after the last return."""
        net = self.made[-1].net
        factors = self.returned(net)
        numbers = f"the learning rate{f' of {in_words(net)}' if net else ''} times {factors.rate:g}"
        if factors.data_noise != 1.0:
            numbers += f", {'its ' if net else ''}data noise times {factors.data_noise:g}"
        times = f"rollback {len(self.made)} of at most {self.config.attempts}"
        return f"with {numbers} and other noise in its chains from here on ({times})"

    def state(self, *, good: bool) -> dict[str, Any]:
        """What a checkpoint's state says of it: nothing where there is nothing to say."""
        watched = self.watch.bounds.on or self.config.gap_ratio is not None
        if not self.on and not self.made and not watched and not self.growth.bounds:
            return {}
        made = [dataclasses.asdict(entry) for entry in self.made]
        return {"rollback": {"good": good, "made": made, **self.seen()}}

    def seen(self) -> dict[str, Any]:
        """What belongs to the state that a run is in, whichever way it came there."""
        return {"watch": self.watch.state(), "growth": dict(self.growth.factors)}

    def restore_seen(self, seen: Mapping[str, Any]) -> None:
        self.watch.restore(seen.get("watch", {}))
        self.growth.restore(seen.get("growth", {}))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave, from a checkpoint's state. In a run that has become longer or shorter since,
        rates and noise are others at once: the watch does not compare with what was before."""
        stored = state.get("rollback", {})
        self.made = [Rollback(**entry) for entry in stored.get("made", [])]
        same = state.get("config", {}).get("steps", self.steps) == self.steps
        self.restore_seen(stored if same else {**stored, "watch": {}})

    def last_words(self, error: DivergenceError, at: int, best: int | None, folder: NoFolder) -> str:
        """What a run that ends at update `at` says: what happened, at which net, what to change, what there is."""
        before = f"the run went back {self._times} before; " if self.made else ""
        last = folder.last_checkpoint
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        net, advice = (error.net, error.advice) if isinstance(error, RunAway) else ("the net that it names", _ADVICE)
        model = "No state was measured yet, so there is no model to keep"
        if best is not None:
            name = "The trainer's model" if folder.path is None else str(folder.path / MODEL)
            model = f"{name} is that of update {best}, the best from before the collapse"
        if not _of_data(error):
            advice += f"; rollback.attempts lets a run go back more than {self.config.attempts} times"
        happened = f"{error}; stopped at update {at}, which was not saved; {before}{good}"
        return f"{happened}. What to change for {net}: {advice}. {model}"

    def describe_end(self) -> str:
        """The rollbacks of a run that finished, for its last message; empty where there were none."""
        if not self.made:
            return ""
        ends, alone = [], any(entry.net for entry in self.made)
        for net in dict.fromkeys(entry.net for entry in self.made):
            factors, others = self.returned(net), "the other nets' " if alone else ""
            rates = f"the learning rate of {in_words(net)}" if net else f"{others}learning rates"
            ends.append(f"{rates} ended at {factors.rate:g} of {'that' if net else 'those'} asked for")
            if factors.data_noise != 1.0:
                its = "its " if net else "their " if alone else ""
                ends.append(f"{its}data noise at {factors.data_noise:g} times that")
        return f"it diverged and went back {self._times}, {', '.join(ends)}; "

    @property
    def _times(self) -> str:
        return f"{len(self.made)} time{'s' if len(self.made) > 1 else ''}"
