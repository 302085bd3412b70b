"""Errors that a user can act on, and the helper that suggests a near name."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import Any, TypeVar

_E = TypeVar("_E", bound="InputError")


class InputError(ValueError):
    """Input that is refused, with `where: words` for its text: whose input, and what is wrong with it.

    A caller to whom the input has another name raises the same error `at` that.
    """

    where: str = ""

    def __init__(self, words: str, where: Any = "") -> None:
        super().__init__(words)
        self.where = str(where)

    @property
    def words(self) -> str:
        """What is wrong, without whose input it is."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.where}: {self.words}" if self.where else self.words

    def at(self: _E, where: str) -> _E:
        """The same error of input that has another name."""
        renamed = copy.copy(self)
        renamed.where = where
        return renamed


class Refused(InputError):
    """An argument that is refused: `where: name must <must>, got <got>`."""

    def __init__(self, name: str, must: str, got: Any, where: str = "") -> None:
        ValueError.__init__(self, name, must, got)
        self.where = where
        self.name, self.must, self.got = name, must, got

    @property
    def words(self) -> str:
        return f"{self.name} must {self.must}, got {self.got}".lstrip()

    def named(self, where: str, name: str = "") -> Refused:
        """The same of an argument that the caller was given under another name."""
        return Refused(name, self.must, self.got, where)


class BackendError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says what is missing."""


class BatchTooLargeError(MemoryError):
    """A batch does not fit in memory and cannot be split; the message says how many samples fit."""


class CheckpointError(InputError):
    """A checkpoint is truncated, of another model, or not a checkpoint at all."""


class ConfigError(InputError):
    """A preset, a configuration file or a `--set` key is wrong."""


class DataError(InputError):
    """A data source cannot be read, is empty, or does not fit the model."""

    def __init__(self, words: str, where: Any = "load") -> None:
        super().__init__(words, where)


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
