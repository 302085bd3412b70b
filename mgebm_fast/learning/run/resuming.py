"""Which checkpoint a run goes on from, and whether that is a checkpoint of the same run."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...data.fingerprint import difference
from ...errors import CheckpointError, ConfigError
from ..config.train_config import TrainConfig, default_of, fixed_keys
from . import checkpoint
from .folder import CHECKPOINTS, CONFIG, check_inside, read_fingerprint, run_of

Found = tuple[Path, dict[str, Any]]  # the folder of an undamaged checkpoint, and its state


def find(path: Path, say: Callable[[str], None]) -> Found | None:
    """The checkpoint that `path`, itself one or a run's folder, means; None for a run that has none yet.

    Damaged ones of a run are set aside, and `say` reports it. CheckpointError where `path` is neither, or where no
    checkpoint is whole.
    """
    if os.path.lexists(path / checkpoint.STATE):
        return path, _read_named(path)
    if os.path.lexists(path / CONFIG):
        check_inside(path)
        with checkpoint.exclusive(path):
            checkpoint.clean(path / CHECKPOINTS)
            return _newest_of_run(path, say)
    what = "is not a run's folder" if path.is_dir() else "does not exist"
    raise CheckpointError(f"resume: must be a folder with a {CONFIG} or a checkpoint's, got {path}, which {what}")


def _read_named(folder: Path) -> dict[str, Any]:
    try:
        return checkpoint.read(folder)
    except CheckpointError as error:
        found, _ = checkpoint.newest_whole(folder.parent)
        hint = f"; the newest whole one beside it is {found[0]}" if found else ""
        raise CheckpointError(f"{error}{hint}") from None


def _newest_of_run(path: Path, say: Callable[[str], None]) -> Found | None:
    found, faults = checkpoint.newest_whole(path / CHECKPOINTS)
    if faults and found is None:
        raise CheckpointError(f"resume: no checkpoint of {path} is whole: {'; '.join(str(e) for _, e in faults)}")
    for folder, error in faults:
        assert found is not None
        aside = checkpoint.set_aside(folder, "damaged")
        say(f"{error}; it is now {aside.name}, and training goes on from the older {found[0]}")
    return found


def check_same_run(
    config: TrainConfig, data: Mapping[str, Any], images: int, state: Mapping[str, Any], folder: Path
) -> None:
    """ConfigError unless `state`, of the checkpoint `folder`, is of a run like this one on these images: as many, and
    with the fingerprint `data` where the run has one; and its nets that learn already are to go on."""
    ours, theirs = config.to_dict(), state["config"]
    for name in fixed_keys(config.method):
        section, _, leaf = name.rpartition(".")
        mine = (ours.get(section, {}) if section else ours).get(leaf)
        stored = (theirs.get(section, {}) if section else theirs).get(leaf, default_of(name))  # of an older run
        if mine != stored:
            raise ConfigError(
                f"resume: {name} must be {stored!r}, as in {folder}, got {mine!r}; a run with another value is "
                "another run: train it into a new folder"
            )
    _check_begun(config, theirs, int(state["iteration"]))
    stored = read_fingerprint(run_of(folder))
    if stored and data and (differs := difference(stored, dict(data))):
        raise ConfigError(f"resume: data must be the images that the run began with, but {differs}")
    if state.get("images") != images:
        raise ConfigError(
            f"resume: data must be the {state.get('images')} images that the run began with, got {images}"
        )


def _check_begun(config: TrainConfig, stored: Mapping[str, Any], made: int) -> None:
    begin = stored.get("begin", 0.0)
    before = dataclasses.replace(
        config, steps=stored["steps"], begin=tuple(begin) if isinstance(begin, list) else begin
    ).first_updates()
    for size, then, now in zip(config.sizes[1:], before, config.first_updates(), strict=True):
        if then < made <= now:
            raise ConfigError(
                f"begin: must leave the net of size {size} learning, which began after update {then} and has made "
                f"{made - then}, got a begin after update {now}"
            )
