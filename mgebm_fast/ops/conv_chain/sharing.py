"""What is made of weights, once for all who ask while the weights stay as they are."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

Made = TypeVar("Made")
_made: contextvars.ContextVar[dict[Hashable, tuple[Any, ...]] | None] = contextvars.ContextVar("_made", default=None)


@contextlib.contextmanager
def weights_stay() -> Iterator[None]:
    """Inside, the caller changes no weight and no net: what `once` makes of them is kept until the end."""
    token = _made.set({})
    try:
        yield
    finally:
        _made.reset(token)


def made() -> dict[Hashable, tuple[Any, ...]] | None:
    """What was made inside `weights_stay`, by key, with what holds the addresses that a key names; None outside."""
    return _made.get()


def once(key: Hashable, held: Any, make: Callable[[], Made]) -> Made:
    """`make()`, or what it gave before for this key inside `weights_stay`. `held` owns the addresses that the key
    names, so that nothing else can come to lie there."""
    known = _made.get()
    if known is None:
        return make()
    if key not in known:
        known[key] = (make(), held)
    return known[key][0]
