"""Going back after divergence: what counts as such, which states are good, and what of it a checkpoint holds.

A run that goes back to the state after g updates makes the updates after g again, with

    learning rates · rate                rate = the product of `rollback.lr_factor` over all times it went back
    noise of attempt number a            a = how often it went back (`noise.retried`)

for the rest of its life. Good states are those after a multiple of `checkpoint_every` updates, and the one that the run
began with; the newest `keep_checkpoints` of them are kept. They do not depend on when a run was stopped, so a resumed
run goes back to where it would have: to the newest, or, where it diverges again before there is a newer one, to the one
before, since what runs away may have begun to by the time that a state was taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import files
from ...errors import CheckpointError, DivergenceError
from ..config.sections import RollbackConfig
from . import checkpoint
from .folder import CHECKPOINTS, NoFolder
from .resuming import Found
from .rule import UpdateRule

WINDOW = 100  # updates in the running mean of a gap; also the warm-up before gap_ratio applies
_GAP = "/gap"


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One return: update number `at` diverged, and the run went on from the state after `to` updates."""

    at: int
    to: int
    factor: float  # of the learning rates from there on
    why: str


class RunAway(DivergenceError):
    """The energies of observed and of synthesised images part; every number is finite still."""


class Watch:
    """Looks for run-away in what updates measure, a = |mean E(observed) − mean E(synthesised)| of every grid:

        a > gap_max, or
        a > gap_ratio · m        where WINDOW updates came before; m: running mean of a in those,
                                 m ← m + (a − m) / min(WINDOW, t) with the t-th

    A method without energies has no such numbers, and nothing is looked for.
    """

    def __init__(self, config: RollbackConfig) -> None:
        self.config = config
        self.count = 0
        self.means: dict[str, float] = {}

    def check(self, metrics: Mapping[str, float], update: int) -> None:
        """Take in what update number `update` (from 1) measured; RunAway where it is out of bounds."""
        gaps = {name.removesuffix(_GAP): abs(value) for name, value in metrics.items() if name.endswith(_GAP)}
        highest, ratio = self.config.gap_max, self.config.gap_ratio
        for grid, gap in gaps.items():
            bounds = []
            if highest is not None:
                bounds.append((highest, "rollback.gap_max"))
            if ratio is not None and self.count >= WINDOW and (mean := self.means[grid]) > 0:
                bounds.append((ratio * mean, f"{ratio:g} times its running mean, rollback.gap_ratio"))
            for bound, name in bounds:
                if gap > bound:
                    raise RunAway(
                        f"training: the mean energies of observed and synthesised images ran away from each other at "
                        f"update {update}: {gap:.3g} apart at {grid.replace('_', ' ')}, more than {bound:.3g} ({name})"
                    )
        self.count += 1
        share = 1 / min(WINDOW, self.count)
        for grid, gap in gaps.items():
            before = self.means.get(grid, 0.0)
            self.means[grid] = before + (gap - before) * share

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "means": dict(self.means)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.count, self.means = int(state.get("count", 0)), dict(state.get("means", {}))


# A good state in memory: updates made, what the rule gave, what the watch gave.
Kept = tuple[int, Any, dict[str, Any]]


class History:
    """How often a run went back, and what it watches: the part of a run's state that is about divergence."""

    def __init__(self, config: RollbackConfig) -> None:
        self.config = config
        self.made: list[Rollback] = []
        self.watch = Watch(config)

    @property
    def on(self) -> bool:
        return self.config.attempts > 0

    @property
    def exhausted(self) -> bool:
        return len(self.made) >= self.config.attempts

    @property
    def rate(self) -> float:
        """What learning rates are multiplied by."""
        return math.prod(entry.factor for entry in self.made)

    def state(self, *, good: bool) -> dict[str, Any]:
        """What a checkpoint's state says of it: nothing where there is nothing to say."""
        if not self.on and not self.made:
            return {}
        made = [dataclasses.asdict(entry) for entry in self.made]
        return {"rollback": {"good": good, "made": made, "watch": self.watch.state()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` gave, from a checkpoint's state."""
        stored = state.get("rollback", {})
        self.made = [Rollback(**entry) for entry in stored.get("made", [])]
        self.watch.restore(stored.get("watch", {}))

    def describe(self) -> str:
        """How often the run went back, for the final error message; empty where it never did."""
        return f"the run went back {self._times} before; " if self.made else ""

    def describe_end(self) -> str:
        """The rollbacks of a run that finished, for its last message; empty where there were none."""
        ended = f"learning rates ended at {self.rate:g} of those asked for"
        return f"it diverged and went back {self._times}, {ended}; " if self.made else ""

    @property
    def _times(self) -> str:
        return f"{len(self.made)} time{'s' if len(self.made) > 1 else ''}"


class MemoryStates:
    """The good states of a run without a folder: copies in memory, oldest first, the newest `most` of them."""

    def __init__(self, history: History, most: int) -> None:
        self.history, self.most = history, most
        self._kept: list[Kept] = []

    def known(self) -> bool:
        """Whether there is a state to go back to."""
        return bool(self._kept)

    def forget(self) -> None:
        self._kept = []

    def keep(self, iteration: int, rule: UpdateRule) -> None:
        """Keep the state after `iteration` updates."""
        self._kept = [*self._kept, (iteration, rule.snapshot(), self.history.watch.state())][-self.most :]

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
