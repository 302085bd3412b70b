"""Readings that are kept from call to call: while an energy is the same code over the same objects (`watch`), a chain
needs neither to read it again nor, with the same weights, to pack them. From changed weights, labels and targets the
constants of the graph are computed again by a tape of the ops that made them, and packed by a table.

Whether tensors changed is asked of their numbers, all of them: torch's counters of writes do not see `weight.data`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...ops.conv_chain import prefers_bfloat
from ...ops.graph_chain import GraphChain
from ...ops.graph_chain.graph import Graph
from ...ops.graph_chain.refill import Refill
from ...ops.state import why_not_plain
from ..trust import GLOBAL_HOOKS
from .tape import Recipe, Tape, memory_of
from .tape import key_of as key_of_tensor
from .watch import Watch, named_in

MOST_KEPT = 8  # readings of an energy: those used last
_MOST_NUMBERS = 1 << 25  # in the tensors of all of them: a reading holds copies of its energy's


@dataclasses.dataclass
class Kept:
    """A reading with what it depends on beside the objects of a watch."""

    layout: list[Hashable]  # of every tensor: where it lies, and how
    leaves: list[int]  # the tensors that constants are made of; with other numbers of the rest it must be read again
    state: tuple[list[Tensor], GraphChain]  # the numbers of all tensors, and the chain of these
    refill: tuple[Recipe, Refill] | None  # None: it must be read again whatever changed
    plan: tuple[Any, ...]  # the form of the graph, how it is read, and its precision


def key_of(x: Tensor, precision: str) -> Hashable | None:
    """What a reading is for beside the energy; None where there is none to be kept: torch is traced or computes
    otherwise than usual, or is to swap weights for others, which it refuses where a watch refers to them."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    hooks = any(getattr(torch.nn.modules.module, name, None) for name in GLOBAL_HOOKS)
    if hooks or torch.is_autocast_enabled("cpu") or torch.__future__.get_swap_module_params_on_conversion():
        return None
    device = torch.empty(0).device  # the default one: torch 2.9's get_default_device fails once it was set back
    return x.shape, precision, prefers_bfloat(), native.isa(), torch.get_default_dtype(), device


def find(watch: Watch, key: Hashable, own: list[Tensor]) -> tuple[Any, ...] | None:
    """(the packed chain with the present weights, its form, how it is read, its precision); None where it must be read
    again. own: the energy's `own_tensors`."""
    kept: Kept | None = watch.kept.get(key)
    if kept is None:
        return None
    tensors = [*own, *watch.tensors]
    if _layout(tensors, len(own)) != kept.layout or any(map(why_not_plain, tensors)):
        return None
    before, chain = kept.state
    if changed := _changed(tensors, before):
        if kept.refill is None or not changed <= set(kept.leaves):
            return None
        recipe, refill = kept.refill
        try:
            made = recipe([tensors[i] for i in kept.leaves])
        except (RuntimeError, IndexError, ValueError):  # as of a label that there is none of: the energy will say so
            return None
        values = _joined(made or [])
        if made is None or not bool(torch.isfinite(values).all()):
            return None
        chain = chain.refilled(refill, values)
        kept.state = [_copied(t) if i in changed else before[i] for i, t in enumerate(tensors)], chain
    return chain, *kept.plan


def keep(watch: Watch, key: Hashable, own: list[Tensor], graph: Graph, found: tuple[Any, ...], tape: Tape) -> None:
    """Note what `find` is to give of a reading that was just made and is trusted."""
    tensors, (chain, *plan) = [*own, *watch.tensors], found
    most = min(MOST_KEPT, _MOST_NUMBERS // max(1, sum(t.numel() for t in tensors)))
    if tape.hidden or most == 0:
        return
    if any(t.device.type != "cpu" for t in tensors):  # of whose memory nothing can be asked
        return
    places = {key_of_tensor(t): i for i, t in enumerate(tensors)}
    shared = collections.Counter(map(memory_of, tensors))
    if any(key not in places for key in tape.leaves) or any(shared[memory_of(t)] > 1 for t in own):
        return
    leaves, refill = [places[key] for key in tape.leaves], None
    with contextlib.suppress(ValueError):
        if plan[-1] == "fp32":
            recipe, constants = tape.cut([constant for _, constant in graph.tensors()])
            starts = itertools.accumulate((c.numel() for c in constants), initial=0)
            order = [torch.arange(at, at + c.numel()).reshape(c.shape) for at, c in zip(starts, constants)]
            refill = recipe, chain.refill(graph, _joined(constants), dict(zip(map(id, constants), order, strict=True)))
    made = Kept(_layout(tensors, len(own)), leaves, ([*map(_copied, tensors)], chain), refill, tuple(plan))
    watch.keep(key, made, most)


def _changed(tensors: list[Tensor], before: list[Tensor]) -> set[int]:
    """Which of the tensors, all of one layout with those before, have other numbers, bit for bit."""
    now = [tensor.contiguous() for tensor in tensors]
    pairs = [(a.data_ptr(), b.data_ptr(), a.nbytes) for a, b in zip(now, before, strict=True)]
    return set(native.module().differing(pairs))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _layout(tensors: list[Tensor], own: int) -> list[Hashable]:
    """Of every tensor where it lies, and how, and attributes that Python code gave it; the first, the energy's own, may
    lie elsewhere from call to call."""
    return [
        (t.data_ptr() if i >= own else 0, t.dtype, t.shape, t.stride(), *named_in(t)) for i, t in enumerate(tensors)
    ]


def _joined(tensors: list[Tensor]) -> Tensor:
    """The numbers of the float32 ones, one after the other."""
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat([nothing, *(t.detach().reshape(-1) for t in tensors if t.dtype == torch.float32)])
