"""Going back after divergence: what counts as such, which states are good, and what of it a checkpoint holds.

A run that goes back to the state after g updates makes the updates after g again, with

    learning rates · rate                rate = the product of `rollback.lr_factor` over all times it went back
    data noise · data_noise_factor       that of `rollback.data_noise_factor`
    noise of attempt number a            a = how often it went back (`noise.retried`)

for the rest of its life. The first time that one of several nets runs away, the first two are of that net alone, since
they cost the others quality; in every other case they are of all nets. Good states are those after a multiple of
`checkpoint_every` updates, and the one that the run began with; the newest `keep_checkpoints` of them are kept. They do
not depend on when a run was stopped, so a resumed run goes back to where it would have: to the newest, or, where it
diverges again before there is a newer one, to the one before, since what runs away may have begun to by the time that
a state was taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import files
from ...errors import CheckpointError, DivergenceError
from ..config.train_config import TrainConfig
from . import checkpoint
from .factors import Factors, Growth
from .folder import CHECKPOINTS, MODEL, NoFolder
from .resuming import Found
from .rule import UpdateRule
from .watch import RunAway, Watch, in_words

MOST_DATA_NOISE = 1e6  # of the noise on observed images, so that it stays a float32
CLEARLY = 1.5  # times the lowest measure so far, above which a state is not taken for the best
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


Kept = tuple[int, Any, dict[str, Any]]  # a good state in memory: updates made, what the rule and the history gave


class History:
    """How often a run went back, and what it watches: the part of a run's state that is about divergence."""

    def __init__(self, config: TrainConfig, rule: UpdateRule) -> None:
        self.config = config.rollback
        self.made: list[Rollback] = []
        self.watch, self.growth = Watch(config), Growth(rule.stiffness_bounds, config.log_every)

    @property
    def on(self) -> bool:
        return self.config.attempts > 0

    @property
    def exhausted(self) -> bool:
        return len(self.made) >= self.config.attempts

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
        net = part if part in rule.slowed_alone and not any(entry.net for entry in made) else ""
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
        if not self.on and not self.made and not self.watch.bounds.on and not self.growth.bounds:
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
        """Take over what `state` gave, from a checkpoint's state."""
        stored = state.get("rollback", {})
        self.made = [Rollback(**entry) for entry in stored.get("made", [])]
        self.restore_seen(stored)

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
        return (
            f"{error}; stopped at update {at}, which was not saved; {before}{good}. What to change for {net}: "
            f"{advice}; rollback.attempts lets a run go back more than {self.config.attempts} times. {model}"
        )

    def describe_end(self) -> str:
        """The rollbacks of a run that finished, for its last message; empty where there were none."""
        if not self.made:
            return ""
        ends, alone = [], any(entry.net for entry in self.made)
        for net in dict.fromkeys(entry.net for entry in self.made):
            factors = self.returned(net)
            others, its = ("the other nets' ", "their ") if alone else ("", "")
            rates, its = (f"the learning rate of {in_words(net)}", "its ") if net else (f"{others}learning rates", its)
            ends.append(f"{rates} ended at {factors.rate:g} of {'that' if net else 'those'} asked for")
            if factors.data_noise != 1.0:
                ends.append(f"{its}data noise at {factors.data_noise:g} times that")
        return f"it diverged and went back {self._times}, {', '.join(ends)}; "

    @property
    def _times(self) -> str:
        return f"{len(self.made)} time{'s' if len(self.made) > 1 else ''}"


class MemoryStates:
    """The good states of a run without a folder: copies in memory, oldest first, the newest `most` of them; and the
    best, whatever its age."""

    def __init__(self, history: History, most: int) -> None:
        self.history, self.most = history, most
        self._kept: list[Kept] = []
        self._best: tuple[int, float | None, Any] | None = None  # updates made, lowest measure, what the rule gave

    def known(self) -> bool:
        """Whether there is a state to go back to."""
        return bool(self._kept)

    def forget(self) -> None:
        self._kept, self._best = [], None

    def best(self) -> tuple[int, float | None] | None:
        """The updates made in the best state so far, and the lowest measure so far; None where there is none."""
        return None if self._best is None else self._best[:2]

    def offer(
        self, iteration: int, measure: float | None, error: float, rule: UpdateRule, state: Mapping[str, Any]
    ) -> None:
        """Keep the present state as the best, unless its measure, which may be off by `error`, is clearly above the
        lowest so far: the measure tells mud from pictures, and of two good states the longer trained is the better one.
        The newest is best as long as none has had a measure."""
        best = self.best()
        lowest = None if best is None else best[1]
        if lowest is None:
            self._keep_best(iteration, measure, rule, state)
        elif measure is not None and measure <= CLEARLY * max(lowest, 0.0) + error:
            self._keep_best(iteration, min(measure, lowest), rule, state)

    def _keep_best(self, iteration: int, measure: float | None, rule: UpdateRule, state: Mapping[str, Any]) -> None:
        self._best = iteration, measure, rule.snapshot()

    def enter_best(self, rule: UpdateRule) -> int | None:
        """Take over the best state; the updates made in it, None where there is none."""
        if self._best is None:
            return None
        rule.restore(self._best[2])
        return self._best[0]

    def keep(self, iteration: int, rule: UpdateRule) -> None:
        """Keep the state after `iteration` updates."""
        self._kept = [*self._kept, (iteration, rule.snapshot(), self.history.seen())][-self.most :]

    def from_memory(self) -> Kept | None:
        """The state to go back to, which becomes the newest; None where there is none here."""
        place = choose([step for step, _, _ in self._kept], self.history.made)
        if place is None:
            return None
        self._kept = self._kept[: place + 1]
        return self._kept[-1]

    def from_folder(self) -> Found | None:
        """The checkpoint to go back to."""
        return None

    def prune(self) -> None:
        """Remove the checkpoints that are not kept."""


