"""What Python code keeps from call to call, which reading an energy must not move: counters, flags, cached values."""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import operator
from collections.abc import Iterator, Sized
from typing import Any

import torch

from ..reach import OWN, held_by, modules_of

_MOST = 1000  # objects that are asked at most
_PLAIN = (bool, int, float, complex, str, type(None))
_BOXES = (list, dict, set, collections.deque)


@contextlib.contextmanager
def as_before(energy: Any) -> Iterator[None]:
    """At the end numbers, strings and Nones are what they were at the start, and lists, dicts, sets and deques hold
    what they held: attributes of the energy, of its modules and of the object whose method it is, and variables of its
    closure. Attributes that came are taken away. How far an iterator is cannot be put back."""
    owners = [*modules_of(energy), *_called(energy)]
    notes = [
        (values, {name: value if isinstance(value, _PLAIN) else _Kept for name, value in values.items()})
        for owner in owners
        if not isinstance(owner, torch.jit.ScriptModule) and isinstance(values := getattr(owner, "__dict__", 0), dict)
    ]
    cells = [cell for owner in owners for cell in getattr(owner, "__closure__", None) or ()]
    closed = [(cell, value) for cell in cells if isinstance(value := _contents(cell), _PLAIN)]
    held = [value for values, _ in notes for name, value in values.items() if name not in OWN]
    boxes = [(box, copy.copy(box)) for box in (*held, *map(_contents, cells)) if _is_box(box)]
    try:
        yield
    finally:
        for values, before in notes:
            for name in values.keys() - before.keys():
                values.pop(name, None)  # another thread may have taken it away
            values.update({n: v for n, v in before.items() if v is not _Kept and values.get(n, _Kept) is not v})
        for cell, value in closed:
            if _contents(cell) is not value:
                cell.cell_contents = value
        for box, before in boxes:
            if len(box) != len(before) or any(map(operator.is_not, _parts(box), _parts(before))):
                box.clear()
                box.update(before) if isinstance(box, (dict, set)) else box.extend(before)


def _is_box(value: Any) -> bool:
    """Whether what a value holds can be put back: a container of Python's own, not a large one."""
    return isinstance(value, _BOXES) and type(value).__module__ in ("builtins", "collections") and len(value) <= _MOST


def _parts(box: Any) -> list[Any]:
    return [*box.keys(), *box.values()] if isinstance(box, dict) else list(box)


def plain_values(energy: Any) -> list[tuple[str, Any]]:
    """The numbers, strings and lengths that an energy reaches, in the order of a search, each with the kind of object
    that holds it; of iterators how far they are. Two lists differ where a call in between moved one of them."""
    seen: set[int] = set()
    keep: list[Any] = []  # ids stay taken while their objects live
    found: list[tuple[str, Any]] = []
    queue = collections.deque([energy])
    while queue and len(keep) < _MOST:
        value = queue.popleft()
        if id(value) in seen:
            continue
        seen.add(id(value))
        keep.append(value)
        name = type(value).__name__
        if isinstance(value, Iterator):
            found.append((name, (repr(value), operator.length_hint(value, -1))))
        if isinstance(value, Sized) and isinstance(value, _BOXES):
            found.append((name, len(value)))
        for held in held_by(value):
            if isinstance(held, _PLAIN):
                found.append((name, held))
            else:
                queue.append(held)
    return found


class _Kept:
    """Stands for what is no plain value and is left alone."""


def _called(energy: Any) -> list[Any]:
    """The callable, and what it calls in turn."""
    found: list[Any] = []
    while energy is not None and all(energy is not other for other in found):
        found.append(energy)
        if isinstance(energy, functools.partial):
            energy = energy.func
        elif (owner := getattr(energy, "__self__", None)) is not None:
            found.append(energy.__func__ if hasattr(energy, "__func__") else owner)
            energy = owner
        else:
            energy = getattr(energy, "__wrapped__", None)
    return found


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _Kept
