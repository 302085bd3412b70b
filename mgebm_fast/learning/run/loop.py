"""The training loop, the same for every method: updates, metrics, pictures, checkpoints, stopping and going on."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from ...errors import ConfigError, DivergenceError
from ..config.train_config import TrainConfig
from . import checkpoint, resuming
from .distributed import RankLost, Ranks
from .divergence.measure import error_of, measured_together
from .divergence.states import states_of
from .divergence.updates import Updates
from .feed import Batches
from .folder import CONFIG, MODEL, SAMPLES, NoFolder, RunFolder, how_to_resume, is_new
from .interrupts import StopRequests
from .loggers import Logger
from .progress import Pace, Progress, Voice, duration
from .records import Mark, NoRecorder
from .rule import UpdateRule


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended."""

    iteration: int  # updates made in the life of the run
    finished: bool  # False: stopped by a signal
    seconds: float


class Loop:
    """Runs a rule on batches; `out` is the run's folder, None for a run that leaves nothing behind.

    Every rank runs the loop; the first alone writes to `out` and to the console.
    """

    def __init__(
        self,
        rule: UpdateRule,
        batches: Batches,
        config: TrainConfig,
        *,
        out: Path | None = None,
        console: Console | None = None,
        resume_command: str | None = None,
        ranks: Ranks | None = None,
        logger: Logger | None = None,  # of the records; TensorBoard where there is none
    ) -> None:
        self.ranks = rule.ranks = ranks or Ranks()
        if config.batch_parts > 1 and not rule.divisible:
            raise ConfigError(
                f"batch_parts must be 1, on one rank, for the method {config.method!r}, which learns from whole "
                f"batches, got {config.batch_parts}"
            )
        self.rule, self.batches, self.config = rule, batches, config
        self.folder: NoFolder = NoFolder() if out is None else RunFolder(out, writes=self.ranks.first, logger=logger)
        self.voice = Voice(console if self.ranks.first else None)
        self.iteration = 0
        self.states = states_of(self.folder, config, rule)
        self.history = self.states.history
        self.recorder = NoRecorder()
        self.reference: Tensor | None = None  # held-out images in the model's units, for the measure of states
        self.after_pictures: Callable[[], None] | None = None  # on the first rank, when all of the update is written
        self.updates = Updates(rule, batches, self.history.watch, self.ranks, self.voice.say)
        self.announces = False  # whether a run says how its updates are launched
        self._mark: Mark | None = None  # of the records at the checkpoint that was resumed
        self._resume_command = resume_command or how_to_resume(out)

    # checkpoints

    def save(self, folder: Path) -> Path:
        """A checkpoint at exactly `folder`."""
        self.iteration = self.updates.settle(self.iteration)
        with self.ranks.together():
            self.rule.check()
            if self.ranks.first:
                checkpoint.write(folder, lambda path: self.rule.write(path, self.iteration), self._state())
        return folder

    def _state(self, *, good: bool = False) -> dict[str, Any]:
        mark = self.recorder.mark()
        return {
            "iteration": self.iteration,
            "images": len(self.batches.data),
            "config": self.config.to_dict(),
            **({} if mark is None else {"metrics": mark}),
            **self.history.state(good=good),
        }

    def resume(self, path: Path) -> int:
        """Go on from a checkpoint folder, or from a run folder's newest whole checkpoint; the updates made so far."""
        found: resuming.Found | None = None
        own = self.folder.holds(path)
        with self.ranks.together():  # the first rank tidies up, and chooses for all
            if self.ranks.first and not (path == self.folder.path and is_new(path)):
                found = resuming.find(path, self.voice.say)
        self.states.forget()
        if self._enter(found, own):
            self.voice.say(f"going on after update {self.iteration}, from {found[0] if found else path}")
        else:
            self.voice.say(f"{path}: no checkpoint yet, training starts from the beginning")
        self.folder.owned = self.folder.owned or own
        return self.iteration

    def _enter(self, found: resuming.Found | None, own: bool = True) -> bool:
        """Take over, on every rank, the checkpoint that the first rank found; False where it found none."""
        name = self.ranks.tell(str(found[0]) if found else "")
        if not name:
            return False
        with self.ranks.together():
            folder, state = found or (Path(name), checkpoint.read(Path(name)))
            with checkpoint.damage_named(folder, "of another run", keep=ConfigError):
                resuming.check_same_run(self.config, self.batches.fingerprint(), len(self.batches.data), state, folder)
                self.rule.read(folder)
                self.iteration = int(state["iteration"])
                self.rule.before_stored(self.iteration)
                self.history.restore(state)
                self._mark = state.get("metrics") if own else None
            self._tell_rule()
        return True

    # going back

    def _tell_rule(self) -> None:
        self.history.tell(self.rule)
        self.updates.begin(self.iteration)

    def _begin_good(self) -> None:
        """A state to go back to from the first update on, where the run has none yet."""
        with self.ranks.together():
            if self.history.on and not self.states.known():
                self._keep(good=True)

    def _keep(self, *, good: bool) -> None:
        """Store the present state; a `good` one is a state to go back to."""
        self.folder.save(self.rule, self.iteration, self._state(good=good))
        if good and self.history.on:
            self.states.keep(self.iteration, self.rule)

    def _go_back(self, error: DivergenceError) -> None:
        """To the last good state, from where noise is other and rates are lower; the error where that is no help.

        All ranks raised the same error: it is about what they averaged, or was reported to all.
        """
        history, update = self.history, self.iteration + 1
        made = history.made  # which the state that is gone back to may not know of
        if history.ends_at(error) or not self._enter_good():
            raise self._diverged(error) from error
        self.ranks.failed = False
        history.went_back(made, update, self.iteration, error, self.rule)
        self._tell_rule()
        with self.ranks.together():
            # Killed between these, a run goes on from a checkpoint that fits its records.
            self.folder.set_later_aside(self.iteration)
            self.recorder.rewind(self.iteration, len(made))
            self.folder.save(self.rule, self.iteration, self._state(good=True))
            self._record_going_back()
        self.voice.say(f"{error}; back to update {self.iteration}, {history.changes}")

    def _record_going_back(self) -> None:
        """Where the run has just come back to a good state, a record of it."""
        made = self.history.made
        if self._came_back():
            self.recorder.add(self.iteration, {"rollbacks": len(made), "diverged_at": made[-1].at})
            self.recorder.synchronise()

    def _enter_good(self) -> bool:
        """Take over the last good state; False where there is none."""
        kept = self.states.enter_from_memory(self.rule)
        if kept is not None:
            self.iteration = kept
            self.rule.before_stored(kept)
            return True
        found: resuming.Found | None = None
        with self.ranks.together():
            if self.ranks.first:
                found = self.states.from_folder()
        return self._enter(found)

    # running

    def run(self, stop: int) -> Outcome:
        """Updates until `stop` have been made in all, or a signal asks to stop."""
        began = time.monotonic()
        try:
            with (
                checkpoint.naming_a_full_disk(lambda: self._how_to_go_on("free some space and ")),
                contextlib.ExitStack() as held,
            ):
                with self.ranks.together():
                    fingerprint = self.batches.fingerprint()
                    held.enter_context(self.folder.claim(self.config, fingerprint, self.iteration))
                if self.iteration >= stop and self.iteration > 0:
                    self.voice.say(f"nothing left to do: {self.iteration} updates were made, {stop} asked for")
                    with self.ranks.together():
                        self.rule.check()
                        # the last run may have been killed just before it wrote this
                        self.folder.save_model(self.rule, self.iteration, final=True)
                else:
                    self._run(stop)
        except RankLost as error:
            raise RankLost(f"{error}; {self._how_to_go_on()}") from error
        return Outcome(self.iteration, self.iteration >= stop, time.monotonic() - began)

    def _run(self, stop: int) -> None:
        began = time.monotonic()
        with contextlib.ExitStack() as held:
            stopping = held.enter_context(StopRequests(self._announce_stop))
            self.ranks.stop_when(lambda: stopping.requested)
            progress = held.enter_context(Progress(self.voice, self.iteration, stop, self.rule.cost))
            with self.ranks.together():
                recorded = len(self.history.made) - self._came_back()
                self.recorder = self.folder.recorder(self.iteration, recorded, self._mark)
                held.callback(self._close_recorder)
                self._record_going_back()
            if self.recorder.notice:
                self.voice.say(self.recorder.notice)
            if to_come := self.rule.to_come(self.iteration):
                self.voice.say(to_come)
            self._begin_good()
            self._iterate(stop, progress)
        if self.iteration < stop:
            saved = f"; saved in {self.folder.last_checkpoint}; to go on:\n  {self._resume_command}"
            self.voice.say(f"stopped after {self.iteration} of {stop} updates{saved if self.folder.path else ''}")
        elif self.folder.path is not None:
            took, out = duration(time.monotonic() - began), self.folder.path
            saved = f"{self.history.describe_end()}the model: {out / MODEL}; pictures: {out / SAMPLES}"
            self.voice.say(f"{self.iteration} updates done in {took}; {saved}")

    def _came_back(self) -> bool:
        """Whether the run has gone back to where it is, and made no update since."""
        made = self.history.made
        return bool(made) and made[-1].to == self.iteration

    def _close_recorder(self) -> None:
        self.recorder.close()
        self.recorder = NoRecorder()
        self._mark = None

    def _iterate(self, stop: int, progress: Progress) -> None:
        if self.iteration >= stop:  # steps = 0: the untrained model is the result
            with self.ranks.together():
                self._save(final=True)
        pace = Pace()
        while self.iteration < stop:
            before = self.iteration
            try:
                stops = self._advance(before + 1, stop, pace, progress)
            except DivergenceError as error:
                self.iteration = min(before, self.updates.at)
                self._go_back(error)
                progress.restart(self.iteration)
                pace = Pace()
                continue
            if stops:
                return

    def _advance(self, done: int, stop: int, pace: Pace, progress: Progress) -> bool:
        """Update number `done`, and all that is due after it; whether the run is asked to stop."""
        config, begin = self.config, time.monotonic()
        logged = _due(done, config.log_every) or done == stop >= config.steps
        metrics = self.updates.launch(self.iteration, logged)
        if self.announces:
            self.voice.say(f"updates: {self.rule.how()}")
            self.announces = False
        stops, watched = self.ranks.stops(), self.history.watch.bounds.on
        good, drawn = _due(done, config.checkpoint_every), _due(done, config.sample_every) or done == stop
        saved = good or done == stop or stops
        if metrics is not None:
            metrics = self.updates.collect(done, logged, wait=logged or drawn or saved)
        pace.add(time.monotonic() - begin)
        if metrics is None:
            self.iteration = self.updates.at
            return False
        if saved:
            self.rule.check()
        if _due(done, config.log_every) and self.history.growth.take(metrics, self.ranks):
            self.history.tell(self.rule)
        self.iteration = done
        progress.update(done, self.updates.headline, logged=logged)
        if logged or drawn or saved:
            measure = measured_together(self.rule, self.reference, self.ranks) if good and watched else None
            with self.ranks.together():
                if measure is not None:
                    metrics["held_out/energy_distance"] = measure
                if logged:
                    self.recorder.add(done, {**metrics, "seconds_per_update": pace.take()})
                if drawn and self.folder.writes:
                    self._draw(done)
                if saved:
                    self.recorder.synchronise()
                    self._save(final=done == stop, good=good)
                    if good and watched:
                        self.states.offer(done, measure, error_of(self.reference), self.rule, self._state(good=True))
                if drawn and self.folder.writes and self.after_pictures is not None:
                    self.after_pictures()
        return stops

    def _save(self, *, final: bool, good: bool = False) -> None:
        self._keep(good=good)
        self.states.prune()
        self.folder.save_model(self.rule, self.iteration, final=final)

    def _draw(self, done: int) -> None:
        count = min(36, len(self.batches.data))
        spread = [i * len(self.batches.data) // count for i in range(count)]
        try:
            panels, across = self.rule.panels(self.batches.data.batch(spread))
        except DivergenceError as error:  # training goes on: it has its own check
            self.voice.say(f"no picture after update {done}: {error}")
            return
        self.folder.draw(done, panels, across)

    # messages

    def _announce_stop(self, signal_name: str) -> None:
        saves = ", then saves" if self.folder.path is not None else ""
        self.voice.say_from_a_signal(f"{signal_name}: finishing this update{saves}; Ctrl-C once more aborts")

    def _how_to_go_on(self, first: str = "") -> str:
        last = self.folder.last_checkpoint
        if last is None:
            begun = self.folder.path is not None and (self.folder.path / CONFIG).is_file()
            again = f"begin again with: {self._resume_command}" if begun else "start again"
            return f"nothing was saved yet; {first}{again}"
        return f"the last checkpoint, {last}, is whole; {first}go on with: {self._resume_command}"

    def _diverged(self, error: DivergenceError) -> DivergenceError:
        """The error that ends the run, which then has its best state as its model."""
        self.ranks.failed = not self.ranks.first  # all ranks averaged the same numbers
        at, best = self.iteration + 1, self.states.enter_best(self.rule) if self.history.watch.bounds.on else None
        if best is not None:
            self.iteration = best
            self.rule.before_stored(best)
            self._tell_rule()
            self.folder.save_before_collapse(self.rule, best, at, str(error))
        return DivergenceError(self.history.last_words(error, at, best, self.folder))


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
