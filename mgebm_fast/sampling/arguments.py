"""Arguments of chains as users have them: numpy's numbers, 0-dim tensors and lists become what the checks expect.

Any other value is returned unchanged: the later check that names the argument refuses it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ..checks import is_number, number, positive_int
from ..errors import Refused
from ..ops.counters import counter

_PLAIN = (int, float, type(None))


def pair(value: Any) -> Any:
    """A (low, high) as a tuple of Python's numbers."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    return tuple(map(number, value)) if isinstance(value, (list, tuple)) else value


def as_numbers_(described: Any, *pairs: str) -> None:
    """Every field of a frozen dataclass as Python's number, those named in `pairs` as a tuple of two; in place.

    A list becomes a tuple, which can be hashed."""
    for field in dataclasses.fields(described):
        value = getattr(described, field.name)
        if type(value) in _PLAIN:
            continue
        value = (pair if field.name in pairs else number)(value)
        if isinstance(value, list):
            value = tuple(number(entry) for entry in value)
        object.__setattr__(described, field.name, value)


def count(value: Any, name: str, where: str) -> int:
    """A positive int, or an error that names the argument."""
    return positive_int(value, name, where)


def check_callback(callback: Any, where: str) -> None:
    if not (callback is None or callable(callback)):
        raise TypeError(f"{where}: callback must be callable, got {type(callback).__name__}")


def check_reference(std: Any, mean: Any, where: str) -> None:
    """A mean alone is for models whose chains begin there."""
    if std is None and is_number(mean := number(mean)) and mean:
        raise Refused("reference_mean", "be given with reference_std", f"{mean!r} alone", where)


def place(
    seed: Any, generator: torch.Generator | None, first_sample: Any, first_step: Any, device: torch.device, where: str
) -> dict[str, Any]:
    """The seed (a fresh one where none is given) and the counters of a chain on `device`, for `counters.check`."""
    return {
        "seed": noise.resolve_seed(counter(seed), generator, device, where),
        "first_sample": counter(first_sample, device),
        "first_step": counter(first_step),
    }
