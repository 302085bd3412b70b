"""Checks of arguments that every layer shares. An error names the argument, what it must be and what it was."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from .errors import Refused, suggest


def number(value: Any) -> Any:
    """A real number as Python's: numpy's scalars, 0-dim arrays and tensors too (one on a GPU costs a host sync)."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def is_int(value: Any, least: float = -math.inf) -> bool:
    """Whether a value is an int, no bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positive_int(value: Any, name: str, where: str, *, none: bool = False) -> Any:
    """A value as an int; raises unless it is one of at least 1; or None, with `none`."""
    value = number(value)
    if not is_int(value, 1) and not (none and value is None):
        raise Refused(name, f"be a positive int{' or None' * none}", repr(value), where)
    return value


def positive_number(value: Any, name: str, where: str) -> float:
    """A value as a float; raises unless it is a finite number above 0."""
    return finite_number(value, name, where, above=0)


def finite_number(value: Any, name: str, where: str, *, above: float = -math.inf) -> float:
    """A value as a float; raises unless it is a finite number above a bound."""
    value = number(value)
    if not is_number(value) or not above < value < math.inf:
        raise Refused(name, f"be a finite number{f' > {above:g}' if above > -math.inf else ''}", repr(value), where)
    return float(value)


def one_of(value: Any, options: Collection[str], name: str, where: str) -> None:
    """Raise unless a value is one of the options; the error suggests the nearest."""
    if value not in options:
        raise Refused(name, f"be one of {', '.join(options)}", f"{value!r}{suggest(str(value), options)}", where)


def interval(value: Any, name: str, where: str) -> tuple[float, float]:
    """(low, high) as floats; raises unless low < high, both at most 1e30 in size and apart in float32."""
    low, high = map(float, value)
    if not -1e30 <= low < high <= 1e30 or high - low < 1e-6 * max(-low, high):
        raise Refused(name, "be (low, high) with low < high in float32, within ±1e30", f"({low}, {high})", where)
    return low, high
