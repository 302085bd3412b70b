"""What a run writes down as it goes: metrics.jsonl, and the same numbers for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"


class Recorder:
    """One line of JSON a record, flushed at once, and one TensorBoard scalar a number.

    `step` counts the updates made. Opening at step s drops what earlier runs wrote after s, a torn last line
    included, so that a resumed run doubles nothing; and records of going back beyond the first `rollbacks` ones.
    """

    def __init__(self, folder: Path, step: int, rollbacks: int = 0) -> None:
        self._folder = folder
        self._open(step, rollbacks)

    def _open(self, step: int, rollbacks: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = self._folder / METRICS
        truncate(path, step, rollbacks)
        self._file = path.open("a", encoding="utf-8")
        purge = step + 1 if (self._folder / TENSORBOARD).is_dir() else None
        self._board = SummaryWriter(str(self._folder / TENSORBOARD), purge_step=purge, max_queue=1000)

    def go_back(self, step: int, rollbacks: int, diverged_at: int) -> None:
        """Drop what was written after `step`, and write, as a record of `step`, that the run went back to it."""
        self.close()
        self._open(step, rollbacks - 1)
        self.add(step, {"rollbacks": rollbacks, "diverged_at": diverged_at})
        self.synchronise()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the record of update number `step` (from 1)."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def synchronise(self) -> None:
        """Have everything on the disk before a checkpoint that counts on it."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            self._board.close()


def truncate(path: Path, step: int, rollbacks: int = 0) -> None:
    """Cut a metrics file behind its last whole line with a step up to `step`, and before a record of going back that is
    not of the first `rollbacks`; lines are in the order of steps."""
    if not path.exists():
        return
    keep = 0
    with path.open("rb") as file:
        for line in file:
            recorded = _step(line)
            if recorded is None or recorded > step or json.loads(line).get("rollbacks", 0) > rollbacks:
                break
            keep += len(line)
    os.truncate(path, keep)


def read(path: Path) -> list[dict[str, float]]:
    """All whole records of a metrics file; an empty list where there is none."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [json.loads(line) for line in file if _step(line) is not None]


def _step(line: bytes) -> int | None:
    """The step of a whole line, None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None
