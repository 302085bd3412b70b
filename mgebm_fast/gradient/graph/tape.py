"""How an energy's code, and the rules that read it, compute constants from weights and labels: a list of torch's ops
that computes them again from other numbers, so that changed ones need no new reading.

A constant is known by where it lies in memory; all are kept alive until the tape is cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only


def memory_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def key_of(tensor: Tensor) -> tuple[Hashable, ...]:
    """Where a tensor lies in memory, and how: autograd may hand out another object for the same tensor."""
    return memory_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands for a tensor: the number of where it is kept."""

    number: int


@dataclasses.dataclass(frozen=True)
class _Op:
    """One op; `reads` and `gives`: the memory of its tensors."""

    func: Any
    arguments: Any  # args and kwargs, with places in place of tensors
    out: list[Any]  # what it gave, flat: places, or plain values, which are to be the same again
    shapes: list[torch.Size]  # of the tensors that it gave
    reads: set[int]
    gives: set[int]


class Tape:
    """The ops on constants so far."""

    def __init__(self) -> None:
        self.leaves: dict[tuple[Hashable, ...], int] = {}  # tensors that no op made: key -> place
        self._ops: list[_Op] = []
        self._places: dict[tuple[Hashable, ...], int] = {}
        self._kept: list[Any] = []
        self.of_all = False  # whether the energy is one of as many samples as x has, and no others
        self.hidden = False  # whether numbers of tensors were taken by other means than ops

    def note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if func is torch.ops.aten.lift_fresh.default:  # of a tensor that Python made of numbers
            self.fresh(args[0])
        read = tensors_in((args, kwargs))
        for tensor in read:
            if (key := key_of(tensor)) not in self._places:
                self.leaves[key] = self._places[key] = len(self._kept)
                self._kept.append(tensor)
        arguments = tree_map_only(Tensor, lambda t: _Place(self._places[key_of(t)]), (args, kwargs))
        made = tree_flatten(out)[0]
        for tensor in tensors_in(made):
            self._places[key_of(tensor)] = len(self._kept)
            self._kept.append(tensor)
        places = tree_map_only(Tensor, lambda t: _Place(self._places[key_of(t)]), made)
        memory = set(map(memory_of, tensors_in(made)))
        if func._schema.is_mutable:
            memory.update(map(memory_of, read))
        shapes = [t.shape for t in tensors_in(made)]
        self._ops.append(_Op(func, arguments, places, shapes, set(map(memory_of, read)), memory))

    def fresh(self, tensor: Tensor) -> None:
        """A tensor of numbers that are always the same."""
        place = self._places[key_of(tensor)] = len(self._kept)
        self._kept.append(tensor)
        arguments: Any = (tensor.detach().clone(),), {}
        op = _Op(torch.ops.aten.clone.default, arguments, [_Place(place)], [tensor.shape], set(), {memory_of(tensor)})
        self._ops.append(op)

    def cut(self, constants: Sequence[Tensor]) -> tuple[Recipe, list[Tensor]]:
        """How those of the constants that are made of leaves are made of them, and those constants."""
        moving = {memory for memory, *_ in self.leaves}
        for op in self._ops:
            if op.reads & moving:
                moving |= op.gives
        targets = [t for t in constants if memory_of(t) in moving]
        needed = set(map(memory_of, targets))
        ops = []
        for op in reversed(self._ops):
            asks = op.reads & moving and (
                torch.Tag.dynamic_output_shape in op.func.tags or any(not isinstance(v, _Place) for v in op.out)
            )
            if asks or op.gives & needed:
                needed |= op.reads | op.gives
                ops.append(op)
        found = [_Place(self._places[key_of(t)]) for t in targets]
        return Recipe(ops[::-1], list(self.leaves.values()), found, len(self._kept)), targets


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Computes constants from leaves."""

    ops: list[_Op]
    leaves: list[int]
    targets: list[_Place]
    places: int

    def __call__(self, leaves: Sequence[Tensor]) -> list[Tensor] | None:
        """The constants; None where the energy's code may go another way with these leaves."""
        held: list[Any] = [None] * self.places
        for place, leaf in zip(self.leaves, leaves, strict=True):
            held[place] = leaf.detach()
        with torch.inference_mode(False), torch.no_grad():
            for op in self.ops:
                args, kwargs = tree_map_only(_Place, lambda place: held[place.number], op.arguments)
                made, _ = tree_flatten(op.func(*args, **kwargs))
                if len(made) != len(op.out) or [t.shape for t in tensors_in(made)] != op.shapes:
                    return None
                for place, value in zip(op.out, made, strict=True):
                    if isinstance(place, _Place):
                        held[place.number] = value
                    elif place != value:
                        return None
        return [held[place.number] for place in self.targets]


class Taping(TorchDispatchMode):
    """Notes all ops meanwhile, as those of a rule on the constants that it was given."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled while this listens, and torch would import its compiler to say so (seconds)."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._tape.note(func, args, kwargs or {}, out)
        return out
