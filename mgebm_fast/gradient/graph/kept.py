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
from .watch import Watch

_MOST_KEPT = 8  # readings of an energy: those used last


@dataclasses.dataclass
class Kept:
    """A reading with what it depends on beside the objects of a watch."""

    layout: list[Hashable]  # of every tensor: where it lies, and how
    others: list[Tensor]  # copies of those that are not float32
    state: tuple[Tensor, GraphChain]  # the numbers of those that are, and these packed
    refill: Refill | None
    plan: tuple[Any, ...]  # the form of the graph, how it is read, and its precision


def key_of(x: Tensor, precision: str) -> Hashable | None:
    """What a reading is for beside the energy; None where there is none to be kept: torch is traced or computes
    otherwise than usual."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    hooks = any(getattr(torch.nn.modules.module, name, None) for name in GLOBAL_HOOKS)
    if hooks or torch.is_autocast_enabled("cpu"):
        return None
    return x.shape, precision, prefers_bfloat(), native.isa(), torch.get_default_dtype(), torch.get_default_device()


def find(watch: Watch, key: Hashable) -> tuple[Any, ...] | None:
    """(the packed chain with the present weights, its form, how it is read, its precision); None where it must be read
    again."""
    kept: Kept | None = watch.kept.get(key)
    if kept is None:
        return None
    tensors = watch.tensors
    if _layout(tensors) != kept.layout or not all(map(torch.equal, _others(tensors), kept.others)):
        return None
    values, (before, chain) = _values(tensors), kept.state
    if not torch.equal(values.view(torch.int32), before.view(torch.int32)):
        if kept.refill is None or not bool(torch.isfinite(values).all()):
            return None
        chain = chain.refilled(kept.refill, values)
        kept.state = values, chain
    return chain, *kept.plan


def keep(watch: Watch, key: Hashable, graph: Graph, found: tuple[Any, ...], copied: bool) -> None:
    """Note what `find` is to give of a reading that was just made and is trusted; `copied`: whether all its constants
    that depend on weights lie in the memory of the weights, in float32."""
    tensors, (chain, *plan) = watch.tensors, found
    if sum(t.numel() for t in tensors) >= MOST:
        return
    values, refill = _values(tensors), None
    if copied:
        try:
            refill = chain.refill(graph, values, _places(graph, tensors))
        except ValueError:
            refill = None
    others = [t.detach().clone() for t in _others(tensors)]
    watch.kept.pop(key, None)
    while len(watch.kept) >= _MOST_KEPT:
        watch.kept.pop(next(iter(watch.kept)), None)
    watch.kept[key] = Kept(_layout(tensors), others, (values, chain), refill, tuple(plan))


def _floats(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.dtype is torch.float32]


def _others(tensors: list[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.dtype is not torch.float32]


def _layout(tensors: list[Tensor]) -> list[Hashable]:
    return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]


def _values(tensors: list[Tensor]) -> Tensor:
    """The numbers of those in float32, one after the other."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.cat(
            [torch.empty(0, dtype=torch.float32, device="cpu"), *(t.reshape(-1) for t in _floats(tensors))]
        )


def _places(graph: Graph, tensors: list[Tensor]) -> dict[int, Tensor]:
    """For each constant in the memory of a tensor, where its numbers are in `_values`; ValueError where one may lie
    partly outside."""
    starts: dict[int, tuple[Tensor, int]] = {}
    at = 0
    for tensor in _floats(tensors):
        starts[tensor.untyped_storage()._cdata] = tensor, at
        at += tensor.numel()
    found: dict[int, Tensor] = {}
    for _, constant in graph.tensors():
        if constant.untyped_storage()._cdata in starts:
            tensor, start = starts[constant.untyped_storage()._cdata]
            offset = constant.storage_offset() - tensor.storage_offset()
            if not tensor.is_contiguous() or tensor.numel() * 4 != tensor.untyped_storage().nbytes():
                raise ValueError("weights that share their memory")
            order = torch.arange(start, start + tensor.numel(), device="cpu")
            found[id(constant)] = order.as_strided(constant.shape, constant.stride(), offset)
    return found
