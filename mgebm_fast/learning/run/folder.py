"""A run's folder, as the loop fills it, and what a run has that leaves nothing behind.

config.toml, data.json                   the configuration, and the fingerprint of the data
metrics.jsonl, tensorboard/, samples/    records and pictures
checkpoints/, model.safetensors          states, the trained model, and model.json with its checksum
collapse.json                            only where the run collapsed: the model is the best from before it
evaluations.jsonl                        figures that `mgebm evaluate --record` added
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ... import files, pictures
from ...errors import CheckpointError, ConfigError
from ...models import storage
from ...models.storage import MODEL_FILE as MODEL
from ..config.files import load_config
from ..config.train_config import TrainConfig
from . import checkpoint
from .loggers import TENSORBOARD, Logger
from .records import METRICS, Mark, NoRecorder, Recorder
from .rule import UpdateRule

CONFIG, CHECKPOINTS, SAMPLES, DATA = "config.toml", "checkpoints", "samples", "data.json"
COLLAPSE = "collapse.json"  # beside a model from before a collapse: when, why, and of which update the model is
EVALUATIONS = "evaluations.jsonl"  # lines as those of metrics.jsonl
_FILES = (CONFIG, DATA, METRICS, MODEL, COLLAPSE, EVALUATIONS, storage.CHECKSUM_FILE)
_FOLDERS = (CHECKPOINTS, SAMPLES, TENSORBOARD)


class NoFolder:
    """In place of a run's folder: nothing is written, and there is nothing to go on from."""

    path: Path | None = None
    writes = False
    owned = False  # whether what lies in it is this run's

    def claim(self, config: TrainConfig, fingerprint: Mapping[str, Any], iteration: int) -> Any:
        """A context in which the folder is this run's: new, or the run's own, and no other process's."""
        return contextlib.nullcontext()

    def recorder(self, step: int, rollbacks: int, mark: Mark | None) -> NoRecorder:
        return NoRecorder()

    def save(self, rule: UpdateRule, iteration: int, state: Mapping[str, Any]) -> None:
        """The checkpoint of update `iteration`."""

    def save_model(self, rule: UpdateRule, iteration: int, *, final: bool) -> None:
        """The model to sample from, at the end, and where there is one already: it does not fall behind."""

    def save_before_collapse(self, rule: UpdateRule, iteration: int, at: int, why: str) -> None:
        """The best model of a run that collapsed, and a file that says so."""

    def draw(self, step: int, panels: Sequence[tuple[str, Tensor]], across: int) -> None:
        """The picture of update `step`."""

    def set_later_aside(self, iteration: int) -> None:
        """Set aside checkpoints of updates that a rollback undid."""

    def checkpoints(self) -> list[Path]:
        """Those of the run, oldest first."""
        return []

    def holds(self, path: Path) -> bool:
        """Whether `path` is this folder or one of its checkpoints."""
        return False

    @property
    def last_checkpoint(self) -> Path | None:
        folders = self.checkpoints()
        return folders[-1] if folders else None


