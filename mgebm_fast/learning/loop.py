"""The training loop, the same for every method: updates, metrics, pictures, checkpoints, stopping and going on."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from .. import files, pictures
from ..errors import CheckpointError, ConfigError, DivergenceError
from . import checkpoint
from .config import TrainConfig
from .distributed import RankLost, Ranks
from .feed import Batches
from .interrupts import StopRequests
from .methods import METHODS
from .progress import Progress, duration
from .records import Recorder

CONFIG, MODEL, CHECKPOINTS, SAMPLES = "config.toml", "model.safetensors", "checkpoints", "samples"

# Keys that the states of a run hang on: another value would make a resumed run another run.
FIXED = (
    "method", "channels", "sizes", "width", "variant", "norm", "activation", "spectral_norm", "value_range", "seed",
    "batch_size", "batch_parts", "flips", "classes", "langevin.steps", "optimiser.name",
)  # fmt: skip


class UpdateRule(abc.ABC):
    """A learning method: how the initial state is updated by a batch, what it looks like, and how it is stored."""

    divisible = False  # whether a batch may be learnt from in parts, which is what several ranks do
    ranks = Ranks()  # the loop sets it

    @abc.abstractmethod
    def update(self, batch: Tensor, iteration: int, *, detail: bool = False) -> dict[str, float]:
        """One parameter update from observed images (N, C, S, S), uint8 or float in the model's units.

        `batch` is the share of this rank. `iteration` counts from 0; all randomness is a function of it and the seed.
        `detail` asks for measurements that cost something. Raises DivergenceError, with nothing applied, where a
        number is not finite.
        """

    @abc.abstractmethod
    def headline(self, metrics: Mapping[str, float]) -> str:
        """A few words on how training stands, from what `update` returned."""

    @abc.abstractmethod
    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        """Titled uint8 images of the model, always from the same noise, beside `observed`; and how many to a row."""

    @abc.abstractmethod
    def write(self, folder: Path, iteration: int) -> None:
        """The files of a checkpoint after `iteration` updates: all that later updates depend on."""

    @abc.abstractmethod
    def read(self, folder: Path) -> None:
        """Restore what `write` stored, bit for bit."""

    @abc.abstractmethod
    def write_model(self, path: Path, iteration: int) -> None:
        """The model to sample from, as one file."""


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
        self._owns = False  # whether what lies in `out` is this run's
        self._resume_command = resume_command or f"mgebm train {out}/{CONFIG} --out {out} --resume"

    # checkpoints

    def save(self, folder: Path) -> Path:
        """A checkpoint at exactly `folder`."""
        with self.ranks.together():
            return self._save(folder) if self.ranks.first else folder

    def _save(self, folder: Path) -> Path:
        state = {
            "iteration": self.iteration,
            "images": len(self.batches.data),
            "config": self.config.to_dict(),
        }
        return checkpoint.write(folder, lambda path: self.rule.write(path, self.iteration), state)

    def resume(self, path: Path) -> int:
        """Go on from a checkpoint folder, or from a run folder's newest good checkpoint; the updates made so far."""
        found: tuple[Path, dict[str, Any]] | None = None
        with self.ranks.together():  # the first rank tidies up, and chooses for all
            if self.ranks.first:
                found = self._find(path)
        name = self.ranks.tell(str(found[0]) if found else "")
        if name:
            with self.ranks.together():
                folder, state = found or (Path(name), checkpoint.read(Path(name)))
                self._check_same_run(state, folder)
                self.rule.read(folder)
                self.iteration = int(state["iteration"])
        else:
            self.say(f"{path}: no checkpoint yet, training starts from the beginning")
        self._owns = self._owns or self._is_out(path)
        return self.iteration

    def _find(self, path: Path) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint that `path` means, with its state; None for a run that has none yet."""
        if (path / checkpoint.STATE).exists():
            return path, self._read_named(path)
        if (path / CONFIG).is_file():
            with checkpoint.exclusive(path):
                checkpoint.clean(path / CHECKPOINTS)
                return self._newest_of_run(path)
        what = "is not a run's folder" if path.is_dir() else "does not exist"
        raise CheckpointError(f"resume: must be a folder with a {CONFIG} or a checkpoint's, got {path}, which {what}")

    def _is_out(self, path: Path) -> bool:
        """Whether `path` is the run's folder or one of its checkpoints."""
        return self.out is not None and self.out.resolve() in (path.resolve(), path.resolve().parent.parent)

    def _read_named(self, folder: Path) -> dict[str, Any]:
        try:
            return checkpoint.read(folder)
        except CheckpointError as error:
            found, _ = checkpoint.newest_good(folder.parent)
            hint = f"; the newest whole one beside it is {found[0]}" if found else ""
            raise CheckpointError(f"{error}{hint}") from None

    def _newest_of_run(self, path: Path) -> tuple[Path, dict[str, Any]] | None:
        found, faults = checkpoint.newest_good(path / CHECKPOINTS)
        if faults and found is None:
            raise CheckpointError(f"resume: no checkpoint of {path} is whole: {'; '.join(str(e) for _, e in faults)}")
        for folder, error in faults:
            assert found is not None
            aside = checkpoint.set_aside(folder, "damaged")
            self.say(f"{error}; it is now {aside.name}, and training goes on from the older {found[0]}")
        return found

    def _check_same_run(self, state: Mapping[str, Any], folder: Path) -> None:
        ours, theirs = self.config.to_dict(), state["config"]
        own = METHODS[self.config.method]
        for name in (*FIXED, *(f"{own.name}.{leaf}" for leaf in own.fixed)):
            section, _, leaf = name.rpartition(".")
            mine = (ours.get(section, {}) if section else ours).get(leaf)
            stored = (theirs.get(section, {}) if section else theirs).get(leaf)
            if name == "batch_parts" and stored is None:  # a run from before there were parts
                stored = 1
            if mine != stored:
                raise ConfigError(
                    f"resume: {name} must be {stored!r}, as in {folder}, got {mine!r}; a run with another value is "
                    "another run: train it into a new folder"
                )
        if state.get("images") != len(self.batches.data):
            raise ConfigError(
                f"resume: data must be the {state.get('images')} images that the run began with, got "
                f"{len(self.batches.data)}"
            )

    def last_checkpoint(self) -> Path | None:
        folders = checkpoint.listed(self.out / CHECKPOINTS) if self.out else []
        return folders[-1] if folders else None

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
            check_new(out)
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
            self._iterate(stop, progress, recorder)
        if self.iteration < stop:
            where = f"; saved in {self.last_checkpoint()}; to go on:\n  {self._resume_command}" if self.out else ""
            self.say(f"stopped after {self.iteration} of {stop} updates{where}")
        elif self.out is not None:
            took = duration(time.monotonic() - began)
            self.say(f"{self.iteration} updates done in {took}; the model: {self.out / MODEL}")

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
            except DivergenceError as error:
                raise self._diverged(error) from error
            self.iteration = done
            spent, updates = spent + time.monotonic() - begin, updates + 1
            progress.update(done, self.rule.headline(metrics), logged=logged)
            drawn = _due(done, config.sample_every) or done == stop
            stops = self.ranks.stops()
            saved = _due(done, config.checkpoint_every) or done == stop or stops
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
                        self._save_in_run(final=done == stop)
            if stops:
                return

    def _open_folder(self, out: Path) -> None:
        files.write_bytes(out / CONFIG, self.config.to_toml().encode())
        checkpoint.clean(out / CHECKPOINTS)
        for folder in checkpoint.listed(out / CHECKPOINTS):
            if checkpoint.step_of(folder) > self.iteration:  # of a past that this run went back behind
                checkpoint.set_aside(folder, "replaced")
        self._owns = True

    def _recorder(self) -> contextlib.AbstractContextManager[Recorder | None]:
        if self.out is None or not self.ranks.first:
            return contextlib.nullcontext()
        return contextlib.closing(Recorder(self.out, self.iteration))

    def _save_in_run(self, *, final: bool) -> None:
        if self.out is None or not self.ranks.first:
            return
        root = self.out / CHECKPOINTS
        self._save(root / checkpoint.name_of(self.iteration))
        checkpoint.prune(root, self.config.keep_checkpoints)
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
        return DivergenceError(
            f"{error}; stopped at update {self.iteration + 1}, which was not applied; {good}. A smaller optimiser.lr, "
            "optimiser.grad_clip_norm, stabilise.energy_l2 or spectral_norm keep training in bounds"
        )


def check_new(out: Path) -> None:
    """Raise FileExistsError unless `out` is a folder that does not exist yet or is empty."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: must be a folder, got {out}, which is a file")
    if out.is_dir() and any(not _left_behind(path) for path in out.iterdir()):
        advice = "pass --resume to go on with its run, or choose" if (out / CONFIG).exists() else "choose"
        raise FileExistsError(
            f"out: must be a new or empty folder, got {out}, which is not empty; {advice} another one"
        )


def _left_behind(path: Path) -> bool:
    return path.name.startswith(f".{CONFIG}.")


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
