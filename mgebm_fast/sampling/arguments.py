"""Arguments of chains as users have them: numpy's numbers, 0-dim tensors and lists become what the checks expect.

What is of no such kind is returned as it is, for the check that names the argument to refuse.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def number(value: Any) -> Any:
    """A real number as Python's: numpy's scalars and 0-dim tensors too (one on a GPU costs a host sync)."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, np.generic):
        value = value.item()
    return value


def pair(value: Any) -> Any:
    """A (low, high) as a tuple of Python's numbers."""
    if isinstance(value, (list, tuple, Tensor, np.ndarray)) and np.ndim(value) == 1:
        return tuple(number(bound) for bound in value)
    return value


def as_numbers_(described: Any, *pairs: str) -> None:
    """Every field of a frozen dataclass as Python's number, those named in `pairs` as a tuple of two; in place."""
    for field in dataclasses.fields(described):
        convert = pair if field.name in pairs else number
        object.__setattr__(described, field.name, convert(getattr(described, field.name)))


def count(value: Any, name: str, where: str) -> int:
    """A positive int, or an error that names the argument."""
    found = number(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{where}: {name} must be a positive int, got {value!r}")
    return found


def counter(value: Any) -> Any:
    """An id, ids (N,) or a step: an int, or an int64 tensor where a tensor, an array or a list of integers is given."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        array = np.asarray(value)
        return torch.from_numpy(array.astype(np.int64)) if array.dtype.kind in "iu" else value
    if isinstance(value, Tensor) and value.dtype in _INTEGERS:
        return value.to(torch.int64)
    return value


def place(
    seed: Any, generator: torch.Generator | None, first_sample: Any, first_step: Any, device: torch.device, where: str
) -> dict[str, Any]:
    """The seed (a fresh one where none is given) and the counters of a chain on `device`, for `counters.check`."""
    ids = counter(first_sample)
    if isinstance(ids, Tensor) and not isinstance(first_sample, Tensor):
        ids = ids.to(device)  # from a list; a tensor must be where x is
    return {
        "seed": noise.resolve_seed(counter(seed), generator, device, where),
        "first_sample": ids,
        "first_step": counter(first_step),
    }