class FolderStates(MemoryStates):
    """The good states of a run with a folder: those of its checkpoints that the loop stored as good."""

    def __init__(self, folder: NoFolder, history: History, most: int) -> None:
        super().__init__(history, most)
        self.folder = folder

    def best(self) -> tuple[int, float | None] | None:
        if files.is_folder(self._place()):
            with contextlib.suppress(CheckpointError):
                state = checkpoint.read(self._place())
                return int(state["iteration"]), state.get("measure")
        return None

    def _place(self) -> Path:
        return (self.folder.path or Path()) / CHECKPOINTS / checkpoint.BEST

    def _keep_best(self, iteration: int, measure: float | None, rule: UpdateRule, state: Mapping[str, Any]) -> None:
        if self.folder.writes:
            checkpoint.write(self._place(), lambda path: rule.write(path, iteration), {**state, "measure": measure})

    def enter_best(self, rule: UpdateRule) -> int | None:
        best = self.best()
        if best is not None:
            rule.read(self._place())
        return None if best is None else best[0]

    def known(self) -> bool:
        return not self.folder.writes or bool(good_states(self.folder.checkpoints()))

    def keep(self, iteration: int, rule: UpdateRule) -> None:
        return

    def from_folder(self) -> Found | None:
        states = good_states(self.folder.checkpoints())
        place = choose([int(state["iteration"]) for _, state in states], self.history.made)
        return None if place is None else states[place]

    def prune(self) -> None:
        if self.folder.writes and self.folder.path is not None:
            root = self.folder.path / CHECKPOINTS
            (prune if self.history.on else checkpoint.prune)(root, self.most)


def states_of(folder: NoFolder, history: History, most: int) -> MemoryStates:
    """Where the good states of a run with `folder` are."""
    return MemoryStates(history, most) if folder.path is None else FolderStates(folder, history, most)


def choose(steps: Sequence[int], made: Sequence[Rollback]) -> int | None:
    """The place, in the steps of good states given oldest first, of the one to go back to; None where there is none."""
    if not steps:
        return None
    again = bool(made) and made[-1].to == steps[-1]  # it diverged again before there was a newer one
    return len(steps) - 2 if again and len(steps) > 1 else len(steps) - 1


def good_states(folders: Sequence[Path]) -> list[Found]:
    """Those of the checkpoints that are undamaged, and do not just stand where a run was stopped; in their order."""
    states = []
    for folder in folders:
        with contextlib.suppress(CheckpointError):
            state = checkpoint.read(folder)
            if state.get("rollback", {}).get("good", True):
                states.append((folder, state))
    return states


def prune(root: Path, keep: int) -> None:
    """Remove all checkpoints but the `keep` newest good states and the newest of all."""
    folders = checkpoint.listed(root)
    kept = [*[folder for folder, _ in good_states(folders)][-keep:], *folders[-1:]]
    for folder in folders:
        if folder not in kept:
            files.remove(folder)


# the measure of a state


def measured(rule: UpdateRule, reference: Tensor | None) -> float | None:
    """The measure of a state: the energy distance of as many samples to the images `reference`, in the model's units;
    inf where chains diverge, None where there are no samples to have cheaply."""
    if reference is None or len(reference) < 2:
        return None
    try:
        samples = rule.samples(len(reference))
    except DivergenceError:
        return math.inf
    if samples is None or len(samples) < 2:
        return None
    distance = energy_distance(samples, reference)
    return distance if math.isfinite(distance) else math.inf


def energy_distance(samples: Tensor, images: Tensor) -> float:  # (N, C, S, S) float32 each, any lengths above 1
    """How far a set of images is from another, with no feature net: the unbiased energy distance

        2 mean |φ(x) − φ(y)| − mean |φ(x) − φ(x′)| − mean |φ(y) − φ(y′)|

    of φ = (pixels, their differences to the neighbours below and to the right). 0 in the mean for two sets of one law;
    its own noise can make it negative. Source: Székely and Rizzo, "Energy statistics" (2013).
    """
    x, y = (_features(images.float().cpu()) for images in (samples, images))
    return float(2 * torch.cdist(x, y).mean() - _within(x) - _within(y))


def error_of(reference: Tensor | None) -> float:
    """What the measure by so many images is off by, about: mean |φ(y) − φ(y′)| / N; 0 where there is none."""
    if reference is None or len(reference) < 2:
        return 0.0
    return float(_within(_features(reference.float().cpu()))) / len(reference)


def _features(images: Tensor) -> Tensor:  # (N, C, *size) -> (N, d)
    steps = [images.diff(dim=dim) for dim in range(2, images.dim())]
    return torch.cat([part.flatten(1) for part in (images, *steps)], 1)


def _within(x: Tensor) -> Tensor:
    return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))
