"""Readings of stacks of convolutions, and chains packed of them, that are kept from call to call.

A loop of the user's own makes few steps a call, each of which would read and pack again what is the same. A reading is
kept while a watch of the energy holds (`graph.watch`), its tensors lie where they lay, and its stages are made of their
memory. A packed chain is kept as well, and is used where all numbers are those that it was packed of, bit for bit:
torch's counters of writes do not see `weight.data`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import native
from ..nets import EnergyNet
from ..ops.conv_chain import ConvChain, geometry_of, windows
from ..ops.conv_chain.packed import as_source
from ..ops.conv_chain.sharing import made, once
from ..ops.state import why_not_plain
from . import stack as stacks
from .builder import Stack
from .graph.kept import MOST_KEPT, key_of
from .graph.watch import Watch, watch_of
from .trust import why_not_known

_KINDS = (EnergyNet, nn.Sequential)
_MOST_NUMBERS = 1 << 25  # of a chain that is kept, with copies of them


@dataclasses.dataclass
class _Kept:
    layout: list[Hashable]  # of every tensor that the energy reaches
    stack: Stack
    head: Callable[[Any], Tensor] | None  # of the energy, where it is no part of a weight's memory


def read(energy: Any, x: Tensor, *, blocks: bool = False) -> Stack | str:
    """`stack.read`, or what it gave before where the energy is still what it was."""

    def find() -> Stack | str:
        maps = type(energy) in _KINDS and x.dim() > 2  # an MLP on points is no stack, which is soon known
        key = key_of(x, "") if maps and native.available() else None
        watch = None if key is None or torch.is_inference_mode_enabled() else watch_of(energy)
        if watch is None or why_not_known():
            return stacks.read(energy, x, blocks=blocks)
        key = "stack", key, x.dtype, x.device, blocks
        tensors = watch.tensors
        layout: list[Hashable] = [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors]
        kept: _Kept | None = watch.kept.get(key)
        if kept is not None and kept.layout == layout and not any(map(why_not_plain, tensors)):
            return kept.stack if kept.head is None else dataclasses.replace(kept.stack, head=kept.head(energy))
        return _keep(watch, key, layout, energy, stacks.read(energy, x, blocks=blocks))

    return once(("kept", id(energy), x.shape, x.dtype, x.device, blocks), energy, find)


def _keep(watch: Watch, key: Hashable, layout: list[Hashable], energy: Any, stack: Stack | str) -> Stack | str:
    if isinstance(stack, str) or not watch.holds(energy):
        return stack
    # What a parametrisation gives may depend on the numbers of tensors that are no stage's, even which memory it is.
    if any(map(parametrize.is_parametrized, energy.modules())):
        return stack
    lie = {tensor.untyped_storage().data_ptr() for tensor in watch.tensors}
    tensors = [tensor for stage in stack.stages for tensor in windows.tensors_of(stage, "stack")]
    if any(tensor.untyped_storage().data_ptr() not in lie for tensor in tensors):
        return stack  # computed, as a weight divided by its spectral norm
    head = None
    if stack.head.untyped_storage().data_ptr() not in lie:
        if type(energy) is not EnergyNet or energy.head is None:
            return stack
        shape = stack.head.shape

        def head(net: Any) -> Tensor:
            return -net.head.weight.detach().reshape(shape)

    # Readings for other batches, which are packed alike, share what is packed.
    others = [kept.stack.packed for kept in list(watch.kept.values()) if isinstance(kept, _Kept)]
    stack = dataclasses.replace(stack, packed=others[-1] if others else {})
    watch.keep(key, _Kept(layout, stack, head), MOST_KEPT)
    return stack


def packed(stack: Stack, bfloat: bool) -> ConvChain:
    """The chain of a stack with its present weights; where its reading is kept, the one of the call before if no number
    of them changed. In an update of a training run they did."""
    if stack.packed is None or made() is not None:
        return ConvChain(stack.stages, stack.head, bfloat=bfloat)
    tensors = [tensor for stage in stack.stages for tensor in windows.tensors_of(stage, "stack")]
    tensors = [as_source(tensor) for tensor in (*tensors, stack.head)]
    form = bfloat, native.isa(), *map(geometry_of, stack.stages)
    before, chain = stack.packed.get(form, ([], None))
    if chain is not None:
        pairs = [(a.data_ptr(), b.data_ptr(), 4 * a.numel()) for a, b in zip(tensors, before, strict=True)]
        if not native.module().differing(pairs):
            return chain
    chain = ConvChain(stack.stages, stack.head, bfloat=bfloat)
    if chain.finite and sum(tensor.numel() for tensor in tensors) <= _MOST_NUMBERS:
        stack.packed[form] = [tensor.detach().clone() for tensor in tensors], chain
    return chain
