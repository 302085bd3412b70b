"""Where the numbers of a run go beside metrics.jsonl: TensorBoard's files, wandb or trackio, behind three calls."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from ...checks import one_of
from ...errors import ConfigError

TENSORBOARD = "tensorboard"
LOGGERS = (TENSORBOARD, "wandb", "trackio")


class Logger:
    """`start` once, at the updates already made; `log` the numbers of an update; `close`, after which `start` may come
    again, as when a run goes back. What a service has is the user's: its project and account are set up there."""

    def start(self, folder: Path, step: int) -> None:
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Before a checkpoint: what can be written is."""


class TensorBoard(Logger):
    """One scalar a number, in the folder `tensorboard`; what earlier runs wrote after the start is marked as void."""

    def start(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge = step + 1 if (folder / TENSORBOARD).is_dir() else None
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=purge, max_queue=1000)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class Service(Logger):
    """wandb or trackio: one of their runs for each start, in the project `mgebm_fast`, named as the folder, with
    the update at which it goes on.

    A service that fails, as without a network, ends no training: a warning says what it said, once, and the numbers go
    into metrics.jsonl alone from there on.
    """

    def __init__(self, name: str) -> None:
        self._module, self._name = _imported(name), name
        self._run: Any = None
        self._failed = False

    def start(self, folder: Path, step: int) -> None:
        name = folder.resolve().name + (f" from {step}" if step else "")
        place = {"dir": str(folder.resolve())} if self._name == "wandb" else {}
        options = {"project": "mgebm_fast", "name": name, "config": {"folder": str(folder)}, **place}
        self._run = self._asked(lambda: self._module.init(**options))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._asked(lambda: self._module.log(dict(values), step=step))

    def close(self) -> None:
        if self._run is not None:
            self._run = None
            self._asked(self._module.finish)

    def _asked(self, call: Callable[[], Any]) -> Any:
        """What a call of the service gives; None from the first that fails on."""
        if self._failed:
            return None
        try:
            return call()
        except Exception as error:
            self._failed = True
            said = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" …")
            warnings.warn(f"--logger: {self._name} failed and is left out from here on: {said}", stacklevel=3)
            return None


def logger(name: str) -> Logger:
    """The logger of that name; ConfigError where it is none or its package is missing."""
    one_of(name, LOGGERS, "--logger", "")
    return TensorBoard() if name == TENSORBOARD else Service(name)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{name} must be installed (pip install {name}), got {error}", "--logger") from error
