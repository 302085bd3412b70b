"""Whether an energy is still what it was: the same code over the same objects, so that what was read of it holds.

A `Watch` notes, of each object that a search of an energy comes through (`reach`), which objects it holds: by their
identities, since strong references would keep the energy alive. An identity means the same object only while that one
lives, so that a watch ends with the first of its objects that is collected. Values of tensors are no part of it.
"""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import dis
import functools
import types
import weakref
from collections.abc import Iterable, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ...nets import ConvSpec
from ...ops.state import why_not_plain
from ..reach import LEAVES, held_by, inside, is_known
from ..trust import HOOKS
from .state import _contents

_MOST = 1000  # objects that are watched at most
_MISSES = 8  # watches in a row of one energy that held no second time, after which it has none
_MAPPINGS = (dict, collections.OrderedDict)
_CONTAINERS = frozenset((*_MAPPINGS, list, tuple, set, frozenset, collections.deque))
# Objects that are what they hold, and cannot be referred to weakly.
_WRAPPERS = frozenset((property, staticmethod, classmethod, weakref.ref, contextvars.ContextVar))
_CHANGING = (Tensor, torch.Generator)  # leaves of a search whose value is not their identity
_PLAIN = (*(kind for kind in LEAVES if kind not in _CHANGING), torch.Size, slice, range, type(...), ConvSpec)
# Libraries whose functions give the same for the same arguments, and names in them, or built in, that do not.
_PURE = {"torch", "math", "numpy", "operator", "functools", "einops", "typing", "builtins", __name__.partition(".")[0]}
_IMPURE = {
    "random", "time", "datetime", "os", "environ", "getenv", "sys", "threading", "uuid", "secrets", "default_rng",
    "get_default_dtype", "get_default_device", "get_num_threads", "initial_seed", "is_grad_enabled", "open", "input",
    "exec", "globals", "__import__", "importlib", "is_inference_mode_enabled", "is_autocast_enabled", "import_module",
    "eval", "locals",
}  # fmt: skip
_OF_FUNCTIONS = {"__globals__", "__builtins__"}  # attributes that lead to every global


class Unwatched(Exception):
    """Why an energy may change unseen: an object or code whose state cannot be seen, or too many objects."""


@dataclasses.dataclass
class _Asked:
    """Attributes that code takes from what is no module at sight, as from `self`; and whether modules of pure libraries
    are where code may take attributes from them unseen."""

    names: set[str] = dataclasses.field(default_factory=set)
    modules: bool = False


class _Gone(list):
    """References to objects that were collected; what was made of them goes with the first."""

    def __init__(self, kept: dict[Any, Any]) -> None:
        super().__init__()
        self._kept = kept

    def note(self, reference: Any) -> None:
        self.append(reference)
        self._kept.clear()


class Watch:
    """What an energy reaches; `kept`: what was made of it, by any key, for as long as the watch holds.

    Raises Unwatched where the energy's values may depend on what is not seen.
    """

    def __init__(self, energy: Any) -> None:
        self.kept: dict[Any, Any] = {}
        self._gone = _Gone(self.kept)
        self._leaves: dict[int, Any] = {}  # plain values, kept so that their identities stay theirs
        self._parts: list[tuple[weakref.ref[Any], tuple[str, ...], list[Any]]] = []
        self._tensors: list[weakref.ref[Tensor]] = []
        own: list[Tensor] = []
        asked = _Asked()
        held = _seen_in(energy, asked)
        self._containers = _containers_of(energy)
        self._looked = _looked_at(energy, self._containers, own)
        _check_plain(own)
        seen = {id(energy), *map(id, own)}
        queue = collections.deque(value for value in held if id(value) not in seen)
        while queue:
            value = queue.popleft()
            if isinstance(value, _PLAIN):
                _check_leaf(value)
                self._leaves[id(value)] = value
            elif id(value) not in seen:
                seen.add(id(value))
                self._add(value, queue, asked)
            if len(seen) > _MOST or len(self._leaves) > 10 * _MOST:
                raise Unwatched("it holds too many objects")
        if asked.modules:
            _check_names(asked.names)

    def keep(self, key: Any, made: Any, most: int) -> None:
        """Note what was made of the energy as the newest of `kept`, of which at most `most` stay: the newest."""
        self.kept.pop(key, None)
        for earlier in list(self.kept)[: max(0, len(self.kept) + 1 - most)]:
            self.kept.pop(earlier, None)
        self.kept[key] = made

    def _add(self, value: Any, queue: collections.deque[Any], asked: _Asked) -> None:
        try:
            part = weakref.ref(value, self._gone.note)
        except TypeError:
            raise Unwatched(f"it holds a {type(value).__name__}") from None
        if isinstance(value, Tensor):
            _check_plain([value])
            self._tensors.append(part)
            return
        held, containers = _seen_in(value, asked), _containers_of(value)
        self._parts.append((part, containers, _looked_at(value, containers)))
        queue.extend(held)

    def holds(self, energy: Any) -> bool:
        """Whether `energy` is made of the same objects as the one that the watch was made for, or is that one."""
        own: list[Tensor] = []
        if self._gone or _looked_at(energy, self._containers, own) != self._looked or any(map(why_not_plain, own)):
            return False
        for part, containers, looked in self._parts:
            value = part()
            if value is None or _looked_at(value, containers) != looked:
                return False
        return not self._gone

    @property
    def tensors(self) -> list[Tensor]:
        """All that the energy reaches but its own (`own_tensors`), while the watch holds; always in one order."""
        return [tensor for part in self._tensors if (tensor := part()) is not None]


