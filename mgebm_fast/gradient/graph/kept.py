"""Readings that are kept from call to call: while an energy is the same code over the same objects (`watch`), a chain
needs neither to read it again nor, with the same weights, to pack them; changed weights are packed by a table.

Whether weights changed is asked of their numbers, all of them: torch's counters of writes do not see `weight.data`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ... import native
from ...ops.conv_chain import prefers_bfloat
from ...ops.graph_chain import GraphChain
from ...ops.graph_chain.layers import Graph
from ...ops.graph_chain.refill import MOST, Refill
from ..trust import GLOBAL_HOOKS
from .recorder import Weights, memory_of
from .watch import Watch

_MOST_KEPT = 8  # readings of an energy: those used last


@dataclasses.dataclass
class Kept:
    """A reading with what it depends on beside the objects of a watch."""

    layout: list[Hashable]  # of every tensor: where it lies, and how
    fixed: list[bool]  # of every tensor: whether with other numbers the energy must be read again
    others: list[Tensor]  # copies of those
    state: tuple[Tensor, GraphChain]  # the numbers of the rest, and these packed
    refill: Refill | None  # None: all are fixed
    plan: tuple[Any, ...]  # the form of the graph, how it is read, and its precision


def key_of(x: Tensor, precision: str) -> Hashable | None:
    """What a reading is for beside the energy; None where there is none to be kept: torch is traced or computes
    otherwise than usual."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    hooks = any(getattr(torch.nn.modules.module, name, None) for name in GLOBAL_HOOKS)
    if hooks or torch.is_autocast_enabled("cpu"):
        return None
    device = torch.empty(0).device  # the default one: torch 2.9's get_default_device fails once it was set back
    return x.shape, precision, prefers_bfloat(), native.isa(), torch.get_default_dtype(), device


def find(watch: Watch, key: Hashable) -> tuple[Any, ...] | None:
    """(the packed chain with the present weights, its form, how it is read, its precision); None where it must be read
    again."""
    kept: Kept | None = watch.kept.get(key)
    if kept is None:
        return None
    tensors = watch.tensors
    if _layout(tensors) != kept.layout:
        return None
    others, loose = _apart(tensors, kept.fixed)
    values, (before, chain) = _values(loose), kept.state
    if not all(map(torch.equal, others, kept.others)):
        return None
    if not torch.equal(values.view(torch.int32), before.view(torch.int32)):
        if kept.refill is None or not bool(torch.isfinite(values).all()):
            return None
        chain = chain.refilled(kept.refill, values)
        kept.state = values, chain
    return chain, *kept.plan


def keep(watch: Watch, key: Hashable, graph: Graph, found: tuple[Any, ...], weights: Weights) -> None:
    """Note what `find` is to give of a reading that was just made and is trusted, and met these weights."""
    tensors, (chain, *plan) = watch.tensors, found
    if sum(t.numel() for t in tensors) >= MOST or not weights.met <= set(map(memory_of, tensors)):
        return
    fixed = [t.dtype is not torch.float32 or memory_of(t) in weights.computed for t in tensors]
    others, loose = _apart(tensors, fixed)
    refill = None
    try:
        if plan[-1] == "fp32":
            refill = chain.refill(graph, _values(loose), _places(graph, loose))
    except ValueError:
        refill = None
    if refill is None:
        fixed, others, loose = [True] * len(tensors), tensors, []
    copies = [t.detach().clone() for t in others]
    watch.kept.pop(key, None)
    for earlier in list(watch.kept)[: max(0, len(watch.kept) + 1 - _MOST_KEPT)]:
        watch.kept.pop(earlier, None)
    watch.kept[key] = Kept(_layout(tensors), fixed, copies, (_values(loose), chain), refill, tuple(plan))


def _apart(tensors: list[Tensor], fixed: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
    """(those that are fixed, the others)."""
    pairs = list(zip(tensors, fixed, strict=True))
    return [t for t, is_fixed in pairs if is_fixed], [t for t, is_fixed in pairs if not is_fixed]


def _layout(tensors: list[Tensor]) -> list[Hashable]:
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def _values(tensors: list[Tensor]) -> Tensor:
    """The numbers of float32 tensors, one after the other."""
    nothing = torch.empty(0, dtype=torch.float32, device="cpu")
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat([nothing, *(t.reshape(-1) for t in tensors)])


def _places(graph: Graph, tensors: list[Tensor]) -> dict[int, Tensor]:
    """For each constant in the memory of a tensor, where its numbers are in `_values`; ValueError where one may lie
    partly outside."""
    starts: dict[int, tuple[Tensor, int]] = {}
    at = 0
    for tensor in tensors:
        starts[memory_of(tensor)] = tensor, at
        at += tensor.numel()
    found: dict[int, Tensor] = {}
    for _, constant in graph.tensors():
        if memory_of(constant) in starts:
            tensor, start = starts[memory_of(constant)]
            offset = constant.storage_offset() - tensor.storage_offset()
            if not tensor.is_contiguous() or tensor.numel() * 4 != tensor.untyped_storage().nbytes():
                raise ValueError("weights that share their memory")
            order = torch.arange(start, start + tensor.numel(), device="cpu")
            found[id(constant)] = order.as_strided(constant.shape, constant.stride(), offset)
    return found
