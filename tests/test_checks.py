"""Checks of arguments: what passes, and the sentence that names what does not."""

from __future__ import annotations

import math

import pytest

from mgebm_fast import checks
from mgebm_fast.errors import Refused


def test_bools_are_no_numbers():
    assert checks.is_int(3) and not checks.is_int(True) and not checks.is_int(3.0) and not checks.is_int(0, 1)
    assert checks.is_number(0.5) and not checks.is_number(False) and not checks.is_number("1")


@pytest.mark.parametrize("words, call", {
    "f: n must be a positive int, got 0": lambda: checks.positive_int(0, "n", "f"),
    "f: n must be a positive int, got None": lambda: checks.positive_int(None, "n", "f"),
    "f: n must be a positive int or None, got 2.5": lambda: checks.positive_int(2.5, "n", "f", none=True),
    "f: w must be a finite number > 0, got inf": lambda: checks.positive_number(math.inf, "w", "f"),
    "f: kind must be one of cat, dog, got 'dgo' (did you mean 'dog'?)": lambda: checks.one_of(
        "dgo", ("cat", "dog"), "kind", "f"
    ),
    "f: r must be (low, high) with low < high in float32, within ±1e30, got (1.0, 1.0)": lambda: checks.interval(
        (1, 1), "r", "f"
    ),
}.items())  # fmt: skip
def test_errors_name_argument_bound_and_value(words, call):
    with pytest.raises(Refused) as caught:
        call()
    assert str(caught.value) == words


def test_what_fits_passes():
    checks.positive_int(None, "n", "f", none=True)
    checks.one_of("cat", {"cat": 1}, "kind", "f")
    assert checks.interval((0, 1), "r", "f") == (0.0, 1.0)