def own_tensors(energy: Any) -> list[Tensor]:
    """Those that an energy itself holds, as a function those of its closure: each call may bring others, in several
    threads at once."""
    own: list[Tensor] = []
    _looked_at(energy, (), own)
    return own


_OWN = frozenset(vars(nn.Module()))


def _containers_of(value: Any) -> tuple[str, ...]:
    """The attributes of a module that are containers, but for torch's own."""
    if not isinstance(value, nn.Module):
        return ()
    own = vars(value)
    return tuple(name for name in own if name not in _OWN and type(own[name]) in _CONTAINERS)


def _looked_at(value: Any, containers: tuple[str, ...], loose: list[Tensor] | None = None) -> list[Any]:
    """What an object holds, as names and identities; containers: `_containers_of` a module; loose: takes the tensors
    that it holds, no parameters, where any are as good as those."""
    kind: Any = type(value)
    looked: list[Any] = [kind]
    if not isinstance(value, nn.Module):
        _flatten(held_by(value), looked, [], loose=loose)
        return looked
    own = value.__dict__
    parts = (own["_modules"], own["_parameters"], own["_buffers"])
    for named in (own, *parts):
        looked += named
        looked += map(id, named.values())
    looked += (kind.forward, kind.__call__, *(name for name in HOOKS if own[name]))
    if containers:
        _flatten(map(own.get, containers), looked, [])
    return looked


def _seen_in(value: Any, asked: _Asked) -> list[Any]:
    """The objects that an object holds, those in containers in place of these; raises Unwatched of code or state that
    is hidden."""
    kind: Any = type(value)
    held: list[Any] = []
    if isinstance(value, nn.Module):
        if isinstance(value, torch.jit.ScriptModule) or any(vars(value)[name] for name in HOOKS):
            raise Unwatched(f"it has a {kind.__name__} with hooks or code of its own")
        _flatten(vars(value).values(), [], held)
    elif isinstance(value, types.FunctionType):
        if not is_known(value):
            _check_code(value, value.__code__, asked)
        elif value.__module__.partition(".")[0] not in _PURE:
            raise Unwatched(f"it calls {value.__module__}.{value.__name__}")
        else:
            _check_names({value.__name__})
    elif isinstance(value, types.ModuleType):
        _check_names({value.__name__})
        return []
    elif isinstance(value, type):
        if is_known(value):
            return []
    elif is_known(kind) and not isinstance(value, (types.MethodType, functools.partial)):
        raise Unwatched(f"it holds a {kind.__name__}")
    found = list(held_by(value))
    _flatten(found, [], held)
    direct: set[int] = set()  # what code takes by its name
    if isinstance(value, types.FunctionType):
        given = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values())
        direct.update(map(id, found))
        asked.modules = asked.modules or any(isinstance(h, types.ModuleType) for h in given)
    for module in held:
        if isinstance(module, types.ModuleType) and id(module) not in direct:
            if not is_pure(module):
                raise Unwatched("it holds a module of Python's, whose names change unseen")
            asked.modules = True
    return held


def is_pure(module: types.ModuleType) -> bool:
    return module.__name__.partition(".")[0] in _PURE


