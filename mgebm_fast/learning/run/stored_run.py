"""A run's folder, as `sample`, `evaluate` and notebooks open it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError
from ...models import Model
from ..config.files import load_config
from ..config.method import load_data
from ..config.train_config import TrainConfig
from ..config.values import from_dict
from . import checkpoint, records
from .folder import CHECKPOINTS, CONFIG, MODEL, check_inside, read_fingerprint


class Run:
    """An existing run: its configuration, checkpoints, metrics, model and data.

    `path` is the run's folder or one of its checkpoints; CheckpointError where it is neither.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._checkpoint: Path | None = None
        check_inside(self.path)
        if (self.path / checkpoint.STATE).is_file() and not (self.path / CONFIG).is_file():
            self._checkpoint = self.path
            self.config: TrainConfig = from_dict(checkpoint.read(self.path)["config"], str(self.path))
        elif (self.path / CONFIG).is_file():
            self.config = load_config(self.path / CONFIG)
        else:
            what = "has no config.toml" if self.path.is_dir() else "does not exist"
            raise CheckpointError(f"run: must be the folder of a run, got {self.path}, which {what}")

    @property
    def name(self) -> str:
        return self.config.name

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, oldest first."""
        return [self._checkpoint] if self._checkpoint else checkpoint.listed(self.path / CHECKPOINTS)

    @property
    def finished(self) -> bool:
        """Whether training reached its end and left the final model."""
        return (self.path / MODEL).is_file() and self._checkpoint is None

    def model_file(self) -> Path:
        """The final model, else that of the newest undamaged checkpoint; CheckpointError when there is none yet.

        Warns where newer checkpoints are damaged.
        """
        file, passed_over = self.find_model()
        if passed_over:
            warnings.warn(passed_over, stacklevel=2)
        return file

    def find_model(self) -> tuple[Path, str]:
        """What `model_file` returns, and a line that names damaged newer checkpoints; "" where there are none."""
        if self.finished:
            return self.path / MODEL, ""
        if self._checkpoint:
            return self._checkpoint / MODEL, ""
        found, faults = checkpoint.newest_whole(self.path / CHECKPOINTS)
        if found is None:
            why = "; ".join(str(error) for _, error in faults) or "it has no checkpoint yet"
            raise CheckpointError(f"run: {self.path} has no model to use: {why}")
        damaged = ", ".join(f"{folder.name} is damaged ({_inside(folder, error)})" for folder, error in faults)
        words = f"{self.path}: {damaged}; the model is that of {found[0].name}" if damaged else ""
        return found[0] / MODEL, words

    def model(self, device: torch.device | str = "cpu") -> Model:
        """The model to sample from, with averaged weights where the run keeps them."""
        return Model.load(self.model_file(), device=device)

    def metrics(self) -> list[dict[str, float]]:
        """The records of metrics.jsonl."""
        return records.read(self.path / records.METRICS)

    def fingerprint(self) -> dict[str, Any] | None:
        """What the run says of the data that it learnt from (`data.fingerprint`); None for one from before it did."""
        return read_fingerprint(self.path.parent.parent if self._checkpoint else self.path)

    def data(self, split: str = "train", source: Any = None) -> Any:
        """The images or clips of the run, read as in training; `source` where they lie elsewhere now."""
        return load_data(self.config, split=split, source=source, like=self.fingerprint())


def _inside(folder: Path, error: CheckpointError) -> str:
    """What is wrong with a checkpoint, its file named without the folder."""
    return error.words if error.where == str(folder) else str(error.at(Path(error.where).name))
