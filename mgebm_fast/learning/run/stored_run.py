"""A run's folder, as `sample`, `evaluate` and notebooks open it."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...data.builtin import BUILT_IN_PREFIX
from ...errors import BackendError, CheckpointError, DataError, Refused, suggest
from ...models import Model, storage
from ..config.files import load_config
from ..config.method import METHODS, load_data
from ..config.train_config import TrainConfig
from ..config.values import from_dict
from . import checkpoint, records
from .folder import CHECKPOINTS, CONFIG, EVALUATIONS, MODEL, check_inside, read_collapse, read_fingerprint, run_of

SHIPPED = Path(__file__).resolve().parents[2] / "shipped"


def shipped_names() -> list[str]:
    """The trained models that come with the package."""
    return sorted(file.parent.name for file in SHIPPED.glob(f"*/{MODEL}"))


def located(path: str | os.PathLike[str]) -> Path:
    """The folder of a shipped model where `path` is its name and nothing here has that name, or is its name after
    "builtin:"; else `path` as it is."""
    name = os.fspath(path).removeprefix(BUILT_IN_PREFIX)
    explicit = name != os.fspath(path)
    return SHIPPED / name if name in shipped_names() and (explicit or not os.path.lexists(name)) else Path(path)


class Run:
    """An existing run: its configuration, checkpoints, metrics, model and data.

    `path` is the run's folder, one of its checkpoints or the name of a shipped model; CheckpointError where it is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = located(path)
        self._checkpoint: Path | None = None
        check_inside(self.path)
        if (self.path / checkpoint.STATE).is_file() and not (self.path / CONFIG).is_file():
            self._checkpoint = self.path
            self.config: TrainConfig = from_dict(checkpoint.read(self.path).get("config"), str(self.path))
        elif (self.path / CONFIG).is_file():
            self.config = load_config(self.path / CONFIG)
        else:
            there = "has no config.toml" if self.path.is_dir() else "is a file"
            what = there if self.path.exists() else "does not exist"
            raise CheckpointError(f"run: must be the folder of a run, got {self.path}, which {what}")

    @property
    def name(self) -> str:
        return self.config.name

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, oldest first."""
        return [self._checkpoint] if self._checkpoint else checkpoint.listed(self.path / CHECKPOINTS)

    @property
    def finished(self) -> bool:
        """Whether training reached its end, without a collapse, and left the final model."""
        made = self.checkpoints()
        at_end = not made or checkpoint.step_of(made[-1]) >= self.config.steps  # one longer now may have stopped since
        return self._has_model and at_end and not self.collapse

    @property
    def _has_model(self) -> bool:
        return (self.path / MODEL).is_file() and self._checkpoint is None

    @property
    def collapse(self) -> str:
        """One sentence where the final model is the best from before a collapse; "" otherwise."""
        updates = None if self._checkpoint else read_collapse(self.path)
        if updates is None:
            return ""
        return (
            f"the run collapsed at update {updates[0]}; its model is that of update {updates[1]}, the best from before "
            "the collapse"
        )

    def model_file(self) -> Path:
        """The final model, else that of the newest undamaged checkpoint; CheckpointError when there is none yet.

        Warns where newer checkpoints are damaged, where the run is not finished or collapsed, and where a net of it has
        not begun to learn.
        """
        file, caveat = self.find_model()
        if caveat:
            warnings.warn(caveat, stacklevel=2)
        return file

    def find_model(self) -> tuple[Path, str]:
        """What `model_file` returns, and what it warns of; "" where there is nothing."""
        folder, words = self._checkpoint or self.path, ""
        if not (self._has_model or self._checkpoint):
            found, faults = checkpoint.newest_whole(self.path / CHECKPOINTS)
            if found is None:
                why = "; ".join(str(error) for _, error in faults) or "it has no checkpoint yet"
                raise CheckpointError(f"run: {self.path} has no model to use: {why}")
            folder = found[0]
            damaged = ", ".join(f"{path.name} is damaged ({_inside(path, error)})" for path, error in faults)
            words = damaged and f"{self.path}: {damaged}; the model is that of {folder.name}"
        file = folder / MODEL
        return file, "\n".join(filter(None, [words, self._unfinished(file), self._unlearnt(file)]))

    def _unfinished(self, file: Path) -> str:
        """A line where the run has not reached its end, or collapsed; "" of a checkpoint, which is what it is."""
        if self._checkpoint or self.finished:
            return ""
        if self.collapse:
            return f"{self.path}: {self.collapse}"
        folder = self.checkpoints()[-1] if file.parent == self.path else file.parent
        made, steps = checkpoint.step_of(folder), self.config.steps
        if made >= steps:  # killed just before it wrote its model
            return ""
        untrained = "" if made or self.config.start_from else ": untrained"
        return f"{self.path}: not finished, the model is that of update {made} of {steps}{untrained}"

    def _unlearnt(self, file: Path) -> str:
        """A line that names the sizes whose nets do not learn yet (`begin`); "" where there are none."""
        if not any(self.config.first_updates()):
            return ""  # without a look at the file
        config, made = METHODS[self.config.method].narrow(self.config), self.update_of(file)
        sizes = [str(size) for size, first in zip(config.sizes[1:], config.first_updates()) if first and first >= made]
        if not sizes:
            return ""
        return f"{self.path}: at update {made} the net of size {', '.join(sizes)} has not begun to learn in this run"

    def model(self, device: torch.device | str = "cpu") -> Model:
        """The model to sample from, with averaged weights where the run keeps them."""
        return Model.load(self.model_file(), device=device)

    def metrics(self) -> list[dict[str, float]]:
        """The records of metrics.jsonl."""
        return records.read(self.path / records.METRICS)

    def update_of(self, file: Path) -> int:
        """The number of updates behind a model file of the run."""
        if file.parent != self.path or self._checkpoint:
            return int(checkpoint.read(file.parent)["iteration"])
        if updates := read_collapse(self.path):
            return updates[1]
        made = self.checkpoints()
        return checkpoint.step_of(made[-1]) if made else self.config.steps

    @property
    def evaluations_file(self) -> Path:
        """Where `mgebm evaluate --record` adds figures: of a checkpoint in its run's folder, where it is in one."""
        return ((run_of(self.path) if self._checkpoint else None) or self.path) / EVALUATIONS

    def evaluations(self) -> list[dict[str, float]]:
        """The records of evaluations.jsonl, one an update, the last of each."""
        found = {int(record["step"]): record for record in records.read(self.evaluations_file)}
        return [found[step] for step in sorted(found)]

    def fingerprint(self) -> dict[str, Any] | None:
        """What the run says of the data that it learnt from (`data.fingerprint`); None for one from before it did."""
        return read_fingerprint(run_of(self.path) if self._checkpoint else self.path)

    def data(self, split: str = "train", source: Any = None) -> Any:
        """The images or clips of the run, read as in training; `source` where they lie elsewhere now."""
        if source is None:
            check_there(self.config.data, self.path)
        return load_data(self.config, split=split, source=source, like=self.fingerprint())


