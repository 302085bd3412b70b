"""The training loop, the same for every method: updates, metrics, pictures, checkpoints, stopping and going on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from pathlib import Path

from rich.console import Console

from ... import files, pictures
from ...errors import ConfigError, DivergenceError
from ..config.train_config import TrainConfig
from . import checkpoint, resuming, rollback
from .checkpoint import CHECKPOINTS, CONFIG, MODEL, SAMPLES
from .distributed import RankLost, Ranks
from .feed import Batches
from .interrupts import StopRequests
from .progress import Progress, duration
from .records import Recorder
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
    ) -> None:
        self.ranks = rule.ranks = ranks or Ranks()
        if config.batch_parts > 1 and not rule.divisible:
            raise ConfigError(
                f"batch_parts must be 1, on one rank, for the method {config.method!r}, which learns from whole "
                f"batches, got {config.batch_parts}"
            )
        self.rule, self.batches, self.config, self.out = rule, batches, config, out
        self.console = console if self.ranks.first else None
        self.iteration = 0
        self.history = rollback.History(config.rollback)
        self._owns = False  # whether what lies in `out` is this run's
        self._resume_command = resume_command or f"mgebm train {out}/{CONFIG} --out {out} --resume"

    # checkpoints

    def save(self, folder: Path) -> Path:
        """A checkpoint at exactly `folder`."""
        with self.ranks.together():
            return self._save(folder) if self.ranks.first else folder

    def _save(self, folder: Path, *, good: bool = False) -> Path:
        state = {
            "iteration": self.iteration,
            "images": len(self.batches.data),
            "config": self.config.to_dict(),
            **self.history.state(good=good),
        }
        return checkpoint.write(folder, lambda path: self.rule.write(path, self.iteration), state)

    def resume(self, path: Path) -> int:
        """Go on from a checkpoint folder, or from a run folder's newest whole checkpoint; the updates made so far."""
        found: resuming.Found | None = None
        with self.ranks.together():  # the first rank tidies up, and chooses for all
            if self.ranks.first:
                found = resuming.find(path, self.say)
        self.history.kept = []
        if not self._enter(found):
            self.say(f"{path}: no checkpoint yet, training starts from the beginning")
        self._owns = self._owns or self._is_out(path)
        return self.iteration

    def _enter(self, found: resuming.Found | None) -> bool:
        """Take over, on every rank, the checkpoint that the first rank found; False where it found none."""
        name = self.ranks.tell(str(found[0]) if found else "")
        if not name:
            return False
        with self.ranks.together():
            folder, state = found or (Path(name), checkpoint.read(Path(name)))
            resuming.check_same_run(self.config, len(self.batches.data), state, folder)
            self.rule.read(folder)
            self.iteration = int(state["iteration"])
            self.rule.before_stored(self.iteration)
            self.history.restore(state)
            self._tell_rule()
        return True

    def _is_out(self, path: Path) -> bool:
        """Whether `path` is the run's folder or one of its checkpoints."""
        return self.out is not None and self.out.resolve() in (path.resolve(), path.resolve().parent.parent)

    def _checkpoints(self) -> list[Path]:
        """Those of the run, oldest first."""
        return checkpoint.listed(self.out / CHECKPOINTS) if self.out else []

    def last_checkpoint(self) -> Path | None:
        folders = self._checkpoints()
        return folders[-1] if folders else None

    # going back

    def _tell_rule(self) -> None:
        self.rule.attempt, self.rule.rate = len(self.history.made), self.history.rate

    def _keep_good_state(self) -> None:
        """The present state, to go back to, where there is no folder that holds it."""
        if self.out is None and self.history.on:
            newest = self.iteration, self.rule.snapshot(), self.history.watch.state()
            self.history.kept = [*self.history.kept, newest][-self.config.keep_checkpoints :]

    def _begin_good(self) -> None:
        """A state to go back to from the first update on, where the run has none yet."""
        if not self.history.kept:
            self._keep_good_state()
        with self.ranks.together():
            if self.out is not None and self.ranks.first and self.history.on:
                if not rollback.good_states(self._checkpoints()):
                    self._save(self.out / CHECKPOINTS / checkpoint.name_of(self.iteration), good=True)

    def _go_back(self, error: DivergenceError, recorder: Recorder | None) -> None:
        """To the last good state, from where noise is other and rates are lower; the error where that was tried enough.

        All ranks know of the same error: it is about what they averaged, or was told to all.
        """
        history, update = self.history, self.iteration + 1
        made = history.made  # a good state of before knows of less
        if history.exhausted or not self._enter_good():
            raise self._diverged(error) from error
        self.ranks.failed = False
        entry = rollback.Rollback(update, self.iteration, self.config.rollback.lr_factor, str(error))
        history.made = [*made, entry]
        self._tell_rule()
        with self.ranks.together():
            if self.out is not None and self.ranks.first:
                # Killed between these, a run goes on from a checkpoint that fits its records.
                self._set_later_aside(self.out)
                self._save(self.out / CHECKPOINTS / checkpoint.name_of(self.iteration), good=True)
                self._record_going_back(recorder)
        self.say(
            f"{error}; back to update {self.iteration}, with other noise and the learning rate times "
            f"{history.rate:g} from here on (rollback {len(history.made)} of at most {history.config.attempts})"
        )

    def _record_going_back(self, recorder: Recorder | None) -> None:
        """Where the run has just come back to a good state, a record of it, and none of what was abandoned."""
        made = self.history.made
        if recorder is not None and made and made[-1].to == self.iteration:
            recorder.go_back(self.iteration, len(made), made[-1].at)

    def _enter_good(self) -> bool:
        """Take over the last good state; False where there is none."""
        if self.out is None:
            place = rollback.choose([step for step, _, _ in self.history.kept], self.history.made)
            if place is None:
                return False
            self.history.kept = self.history.kept[: place + 1]
            self.iteration, state, watched = self.history.kept[-1]
            self.rule.restore(state)
            self.rule.before_stored(self.iteration)
            self.history.watch.restore(watched)
            return True
        found: resuming.Found | None = None
        with self.ranks.together():
            if self.ranks.first:
                states = rollback.good_states(self._checkpoints())
                place = rollback.choose([int(state["iteration"]) for _, state in states], self.history.made)
                found = None if place is None else states[place]
        return self._enter(found)

    # running

    def run(self, stop: int) -> Outcome:
        """Updates until `stop` have been made in all, or a signal asks to stop."""
        began = time.monotonic()
        advice = functools.partial(self._how_to_go_on, "free some space and ")
        try:
            with checkpoint.naming_a_full_disk(advice), contextlib.ExitStack() as held:
                with self.ranks.together():
                    if self.out is not None and self.ranks.first:
                        self._claim(self.out, held)
                if self.iteration >= stop and self.iteration > 0:
                    self.say(f"nothing left to do: {self.iteration} updates were made, {stop} asked for")
                    with self.ranks.together():
                        if self.out is not None and self.ranks.first:
                            # the last run may have been killed just before it wrote this
                            self.rule.write_model(self.out / MODEL, self.iteration)
                else:
                    self._run(stop)
        except RankLost as error:
            raise RankLost(f"{error}; {self._how_to_go_on()}") from error
        seconds = time.monotonic() - began
        return Outcome(self.iteration, self.iteration >= stop, seconds)

    def _claim(self, out: Path, held: contextlib.ExitStack) -> None:
        if not self._owns:
            resuming.check_new(out)
        out.mkdir(parents=True, exist_ok=True)
        held.enter_context(checkpoint.exclusive(out))
        self._open_folder(out)

    def _run(self, stop: int) -> None:
        began = time.monotonic()
        with contextlib.ExitStack() as held:
            stopping = held.enter_context(StopRequests(self._announce_stop))
            self.ranks.stop_when(lambda: stopping.requested)
            progress = held.enter_context(Progress(self.console, self.iteration, stop))
            with self.ranks.together():
                recorder = held.enter_context(self._recorder())
                self._record_going_back(recorder)
            self._begin_good()
            self._iterate(stop, progress, recorder)
        if self.iteration < stop:
            where = f"; saved in {self.last_checkpoint()}; to go on:\n  {self._resume_command}" if self.out else ""
            self.say(f"stopped after {self.iteration} of {stop} updates{where}")
        elif self.out is not None:
            took = duration(time.monotonic() - began)
            where = f"{self.history.describe_end()}the model: {self.out / MODEL}; pictures: {self.out / SAMPLES}"
            self.say(f"{self.iteration} updates done in {took}; {where}")

    def _iterate(self, stop: int, progress: Progress, recorder: Recorder | None) -> None:
        config, spent, updates = self.config, 0.0, 0
        if self.iteration >= stop:  # steps = 0: the untrained model is the result
            with self.ranks.together():
                self._save_in_run(final=True)
        while self.iteration < stop:
            done = self.iteration + 1
            logged = done % config.log_every == 0 or done == stop
            begin = time.monotonic()
            try:
                metrics = self.rule.update(self.batches.batch(self.iteration), self.iteration, detail=logged)
                if self.history.on:
                    self.history.watch.check(metrics, done)
            except DivergenceError as error:
                self._go_back(error, recorder)
                progress.restart(self.iteration)
                spent, updates = 0.0, 0
                continue
            self.iteration = done
            spent, updates = spent + time.monotonic() - begin, updates + 1
            progress.update(done, self.rule.headline(metrics), logged=logged)
            drawn = _due(done, config.sample_every) or done == stop
            stops = self.ranks.stops()
            good = _due(done, config.checkpoint_every)
            saved = good or done == stop or stops
            if good:
                self._keep_good_state()
            if self.out is not None and (logged or drawn or saved):
                with self.ranks.together():
                    if logged and recorder is not None:
                        recorder.add(done, {**metrics, "seconds_per_update": spent / updates})
                        spent, updates = 0.0, 0
                    if drawn:
                        self._draw(done)
                    if saved:
                        if recorder is not None:
                            recorder.synchronise()
                        self._save_in_run(final=done == stop, good=good)
            if stops:
                return

    def _open_folder(self, out: Path) -> None:
        files.write_bytes(out / CONFIG, self.config.to_toml().encode())
        checkpoint.clean(out / CHECKPOINTS)
        self._set_later_aside(out)
        self._owns = True

    def _set_later_aside(self, out: Path) -> None:
        """Checkpoints of a past that this run went back behind no longer count."""
        for folder in checkpoint.listed(out / CHECKPOINTS):
            if checkpoint.step_of(folder) > self.iteration:
                checkpoint.set_aside(folder, "replaced")

    def _recorder(self) -> contextlib.AbstractContextManager[Recorder | None]:
        if self.out is None or not self.ranks.first:
            return contextlib.nullcontext()
        return contextlib.closing(Recorder(self.out, self.iteration, len(self.history.made)))

    def _save_in_run(self, *, final: bool, good: bool = False) -> None:
        if self.out is None or not self.ranks.first:
            return
        root = self.out / CHECKPOINTS
        self._save(root / checkpoint.name_of(self.iteration), good=good)
        (rollback if self.history.on else checkpoint).prune(root, self.config.keep_checkpoints)
        if final or (self.out / MODEL).exists():  # a run made longer: what it is sampled with does not fall behind
            self.rule.write_model(self.out / MODEL, self.iteration)

    def _draw(self, done: int) -> None:
        if self.out is None or not self.ranks.first:
            return
        count = min(36, len(self.batches.data))
        spread = [i * len(self.batches.data) // count for i in range(count)]
        try:
            panels, across = self.rule.panels(self.batches.data.batch(spread))
        except DivergenceError as error:  # training goes on: it has its own check
            self.say(f"no picture after update {done}: {error}")
            return
        folder = self.out / SAMPLES
        folder.mkdir(exist_ok=True)
        pictures.save_png(folder / f"{checkpoint.name_of(done)}.png", pictures.labelled_panel(panels, across=across))

    # messages

    def say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _announce_stop(self, signal_name: str) -> None:
        # Not through rich: its lock may be held by the code that the signal interrupted.
        if self.console is not None:
            saves = ", then saves" if self.out is not None else ""
            os.write(2, f"\n{signal_name}: finishing this update{saves}; once more aborts\n".encode())

    def _how_to_go_on(self, first: str = "") -> str:
        last = self.last_checkpoint()
        if last is None:
            begun = self.out is not None and (self.out / CONFIG).is_file()
            again = f"begin again with: {self._resume_command}" if begun else "start again"
            return f"nothing was saved yet; {first}{again}"
        return f"the last checkpoint, {last}, is whole; {first}go on with: {self._resume_command}"

    def _diverged(self, error: DivergenceError) -> DivergenceError:
        self.ranks.failed = not self.ranks.first  # all ranks averaged the same numbers
        last = self.last_checkpoint()
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        kept = "saved" if isinstance(error, rollback.RunAway) else "applied"
        more = "" if self.history.on else "; rollback.attempts lets a run go back and try again by itself"
        return DivergenceError(
            f"{error}; stopped at update {self.iteration + 1}, which was not {kept}; {self.history.describe()}{good}. "
            "A smaller optimiser.lr, optimiser.grad_clip_norm, stabilise.energy_l2 or spectral_norm keep training in "
            f"bounds{more}"
        )


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
