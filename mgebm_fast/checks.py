"""Checks of arguments that every layer shares. An error names the argument, what it must be and what it was."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from .errors import Refused, suggest


def is_int(value: Any, least: float = -math.inf) -> bool:
    """Whether a value is an int, no bool, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float, no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positive_int(value: Any, name: str, where: str, *, none: bool = False) -> None:
    """Raise unless a value is an int of at least 1; or None, with `none`."""
    if not is_int(value, 1) and not (none and value is None):
        raise Refused(name, f"be a positive int{' or None' * none}", repr(value), where)


def finite_number(value: Any, name: str, where: str) -> None:
    """Raise unless a value is a finite number."""
    if not is_number(value) or not math.isfinite(value):
        raise Refused(name, "be a finite number", repr(value), where)


def positive_number(value: Any, name: str, where: str) -> None:
    """Raise unless a value is a finite number above 0."""
    if not is_number(value) or not 0 < value < math.inf:
        raise Refused(name, "be a finite number > 0", repr(value), where)


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