class RunFolder(NoFolder):
    """The folder of a run at `path`. Of several ranks the first alone `writes`: for others, methods that write do
    nothing."""

    path: Path

    def __init__(self, path: Path, *, writes: bool = True, logger: Logger | None = None) -> None:
        self.path, self.writes, self._logger = path, writes, logger

    @contextlib.contextmanager
    def _claimed(self, config: TrainConfig, fingerprint: Mapping[str, Any], iteration: int) -> Iterator[None]:
        if not self.owned:
            check_new(self.path)
        files.make_folder(self.path)
        with checkpoint.exclusive(self.path):
            check_inside(self.path)
            stored = self.path / CONFIG
            if config.steps < iteration and stored.exists() and config.steps < load_config(stored).steps:
                made = f"be at least {iteration}, the updates that the run has made"
                raise ConfigError(f"steps must {made}, got {config.steps}")
            files.write_bytes(stored, config.to_toml().encode())
            if fingerprint and not (self.path / DATA).exists():
                files.write_bytes(self.path / DATA, (json.dumps(fingerprint) + "\n").encode())
            checkpoint.clean(self.path / CHECKPOINTS)
            for folder in (self.path, self.path / SAMPLES):
                files.clean(folder)
            if any(checkpoint.step_of(folder) > iteration for folder in self.checkpoints()):
                self._set_best_aside(iteration)
            self.set_later_aside(iteration)
            self.owned = True
            yield

    def claim(self, config: TrainConfig, fingerprint: Mapping[str, Any], iteration: int) -> Any:
        return self._claimed(config, fingerprint, iteration) if self.writes else contextlib.nullcontext()

    def recorder(self, step: int, rollbacks: int, mark: Mark | None) -> NoRecorder:
        return Recorder(self.path, step, rollbacks, mark, self._logger) if self.writes else NoRecorder()

    def save(self, rule: UpdateRule, iteration: int, state: Mapping[str, Any]) -> None:
        if self.writes:
            folder = self.path / CHECKPOINTS / checkpoint.name_of(iteration)
            checkpoint.write(folder, lambda path: rule.write(path, iteration), state)

    def save_model(self, rule: UpdateRule, iteration: int, *, final: bool) -> None:
        if self.writes and (final or (self.path / MODEL).exists()):
            if os.path.lexists(self.path / COLLAPSE):
                files.remove(self.path / MODEL)  # as below
                files.remove(self.path / COLLAPSE)
            storage.write_checked(self.path / MODEL, lambda path: rule.write_model(path, iteration))

    def save_before_collapse(self, rule: UpdateRule, iteration: int, at: int, why: str) -> None:
        if self.writes:
            # No other model may be called the best one, should the process be killed between these.
            files.remove(self.path / MODEL)
            record = {"update": at, "model": iteration, "why": why}
            files.write_bytes(self.path / COLLAPSE, (json.dumps(record) + "\n").encode())
            storage.write_checked(self.path / MODEL, lambda path: rule.write_model(path, iteration))

    def draw(self, step: int, panels: Sequence[tuple[str, Tensor]], across: int) -> None:
        if self.writes:
            files.make_folder(self.path / SAMPLES)
            target = self.path / SAMPLES / f"{checkpoint.name_of(step)}.png"
            if target.is_symlink():  # never write through a link
                files.remove(target)
            pictures.save_png(target, pictures.labelled_panel(panels, across=across))

    def set_later_aside(self, iteration: int) -> None:
        for folder in self.checkpoints() if self.writes else []:
            if checkpoint.step_of(folder) > iteration:
                checkpoint.set_aside(folder, "replaced")

    def _set_best_aside(self, iteration: int) -> None:
        """Where the user begins again before the best state, it is of updates that are undone. Where a run went back by
        itself it stays: it is the best from before the collapse."""
        best = self.path / CHECKPOINTS / checkpoint.BEST
        if files.is_folder(best):
            with contextlib.suppress(CheckpointError):  # damaged: it counts for nothing
                if int(checkpoint.read(best)["iteration"]) > iteration:
                    checkpoint.set_aside(best, "replaced")

    def checkpoints(self) -> list[Path]:
        return checkpoint.listed(self.path / CHECKPOINTS)

    def holds(self, path: Path) -> bool:
        return self.path.resolve() in (path.resolve(), run_of(path))


def run_of(folder: Path) -> Path | None:
    """The run whose checkpoint `folder` is; None where it lies elsewhere, whatever is in the folders above it."""
    above = folder.resolve().parent
    return above.parent if above.name == CHECKPOINTS and os.path.lexists(above.parent / CONFIG) else None


def run_with(config: Path) -> Path | None:
    """The run whose own configuration the file `config` is; None for any other."""
    run = config.parent
    return run if config.name == CONFIG and any((run / name).exists() for name in (CHECKPOINTS, DATA)) else None


def check_new(out: Path) -> None:
    """Raise FileExistsError unless `out` is a folder that does not exist yet or is empty."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: must be a folder, got {out}, which is a file")
    if not is_new(out):
        advice = "pass --resume to go on with its run, or choose" if (out / CONFIG).exists() else "choose"
        raise FileExistsError(
            f"out: must be a new or empty folder, got {out}, which is not empty; {advice} another one"
        )


def is_new(out: Path) -> bool:
    """Whether there is nothing at `out`, or a folder with nothing but what a killed start of a run left in it."""
    return not out.exists() or (out.is_dir() and all(path.name.startswith(f".{CONFIG}.") for path in out.iterdir()))


def how_to_resume(out: Path | None) -> str:
    """The command that goes on with a run."""
    return shlex.join(["mgebm", "train", f"{out}/{CONFIG}", "--out", str(out), "--resume"])


def check_inside(run: Path) -> None:
    """CheckpointError where an entry of a run's folder is a link, or no regular file or folder where it must be one."""
    for name in _FILES:
        if os.path.lexists(run / name):
            storage.check_regular(run / name)
    for name in _FOLDERS:
        if os.path.lexists(run / name) and not files.is_folder(run / name):
            raise CheckpointError(f"{run / name}: must be a folder, got a symbolic link or a file")


def read_collapse(run: Path) -> tuple[int, int] | None:
    """(update of the collapse, update of the model) where the model is the best from before one; None for any other."""
    path = run / COLLAPSE
    if not os.path.lexists(path) or not (run / MODEL).is_file():
        return None
    with checkpoint.damage_named(path, "no record of a collapse"):
        record = json.loads(files.read_regular(path, storage.MOST_JSON))
        return int(record["update"]), int(record["model"])


def read_fingerprint(run: Path | None) -> dict[str, Any] | None:
    """What a run says of its data; None for one that says nothing, or is none."""
    if run is None or not os.path.lexists(path := run / DATA):
        return None
    with checkpoint.damage_named(path, "no fingerprint of data"):
        return dict(json.loads(files.read_regular(path, storage.MOST_JSON * 16)))
