"""Fewer cases than a full product, with no pair of values left out."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any


def covering(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value an axis, such that any two values of two axes meet in a row; always the same rows.

    Greedy: of all rows of the product, always the one that brings most pairs that have not met.
    """
    pairs = list(itertools.combinations(range(len(axes)), 2))
    rows = list(itertools.product(*(range(len(axis)) for axis in axes)))
    missing = {(a, row[a], b, row[b]) for row in rows for a, b in pairs}
    chosen = []
    while missing:
        row = max(rows, key=lambda row: sum((a, row[a], b, row[b]) in missing for a, b in pairs))
        missing -= {(a, row[a], b, row[b]) for a, b in pairs}
        chosen.append(row)
    return [tuple(axis[i] for axis, i in zip(axes, row, strict=True)) for row in sorted(chosen)]


def each(axis: Sequence[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Every value of an axis once, with the rows of the others' product in turn."""
    return [(value, *row) for value, row in zip(axis, itertools.cycle(itertools.product(*others)))]


def thorough(few: int, many: int) -> int:
    """How many cases a sweep takes: `few`, or `many` where MGEBM_THOROUGH=1 asks for all."""
    return many if os.environ.get("MGEBM_THOROUGH") == "1" else few
