"""Errors that a user can act on, and the helper that suggests a near name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says what is missing."""


class BatchTooLargeError(MemoryError):
    """A batch does not fit in memory and cannot be split; the message says how many samples fit."""


class CheckpointError(ValueError):
    """A checkpoint is truncated, of another model, or not a checkpoint at all."""


class ConfigError(ValueError):
    """A preset, a configuration file or a `--set` key is wrong."""


class DataError(ValueError):
    """A data source cannot be read, is empty, or does not fit the model."""


class DivergenceError(RuntimeError):
    """A chain or a loss became non-finite; the message names the grid and the step."""


def close(name: str, options: Iterable[str]) -> str | None:
    """The nearest of `options`, or None when none is near."""
    near = difflib.get_close_matches(name[:200], list(options), n=1, cutoff=0.5)
    return near[0] if near else None


def suggest(name: str, options: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `options`, or an empty string when none is near."""
    near = close(name, options)
    return f" (did you mean {near!r}?)" if near else ""
