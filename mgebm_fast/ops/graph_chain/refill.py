"""A packed graph with other weights: where its packed constants are copies of weights, or multiples, and no more.

Packing lays weights out in strips, forward and transposed. Which number goes where is found by packing the graph of
the numbers' places in place of the numbers, and of two other vectors; then one gather packs new weights, at a hundredth
of the cost. Constants that are computed from several weights have no such table.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conv_chain.scratch import Scratch
from .graph import Graph
from .program import Program
from .steps import Step

_ALIGN = 16  # floats: an array begins at a cache line
MOST = 1 << 22  # weights whose places float32 can tell apart
_PLACES = {"weights": 9, "bias": 14, "top": -1}  # of constants, in `Step.arguments`


class Refill:
    """The table that packs a graph's weights from a vector of them: `places` maps each constant of the graph that is
    made of weights (by id) to the indices of its numbers in that vector, the others stay as they are."""

    def __init__(self, graph: Graph, program: Program, values: Tensor, places: dict[int, Tensor]) -> None:
        """Raises ValueError where there is no such table."""
        if values.numel() >= MOST:
            raise ValueError("graph_chain: too many weights to tell apart")
        self._program = program
        table = _Table(values.numel())
        programs = [program, *(Program(_with(graph, places, n), split=program.split) for n in table.names)]
        if any(_form(p.steps) != _form(program.steps) for p in programs):
            raise ValueError("graph_chain: a program that depends on its weights")
        self._starts, at = [], 0
        index, factors = [], []
        for own, *named in zip(*(_arrays(p.steps) for p in programs), strict=True):
            found, factor = table.look_up(own, named)
            padding = (0, -len(own) % _ALIGN)
            index.append(F.pad(found, padding, value=table.nothing))
            factors.append(F.pad(factor, padding, value=1.0))
            self._starts.append(at)
            at += len(index[-1])
        self._index, self._extra, self._factors = torch.cat(index), torch.cat(table.extra), torch.cat(factors)
        self._copies = bool((self._factors == 1).all())
        packed = self.pack(values).floats()
        for start, own in zip(self._starts, _arrays(program.steps), strict=True):
            if not torch.equal(packed[start : start + len(own)].view(torch.int32), own.view(torch.int32)):
                raise ValueError("graph_chain: a constant that is not a multiple of a weight")

    def pack(self, values: Tensor) -> Scratch:
        """All packed constants, of new weights."""
        packed = Scratch(4 * len(self._index))
        floats = torch.index_select(torch.cat([values, self._extra]), 0, self._index, out=packed.floats())
        if not self._copies:
            floats.mul_(self._factors)
        return packed

    def arguments(self, packed: Scratch) -> tuple:
        """The program's arguments, with these constants in place of its own."""
        buffers, steps, *rest = self._program.arguments
        starts = iter(self._starts)
        found = []
        for step, own in zip(self._program.steps, steps, strict=True):
            changed = list(own)
            for name, place in _PLACES.items():
                if getattr(step, name) is not None:
                    changed[place] = packed.address + 4 * next(starts)
            found.append(tuple(changed))
        return (buffers, found, *rest)


class _Table:
    """Finds the weight, and the factor, that a packed number is, from what it is when each weight has another name.

    Three names: a number from 2 on in order, the same in another order, and 1 or 2 in turn: a factor times these.
    """

    def __init__(self, count: int) -> None:
        self._count, self.nothing = count, count
        order = torch.arange(count)
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        self.names = [name.to(torch.float32) for name in (order + 2, mixed + 2, order % 2 + 1)]
        self.extra = [torch.zeros(1, dtype=torch.float32)]  # the numbers that no weight is, after the weights
        self._next = count + 1

    def look_up(self, own: Tensor, named: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(indices, factors) of an array from what it is with weights so named; ValueError of sums and products."""
        first, second, third = (array.double() for array in named)
        index, factors = torch.full((len(own),), -1), torch.ones(len(own), dtype=torch.float64)
        for turn in (1, 2):
            factor = torch.where(third == 0, 1.0, third / turn)
            place = (first / factor).round().long() - 2
            inside = place.clamp(0, max(0, self._count - 1))
            expected = [factor * name.double()[inside] for name in self.names] if self._count else []
            fits = (place == inside) & bool(expected)
            for got, want in zip((first, second, third), expected, strict=False):
                fits &= (got - want).abs() <= 1e-6 * want.abs()
            index, factors = torch.where(fits, inside, index), torch.where(fits, factor, factors)
        same = (first == second) & (second == third)
        index[same] = torch.arange(self._next, self._next + int(same.sum()))
        factors[same] = 1.0
        self._next += int(same.sum())
        self.extra.append(own[same])
        if bool((index < 0).any()):
            raise ValueError("graph_chain: a constant that is computed from several weights")
        return index, factors.float()


def _arrays(steps: list[Step]) -> list[Tensor]:
    """The constants of a program's steps, in order, flat."""
    held = [array for step in steps for name in _PLACES if (array := getattr(step, name)) is not None]
    return [array.floats() if isinstance(array, Scratch) else array.reshape(-1) for array in held]


def _form(steps: list[Step]) -> list[object]:
    """What of steps does not depend on weights, if a program is the same for all."""
    apart = ("windows", "place", *_PLACES)
    fields = [(name, value) for step in steps for name, value in vars(step).items() if name not in apart]
    return [*fields, *(len(array) for array in _arrays(steps))]


def _with(graph: Graph, places: dict[int, Tensor], values: Tensor) -> Graph:
    """The graph with other weights."""

    def of(value: Any) -> Any:
        return values[places[id(value)]] if isinstance(value, Tensor) and id(value) in places else value

    return Graph(
        graph.x,
        tuple(
            dataclasses.replace(layer, **{name: of(value) for name, value in vars(layer).items()})
            for layer in graph.layers
        ),
    )