def _check_code(function: types.FunctionType, code: types.CodeType, asked: _Asked) -> None:
    """Of a module's attributes those are seen that a function's code takes from it by name, and at once."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or ()))
    module: types.ModuleType | None = None  # that the last instruction put on the stack
    for instruction in dis.get_instructions(code):
        op, name, value = instruction.opname, instruction.argval, None
        takes = op in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
        if module is not None and (not takes or name == "__dict__"):
            if not is_pure(module):
                raise Unwatched(f"its code hands the module {module.__name__} on")
            asked.modules, module = True, None
        if module is not None:
            _check_names({name})
            value = vars(module).get(name)
        elif takes:
            _check_names({name}, _OF_FUNCTIONS)
            asked.names.add(name)
        elif "GLOBAL" in op or op == "LOAD_NAME":
            _check_names({name})
            value = function.__globals__.get(name)
        elif op in ("LOAD_DEREF", "LOAD_CLASSDEREF") and name in cells:
            value = _contents(cells[name])
        elif op in ("IMPORT_NAME", "IMPORT_FROM"):
            _check_names({name})
            if op == "IMPORT_NAME" and name.partition(".")[0] not in _PURE:
                raise Unwatched(f"its code imports {name}")
            asked.modules = True
        module = value if isinstance(value, types.ModuleType) else None
    for inner in inside(code):
        _check_code(function, inner, asked)


def named_in(tensor: Tensor) -> list[Any]:
    """Attributes that Python code gave a tensor, with their values or, where these are no plain ones, identities."""
    given = vars(tensor)
    return [(name, v if type(v) in (int, float, bool, str) else id(v)) for name, v in given.items()] if given else []


def _check_plain(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if reason := why_not_plain(tensor):
            raise Unwatched(f"it holds a tensor that is {reason}")
        if any(type(v) not in (int, float, bool, str) for v in vars(tensor).values()):
            raise Unwatched("it holds a tensor with attributes")


def _check_leaf(value: Any) -> None:
    owner = getattr(value, "__self__", None) if isinstance(value, types.BuiltinFunctionType) else None
    if isinstance(value, types.BuiltinFunctionType):
        _check_names({value.__name__, str(value.__module__)})
        if not (owner is None or isinstance(owner, (types.ModuleType, type))):
            raise Unwatched(f"it calls {value.__name__} of a {type(owner).__name__}")
    elif isinstance(value, (np.ndarray, np.void)):
        raise Unwatched("it holds an array of numpy")
    elif getattr(value, "__dict__", None):  # as of a class made from float
        raise Unwatched(f"it holds a {type(value).__name__} with attributes")


def _check_names(names: Iterable[str], such: set[str] = _IMPURE) -> None:
    if found := such.intersection(part for name in names for part in name.split(".")):
        raise Unwatched(f"its code names {min(found)}")


def _flatten(
    values: Iterable[Any], looked: list[Any], held: list[Any], depth: int = 0, loose: list[Tensor] | None = None
) -> None:
    """Adds identities to `looked` and objects to `held`; of containers how many they hold, and what. Tensors go to
    `loose`, where that is given, and count as one another."""
    if depth > 20:
        raise Unwatched("it has a container that holds itself")
    for value in values:
        kind = type(value)
        if kind in _CONTAINERS:
            looked.append(len(value))
            if kind in _MAPPINGS:
                _flatten(value.keys(), looked, held, depth + 1)
                value = value.values()
            _flatten(value, looked, held, depth + 1, loose)
        elif kind in _WRAPPERS:
            _flatten(held_by(value), looked, held, depth + 1)
        elif loose is not None and kind is Tensor:
            looked.append(kind)
            loose.append(value)
        else:
            looked.append(id(value))
            held.append(value)


# What an energy is known by -> the watch of it, and how many in a row held no second time. A watch refers to objects of
# the user's weakly, so that both go with the energy.
_watches: MutableMapping[Any, tuple[Watch | None, int]] = WeakIdKeyDictionary()


def identity_of(energy: Any) -> Any:
    """What it is known by: a function, or a bound method, may be made for each call, and its code stays."""
    key = energy.__func__ if isinstance(energy, types.MethodType) else energy
    return key.__code__ if isinstance(key, types.FunctionType) else key


def watch_of(energy: Any) -> Watch | None:
    """A watch of `energy` that holds; None where there can be none, or where none held for long."""
    key = identity_of(energy)
    try:
        watch, misses = _watches.get(key, (None, 0))
        if watch is not None and watch.holds(energy):
            if misses:
                _watches[key] = watch, 0
            return watch
        if misses >= _MISSES:
            return None
        try:
            watch = Watch(energy)
        except Unwatched:
            watch = None
        _watches[key] = watch, misses + 1
    except TypeError:  # no weak references to it
        return None
    return watch
