"""The modules that an energy runs, wherever it keeps them: itself, a closure, a partial, a bound method, a container.

Python does not say which objects a call reaches. What is searched is what code commonly holds modules in: closure
cells, defaults and named globals of functions, arguments of partials, owners of bound methods, items of containers, and
attributes of objects, each of these in turn.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

# Never searched: plain values, and objects that hold no modules of the user's.
_LEAVES = (
    str, bytes, int, float, complex, bool, type(None), type, torch.Tensor, torch.dtype, torch.device, torch.Generator,
    np.ndarray, np.generic, types.BuiltinFunctionType, types.CodeType,
)  # fmt: skip
_LIBRARIES = ("torch", "numpy", "builtins")
_MOST = 20_000  # objects searched at most, against energies that hold a data set
# What nn.Module keeps of its own; its submodules are found by `modules()`.
_OWN = frozenset(vars(nn.Module()))


def modules_of(energy: Any) -> Iterator[nn.Module]:
    """Every module that `energy` is or holds, each once."""
    seen: set[int] = set()
    keep: list[Any] = []  # ids stay taken while their objects live
    queue = collections.deque([energy])
    while queue and len(keep) < _MOST:
        value = queue.popleft()
        module = isinstance(value, nn.Module)
        if id(value) in seen or (not module and isinstance(value, _LEAVES)):
            continue
        seen.add(id(value))
        keep.append(value)
        if module:
            yield value
        queue.extend(_held_by(value))


def _held_by(value: Any) -> Iterable[Any]:
    kind: Any = type(value)
    if isinstance(value, nn.Module):
        children = list(value._modules.values())
        if _of_a_library(kind):
            return children
        return children + [held for name, held in vars(value).items() if name not in _OWN]
    if isinstance(value, types.FunctionType):
        return _held_by_function(value)
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if isinstance(value, Mapping):
        return itertools.islice(value.values(), _MOST)
    if isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        return itertools.islice(value, _MOST)
    if isinstance(value, types.ModuleType) or _of_a_library(kind):
        return ()
    call = getattr(kind, "__call__", None)  # noqa: B004
    attributes = list(getattr(value, "__dict__", {}).values())
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        attributes += [getattr(value, name, None) for name in ((slots,) if isinstance(slots, str) else slots)]
    return [*attributes, *([call] if isinstance(call, types.FunctionType) else [])]


@functools.lru_cache(maxsize=1024)
def _of_a_library(kind: Hashable) -> bool:  # a class
    return _is_of_a_library(kind)


def _is_of_a_library(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", "")
    return str(name).partition(".")[0] in _LIBRARIES


def _held_by_function(function: types.FunctionType) -> list[Any]:
    found = [getattr(function, "__wrapped__", None), *(function.__defaults__ or ())]
    found += (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            found.append(cell.cell_contents)
    if _is_of_a_library(function):
        return found
    names = _names(function.__code__)
    for value in (function.__globals__.get(name) for name in names):
        if isinstance(value, types.ModuleType) and not _is_of_a_library(value):
            found += [vars(value).get(name) for name in names]  # `settings.net(x)`
        else:
            found.append(value)
    return found


def _names(code: types.CodeType) -> set[str]:
    """The global and attribute names of a function's code and of those defined inside it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
