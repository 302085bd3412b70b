"""What a configuration key may hold: each kind reads a TOML value, or says what it expected."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from ...checks import is_int, is_number
from ...errors import Refused, close, suggest
from ...sampling import Schedule

# The largest values of keys that memory or time depends on: far beyond use, and refused before anything is allocated.
MOST_SIDE, MOST_CHANNELS = 4096, 4096  # pixels; channels of images and of layers, lengths of z
MOST_SAMPLES = 1 << 16  # images of a batch, chains of a bank
MOST_GRIDS = 16
MOST_STEPS, MOST_UPDATES = 10**6, 10**9  # of one chain; of a run
MOST_ELEMENTS = 2**31  # numbers in one batch
MOST_LENGTH, MOST_RATE = 10**7, 192_000  # frames or samples of a clip; of a second


class Kind(abc.ABC):
    """Reads a value as TOML gives it. `read` raises ValueError with the reason where `expected` does not say it all."""

    expected: str

    @abc.abstractmethod
    def read(self, value: Any) -> Any: ...

    def shown(self, value: Any) -> Any:
        """A value that was read as a TOML file would give it."""
        return value


@dataclasses.dataclass(frozen=True)
class Whole(Kind):
    """An int in [low, high]."""

    low: int
    high: int | None = None

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"a whole number >= {self.low}" + ("" if self.high is None else f" and <= {self.high}")

    def read(self, value: Any) -> int:
        if not is_int(value, self.low):
            raise ValueError
        if self.high is not None and value > self.high:
            raise ValueError
        return value


@dataclasses.dataclass(frozen=True)
class Real(Kind):
    """A finite float: >= low (> low where `above`), <= high (< high where `below`)."""

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False

    @property
    def expected(self) -> str:  # type: ignore[override]
        bounds = []
        if self.low is not None:
            bounds.append(f"{'>' if self.above else '>='} {self.low:g}")
        if self.high is not None:
            bounds.append(f"{'<' if self.below else '<='} {self.high:g}")
        return " ".join(["a number", " and ".join(bounds)]).strip()

    def read(self, value: Any) -> float:
        if not is_number(value) or not math.isfinite(value):
            raise ValueError
        if self.low is not None and (value < self.low or (self.above and value == self.low)):
            raise ValueError
        if self.high is not None and (value > self.high or (self.below and value == self.high)):
            raise ValueError
        return float(value)


@dataclasses.dataclass(frozen=True)
class Flag(Kind):
    expected: str = "true or false"

    def read(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


@dataclasses.dataclass(frozen=True)
class Text(Kind):
    """A string; a number is taken as its digits, so that `--set classes=3` names the class "3"."""

    expected: str = "a string"
    most: int = 4096

    def read(self, value: Any) -> str:
        if is_int(value):
            return str(value)
        if not isinstance(value, str):
            raise ValueError
        if len(value) > self.most:
            raise ValueError(f", {len(value)} characters of at most {self.most}")
        return value


@dataclasses.dataclass(frozen=True)
class Choice(Kind):
    """One of a few words: a tuple, or a table that words are still entered into."""

    options: Collection[str]

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"one of {', '.join(self.options)}"

    def read(self, value: Any) -> str:
        if value not in self.options:
            raise ValueError(suggest(str(value), list(self.options)))
        return value


@dataclasses.dataclass(frozen=True)
class Many(Kind):
    """A list of `kind`, kept as a tuple; of `length` entries, or of `least` to `most`. One string is a list of one."""

    kind: Kind
    length: int | None = None
    least: int = 0
    most: int = 10_000

    @property
    def expected(self) -> str:  # type: ignore[override]
        number = f"a list of {self.length}" if self.length is not None else "a list"
        if self.least:
            number += f" of {self.least} or more"
        return f"{number}, each {self.kind.expected}"

    def read(self, value: Any) -> tuple:
        if isinstance(self.kind, Text) and not isinstance(value, (list, tuple)):
            value = [value]
        if not isinstance(value, (list, tuple)) or self.length not in (None, len(value)) or len(value) < self.least:
            raise ValueError
        if len(value) > self.most:
            raise ValueError(f", {len(value)} entries of at most {self.most}")
        return tuple(self.kind.read(entry) for entry in value)


@dataclasses.dataclass(frozen=True)
class OverSteps(Kind):
    """`kind`; or what varies over the steps of a chain: a table, read as a `Schedule`, or a list of one value a step,
    whose length is checked beside `steps`."""

    kind: Kind

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"{self.kind.expected}, a table {{start, end, shape}} over the steps or a list of one a step"

    def read(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)) and value:
            return tuple(self.kind.read(entry) for entry in value)
        if not isinstance(value, (Mapping, Schedule)):
            return self.kind.read(value)
        given = dict(value) if isinstance(value, Mapping) else dataclasses.asdict(value)
        names = [field.name for field in dataclasses.fields(Schedule)]
        for name in given.keys() - set(names):
            raise ValueError(f", with the unknown entry {name!r}{suggest(name, names)}")
        for name in names[:2]:
            if name not in given:
                raise ValueError(f", without {name!r}")
            try:
                given[name] = self.kind.read(given[name])
            except ValueError:
                raise ValueError(f", whose {name} is not {self.kind.expected}") from None
        try:
            return Schedule(**given)
        except Refused as error:
            raise ValueError(f", whose {error.words}") from None


@dataclasses.dataclass(frozen=True)
class PerGrid(Kind):
    """One value for all nets, or a list with one for each of sizes[1:]; its length is checked beside `sizes`."""

    kind: Kind

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"{self.kind.expected}, or a list with one for each net"

    def read(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(self.kind.read(entry) for entry in value)
        return self.kind.read(value)


@dataclasses.dataclass(frozen=True)
class Maybe(Kind):
    """`kind`, or nothing, which TOML has no value for: the string "none" in a file, `none` on the command line."""

    kind: Kind
    word: ClassVar[str] = "none"

    @property
    def expected(self) -> str:  # type: ignore[override]
        return f"{self.kind.expected}, or {self.word}"

    def read(self, value: Any) -> Any:
        return None if value is None or value == self.word else self.kind.read(value)

    def shown(self, value: Any) -> Any:
        return self.word if value is None else value


class Auto(Maybe):
    """`kind`, or chosen by other keys: "auto". For kinds of which "none" is a value."""

    word = "auto"


def key(default: Any, kind: Kind, doc: str, *, fixed: bool = False) -> Any:
    """A dataclass field: its default, what it may hold, one line of help; `fixed`: a resumed run may not change it."""
    return dataclasses.field(default=default, metadata={"kind": kind, "doc": doc, "fixed": fixed})


def pick(value: Any, index: int) -> Any:
    """The entry of net `index` in a `PerGrid` value."""
    return value[index] if isinstance(value, tuple) else value


def nearest(name: str, options: Sequence[str]) -> str:
    """`suggest` for dotted keys: `lr` finds `optimiser.lr`, `langevn.stps` finds `langevin.steps`."""
    leaves: dict[str, list[str]] = {}
    for option in options:
        leaves.setdefault(option.rpartition(".")[2], []).append(option)
    leaf = name.rpartition(".")[2]
    if leaf in leaves:  # the right key in no section, or in a wrong or misspelt one
        # `size` is a key of one method; whoever writes it alone more likely means `sizes`
        plain = suggest(name, [option for option in options if option.startswith(name)]) if "." not in name else ""
        return plain or suggest(name, leaves[leaf]) or f" (did you mean {leaves[leaf][0]!r}?)"
    hint = suggest(name, options)
    if hint:
        return hint
    near = close(leaf, list(leaves))
    return f" (did you mean {leaves[near][0]!r}?)" if near else ""


def shortened(value: Any) -> str:
    """`repr`, of a long value its beginning."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"
