"""The modules that an energy runs, wherever it keeps them: itself, a closure, a partial, a bound method, a container.

Python does not say which objects a call reaches. What is searched is what code commonly holds modules in: closure
cells, defaults, attributes and named globals of functions, arguments of partials, owners of bound methods, items of
containers, attributes of objects and of their classes, methods and properties of these, hooks, weak references and
context variables, each of these in turn.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dis
import functools
import itertools
import operator
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from .trust import HOOKS

# Never searched: plain values, and objects that hold no modules of the user's.
LEAVES = (
    str, bytes, int, float, complex, bool, type(None), torch.Tensor, torch.dtype, torch.device, torch.Generator,
    np.ndarray, np.generic, types.BuiltinFunctionType, types.CodeType,
)  # fmt: skip
_LIBRARIES = ("torch", "numpy", "builtins")
_MOST = 20_000  # objects searched at most, against energies that hold a data set
# What nn.Module keeps of its own; its submodules are found by `modules()`.
OWN = frozenset(vars(nn.Module()))
_HOOKS = operator.itemgetter(*HOOKS)


def modules_of(energy: Any) -> Iterator[nn.Module]:
    """Every module that `energy` is or holds, each once."""
    seen: set[int] = set()
    keep: list[Any] = []  # ids stay taken while their objects live
    queue = collections.deque([energy])
    while queue and len(keep) < _MOST:
        value = queue.popleft()
        kind: Any = type(value)
        way = _way(kind)
        if way is None or id(value) in seen:
            continue
        seen.add(id(value))
        keep.append(value)
        if isinstance(value, nn.Module):
            yield value
        queue.extend(way(value))


def held_by(value: Any) -> Iterable[Any]:
    """What an object holds that may be, or hold, a module of the user's."""
    kind: Any = type(value)
    way = _way(kind)
    return () if way is None else way(value)


@functools.lru_cache(maxsize=1024)
def _way(kind: Any) -> Callable[[Any], Iterable[Any]] | None:
    """How what an object of a class holds is found; None where it is not searched."""
    if issubclass(kind, torch.jit.ScriptModule):  # which has no attributes of Python's
        return lambda module: list(module.children())
    if issubclass(kind, nn.Module):
        return _held_by_library_module if _of_a_library(kind) else _held_by_module
    ways: dict[Any, Callable[[Any], Iterable[Any]] | None] = {
        (*LEAVES, types.ModuleType): None,  # what a function takes from a module is found by the function
        type: lambda value: _held_by_classes(_classes(value)),
        types.FunctionType: _held_by_function,
        types.MethodType: lambda value: (value.__self__, value.__func__),
        (staticmethod, classmethod): lambda value: (value.__func__,),
        property: lambda value: (value.fget,),
        functools.cached_property: lambda value: (value.func,),
        weakref.ref: lambda value: (value(),),
        contextvars.ContextVar: lambda value: (value.get(None),),
    }
    return next((way for kinds, way in ways.items() if issubclass(kind, kinds)), _held_by_object)


def _held_by_library_module(module: nn.Module) -> list[Any]:
    own = vars(module)
    found = list(own["_modules"].values())
    if any(hooks := _HOOKS(own)):
        found += [hook for by_id in hooks for hook in by_id.values()]
    return found


def _held_by_module(module: nn.Module) -> list[Any]:
    found = _held_by_library_module(module)
    found += [held for name, held in vars(module).items() if name not in OWN]
    kind: Any = type(module)
    found += _classes(kind)
    return found


def _held_by_object(value: Any) -> Iterable[Any]:
    kind: Any = type(value)
    attributes = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values(), *attributes)
    if isinstance(value, Mapping):
        attributes += itertools.islice(itertools.chain.from_iterable(value.items()), _MOST)
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        attributes += itertools.islice(value, _MOST)
    elif _of_a_library(kind):
        return ()
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        attributes += [getattr(value, name, None) for name in ((slots,) if isinstance(slots, str) else slots)]
    return [*attributes, *_classes(kind)]


def _held_by_classes(classes: Iterable[type]) -> list[Any]:
    """Their attributes, methods and properties."""
    return [
        held
        for kind in classes
        for name, held in vars(kind).items()
        if not name.startswith("__") or isinstance(held, types.FunctionType)
    ]


@functools.lru_cache(maxsize=1024)
def _classes(kind: Any) -> tuple[type, ...]:
    """Those of the user's among a class, its class and what it comes from."""
    return tuple(base for base in (*kind.__mro__, type(kind)) if not is_known(base))


def _of_a_library(kind: type) -> bool:
    return _of_libraries(str(kind.__module__))


def is_known(code: Any) -> bool:
    """Whether a class or function is of this package, a library or the standard library: it names no modules of the
    user's."""
    return _is_known(str(getattr(code, "__module__", "")))


@functools.lru_cache(maxsize=1024)
def _is_known(path: str) -> bool:
    return _of_libraries(path) or path.partition(".")[0] in {__name__.partition(".")[0], *sys.stdlib_module_names}


@functools.lru_cache(maxsize=1024)
def _of_libraries(path: str) -> bool:
    return path.partition(".")[0] in _LIBRARIES


def _held_by_function(function: types.FunctionType) -> list[Any]:
    found = [*vars(function).values(), *(function.__defaults__ or ())]
    found += (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            found.append(cell.cell_contents)
    if is_known(function):
        return found
    names = names_of(function.__code__)
    found += map(function.__globals__.get, globals_of(function.__code__))
    modules = [value for value in found if isinstance(value, types.ModuleType)]
    for module in modules:  # `settings.nets.net(x)`
        if not _of_libraries(module.__name__):
            held = [vars(module).get(name) for name in names]
            modules += [value for value in held if isinstance(value, types.ModuleType) and value not in modules]
            found += held
    return found


@functools.lru_cache(maxsize=1024)
def names_of(code: types.CodeType) -> set[str]:
    """The global and attribute names of a function's code and of those defined inside it."""
    return set(code.co_names).union(*map(names_of, inside(code)))


@functools.lru_cache(maxsize=1024)
def globals_of(code: types.CodeType) -> set[str]:
    """The global names alone: an attribute may be called as a global that the code never asks for."""
    found = (i for i in dis.get_instructions(code) if "GLOBAL" in i.opname or i.opname == "LOAD_NAME")
    return {i.argval for i in found}.union(*map(globals_of, inside(code)))


def inside(code: types.CodeType) -> list[types.CodeType]:
    """The code of functions and classes that are defined in it."""
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