def check_there(data: str, run: Path) -> None:
    """DataError where `data`, the path that a run stored for its data, is not there any more."""
    if os.path.isabs(data) and not os.path.exists(data):
        raise DataError(f"{data} is not there any more; --data PLACE says where it is now", f"data of {run}")


def _inside(folder: Path, error: CheckpointError) -> str:
    """What is wrong with a checkpoint, its file named without the folder."""
    return error.words if error.where == str(folder) else str(error.at(Path(error.where).name))


class Found(NamedTuple):
    """What holds a model, and what is known of it."""

    file: Path
    run: Run | None  # None for a model file that stands alone
    caveat: str  # what to say of it: damaged newer checkpoints, a run that is not finished, nets yet to learn; or ""


def find(path: str | os.PathLike[str]) -> Found:
    """The model that `path` means: a run's folder, a checkpoint's, a model file or the name of a shipped model.

    CheckpointError where there is nothing at `path`, with the nearest name, or no model.
    """
    path = located(path)
    if not path.exists():
        names = shipped_names() if path.parent == Path() else []
        names += [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise CheckpointError(f"run: {path} does not exist{suggest(path.name, names)}")
    folder = path if path.is_dir() else path.parent
    if any((folder / name).is_file() for name in (CONFIG, checkpoint.STATE)):
        run = Run(folder)
        return Found(path, run, "") if path.is_file() else Found(*_with_run(run))
    if path.is_file():
        return Found(path, None, "")
    try:
        return Found(storage.find(path), None, "")
    except CheckpointError:
        raise CheckpointError(
            f"run: must be the folder of a run, a checkpoint's or a model file, got {path}, which holds no model"
        ) from None


def _with_run(run: Run) -> tuple[Path, Run, str]:
    file, caveat = run.find_model()
    return file, run, caveat


def find_device(name: str) -> torch.device:
    """The device that a name means, auto for CUDA where torch finds it; BackendError where this machine has none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise Refused("device", "be auto, cpu, cuda or cuda:N", repr(name), "load")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            devices = "none" if count == 0 else f"cuda:0 … cuda:{count - 1}"
            raise BackendError(f"device: {name} is not here, torch finds {devices} (`mgebm doctor` says why)")
    return device


def load(run: str | os.PathLike[str], *, device: str | torch.device = "auto", ema: bool = True) -> Model:
    """The trained model of a run, of the class that its file names, ready to sample from:

        model = mg.load("runs/digits")
        pictures = model.to_uint8(model.sample(64, seed=0))
        energies = model.energies(pictures)

    Args:
        run: a run's folder (its final model, else that of its newest whole checkpoint, with a warning that the run is
            not finished, or that newer ones are damaged), a checkpoint's folder, a model file, or the name of a model
            that comes with the package, where nothing in the working folder has that name (`builtin:digits` means the
            package's in any folder).
        device: "auto": CUDA where torch finds it, else the CPU.
        ema: take the averaged weights where the run keeps them.

    `model.origin` is the `Run` that it came from, with its configuration, metrics and data; None for a file alone.

    Raises CheckpointError: nothing there, not a run or a model file, damaged, or weights that are not finite; nothing
    is ever unpickled. BackendError: a device that this machine has not.
    """
    if not isinstance(run, (str, os.PathLike)):
        raise TypeError(f"load: run must be a path, got {type(run).__name__}")
    where = find_device(str(device))
    file, origin, caveat = find(run)
    if caveat:
        warnings.warn(caveat, stacklevel=2)
    model = Model.load(file, device=where, ema=ema)
    model.origin = origin
    return model
