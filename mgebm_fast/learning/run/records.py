"""What a run writes down as it goes: metrics.jsonl, and the same numbers for a logger."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ... import files
from ...errors import CheckpointError
from .loggers import Logger, TensorBoard

METRICS = "metrics.jsonl"
_MOST = 1 << 32  # bytes of a metrics file
_LONGEST = 1 << 20  # bytes of a line

Mark = Mapping[str, Any]  # {"bytes", "crc32"} of a metrics file as it was at a checkpoint


class NoRecorder:
    """Keeps no records: what a run without a folder has, and every rank but the first."""

    notice = ""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        return

    def rewind(self, step: int, rollbacks: int) -> None:
        return

    def mark(self) -> Mark | None:
        return None

    def synchronise(self) -> None:
        return

    def close(self) -> None:
        return


class Recorder(NoRecorder):
    """One line of JSON a record, flushed at once, and the same to `logger`, TensorBoard by default.

    `step` counts the updates made. Opening at step s drops what earlier runs wrote after s, a torn last line
    included, so that a resumed run doubles nothing; and records of going back beyond the first `rollbacks` ones.
    `mark` is what the file was like at the checkpoint: where it is not, `notice` says what is done about it.
    """

    def __init__(
        self, folder: Path, step: int, rollbacks: int = 0, mark: Mark | None = None, logger: Logger | None = None
    ) -> None:
        self._folder, self._logger = folder, logger or TensorBoard()
        self._open(step, rollbacks, mark)

    def _open(self, step: int, rollbacks: int, mark: Mark | None) -> None:
        path = self._folder / METRICS
        self.notice = truncate(path, step, rollbacks, mark)
        actual: dict[str, Any] = files.fingerprint(path) if path.exists() else {"bytes": 0, "crc32": "0"}
        self._bytes, self._crc = actual["bytes"], int(actual["crc32"], 16)
        self._file = path.open("ab")
        self._logger.start(self._folder, step)

    def rewind(self, step: int, rollbacks: int) -> None:
        """Drop what was written after `step`, and records of going back beyond the first `rollbacks` ones."""
        self.close()
        self._open(step, rollbacks, None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the record of update number `step` (from 1)."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        self._file.write(line)
        self._file.flush()
        self._bytes, self._crc = self._bytes + len(line), zlib.crc32(line, self._crc)
        self._logger.log(step, values)

    def mark(self) -> Mark:
        """What the file is like now, for the state of a checkpoint."""
        return {"bytes": self._bytes, "crc32": f"{self._crc:08x}"}

    def synchronise(self) -> None:
        """Have everything on the disk before a checkpoint that counts on it."""
        files.synchronise_file(self._file.fileno(), Path(self._file.name))
        self._logger.flush()

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            self._logger.close()


def truncate(path: Path, step: int, rollbacks: int = 0, mark: Mark | None = None) -> str:
    """Cut a metrics file behind its last record with a step up to `step`, and before a record of going back that is not
    of the first `rollbacks`; records are in the order of steps.

    A file that does not begin with what `mark` describes, or has a damaged line among those to keep, is damaged: its
    readable records are kept, the file as it was is set aside, and the sentence that is returned says so. Otherwise "".
    """
    expected = 0 if mark is None else int(mark["bytes"])
    if not os.path.lexists(path):
        return f"{path}: missing, with the records up to update {step}" if expected else ""
    if mark is not None and _begins_with(path, mark):
        os.truncate(path, expected)
        return ""
    kept: list[bytes] = []
    lost = pending = 0  # `pending`: unreadable lines that may be the torn end
    with _opened(path) as file:
        for line in _lines(file):
            record = _record(line)
            if record is None:
                pending += 1
                continue
            if record["step"] > step or record.get("rollbacks", 0) > rollbacks:
                break
            kept.append(line)
            lost, pending = lost + pending, 0
    if mark is None and not lost:
        os.truncate(path, sum(map(len, kept)))
        return ""
    aside = path.with_name(f"{METRICS}.damaged")
    if not os.path.lexists(aside):
        os.rename(path, aside)
    files.remove(path)
    files.write_bytes(path, b"".join(kept))
    return f"{path}: damaged; {len(kept)} records up to update {step} could be read, the file as it was is {aside.name}"


def read(path: Path) -> list[dict[str, float]]:
    """All readable records of a metrics file, with a warning where others are not; [] where there is no file."""
    if not os.path.lexists(path):
        return []
    with _opened(path) as file:
        lines = [_record(line) for line in _lines(file)]
    if lines and lines[-1] is None:  # torn: the process was killed
        lines.pop()
    records = [record for record in lines if record is not None]
    if len(records) < len(lines):
        warnings.warn(f"{path}: {len(lines) - len(records)} of {len(lines)} records are damaged", stacklevel=2)
    return records


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        with files.open_regular(path, most=_MOST) as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long pieces, which are no records."""
    while line := file.readline(_LONGEST):
        yield line


def _begins_with(path: Path, mark: Mark) -> bool:
    crc, left = 0, int(mark["bytes"])
    with _opened(path) as file:
        while left and (chunk := file.read(min(left, _LONGEST))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return not left and f"{crc:08x}" == mark["crc32"]


def _record(line: bytes) -> dict[str, Any] | None:
    """The record of a whole line, None for a torn or damaged one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
        if not isinstance(record, dict) or not isinstance(record["step"], int):
            return None
        whole = isinstance(record.get("rollbacks", 0), int) and all(map(_is_number, record.values()))
        return record if whole else None
    except (ValueError, KeyError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)
