"""The states of a run that it can go back to, and the best of them.

Good states are those after a multiple of `checkpoint_every` updates, and the one that the run began with; the newest
`keep_checkpoints` of them are kept. They do not depend on when a run was stopped, so a resumed run goes back to where
it would have: to the newest, or, where it diverges again before there is a newer one, to the one before, since what
runs away may have begun to by the time that a state was taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .... import files
from ....errors import CheckpointError
from ...config.train_config import TrainConfig
from .. import checkpoint
from ..folder import CHECKPOINTS, NoFolder
from ..resuming import Found
from ..rule import UpdateRule
from .rollback import History, Rollback

CLEARLY = 1.5  # times the lowest measure so far, above which a state is not taken for the best

Kept = tuple[int, Any, dict[str, Any]]  # a good state in memory: updates made, what the rule and the history gave


class MemoryStates:
    """The good states of a run without a folder: copies in memory, oldest first, the newest `most` of them; and the
    best, whatever its age."""

    def __init__(self, history: History, most: int) -> None:
        self.history, self.most = history, most
        self._kept: list[Kept] = []
        self._best: tuple[Kept, float | None] | None = None  # and the lowest measure

    def known(self) -> bool:
        """Whether there is a state to go back to."""
        return bool(self._kept)

    def forget(self) -> None:
        self._kept, self._best = [], None

    def best(self) -> tuple[int, float | None] | None:
        """The updates made in the best state so far, and the lowest measure so far; None where there is none."""
        return None if self._best is None else (self._best[0][0], self._best[1])

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
        self._best = (iteration, rule.snapshot(), self.history.seen()), measure

    def enter_best(self, rule: UpdateRule) -> int | None:
        """Take over the best state; the updates made in it, None where there is none."""
        if self._best is None:
            return None
        iteration = self._enter(self._best[0], rule)
        self._kept = [kept for kept in self._kept if kept[0] <= iteration]
        return iteration

    def _enter(self, kept: Kept, rule: UpdateRule) -> int:
        iteration, state, seen = kept
        rule.restore(state)
        self.history.restore_seen(seen)
        return iteration

    def keep(self, iteration: int, rule: UpdateRule) -> None:
        """Keep the state after `iteration` updates."""
        self._kept = [*self._kept, (iteration, rule.snapshot(), self.history.seen())][-self.most :]

    def enter_from_memory(self, rule: UpdateRule) -> int | None:
        """Take over the state to go back to, which becomes the newest; the updates made in it, None where there is none
        here."""
        place = choose([step for step, _, _ in self._kept], self.history.made)
        if place is None:
            return None
        self._kept = self._kept[: place + 1]
        return self._enter(self._kept[-1], rule)

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
        if not files.is_folder(self._place()):
            return None
        try:
            found: Found | None = (self._place(), checkpoint.read(self._place()))
        except CheckpointError:  # damaged: the newest good state is the best that is left
            found = self.from_folder()
        if found is None:
            return None
        folder, state = found
        rule.read(folder)
        self.history.restore_seen(state.get("rollback", {}))
        return int(state["iteration"])

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


def states_of(folder: NoFolder, config: TrainConfig, rule: UpdateRule) -> MemoryStates:
    """Where the good states of a run with `folder` are, and its history, with nothing in it."""
    history, most = History(config, rule), config.keep_checkpoints
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
