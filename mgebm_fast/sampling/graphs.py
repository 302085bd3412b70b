"""Whole chains at fixed addresses, which a CUDA graph captures once and replays for every batch and after every update.

A static chain reads its start, its mask, its noise counters (seed, first sample, first step) and the numbers of its
steps (drift, noise, reference) from buffers of its own and leaves the state in one; weights are refreshed inside the
plan, in place. So nothing of a call is baked into a graph but shapes and bounds: what differs in those has a graph of
its own. `run_once` is plain code: on a CPU, where the
tests run it, it is the chain itself.

A chain is captured when it is asked for the second time; a chain that is run once pays nothing for graphs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import BackendError
from ..gradient import GradientPlan
from ..gradient.autograd import AutogradPlan
from ..ops import counters
from ..ops.state import strides
from .arguments import check_callback
from .lanes import Lane
from .memory import is_out_of_memory
from .static import Static

DEVICES = ("cuda",)
CAPTURE_AT = 2  # the run of a chain that captures it
KEPT = 8  # graphs an energy keeps: those used last


_lanes: dict[Hashable, Lane] = collections.defaultdict(Lane)
# energy -> the slots of its chains, those used last at the end. Nothing in a slot refers to the energy, so that both go
# when the last user of the energy lets go of it.
_slots: MutableMapping[nn.Module, collections.OrderedDict[Hashable, Slot]] = WeakIdKeyDictionary()


@dataclasses.dataclass(frozen=True)
class Session:
    """How the chains of several calls use graphs: given to each call as its argument `graph`.

    Args:
        graph: None, True or False, as in `langevin_sample`.
        unread: None: every chain checks its result, at one host sync. A list: results of graphs are returned without;
            the list collects a 0-dim bool of each run on its device, whether it was healthy, for the caller to check.
        lane: chains of different lanes may overlap in time, those of one lane share memory.
        on: (grid, *inputs) -> a context for the work of a cascade's grid (`pipeline`); each grid then has a lane.
    """

    graph: bool | None = None
    unread: list[Tensor] | None = None
    lane: int = 0
    on: Callable[..., contextlib.AbstractContextManager[None]] | None = None


Graph: TypeAlias = "bool | None | Session"
_USUAL = Session()


def session_of(graph: Graph, callback: Any = None, where: str = "") -> Session:
    """The session that an argument `graph` means; without graphs where a callback must see every step."""
    if graph is callback is None:
        return _USUAL
    check_callback(callback, where)
    session = graph if isinstance(graph, Session) else Session(graph)
    if session.graph is not None and not isinstance(session.graph, bool):
        raise TypeError(f"{where}: graph must be True, False or None, got {session.graph!r}")
    if session.graph is True and callback is not None:
        raise ValueError(f"{where}: graph=True runs a chain whole, and leaves no steps to report to the callback")
    return session if callback is None else dataclasses.replace(session, graph=False)


class Slot:
    """The place of one chain, or cascade, of an energy: how often it ran, and its graph from the second run on."""

    def __init__(self, device: torch.device, lane: Hashable = 0) -> None:
        self.device = device
        self.lane = _lanes[device, lane]
        self.runs = 0
        self.refusal = ""  # why it could not be captured
        self.static: Any = None
        self._replay: Callable[[], None] | None = None

    def refresh(self) -> bool:
        """Give what is captured the present weights; False where nothing is, or the energy has become another one."""
        if self.static is None:
            return False
        try:
            with self.lane.lock:
                self.lane.before(self.device)
                self.static.refresh()
        except (BackendError, ReferenceError):  # one of a cascade's nets may be gone, and another have its id
            self.static = self._replay = None
            self.runs = 0
            return False
        return True

    def launch(self, build: Callable[[], Static], *arguments: Any) -> tuple[list[Tensor], Tensor] | None:
        """(results, whether they are healthy) without waiting for them; None where this run is not from a graph."""
        self.runs += 1
        if self.refusal or (self.static is None and self.runs < CAPTURE_AT):
            return None
        with self.lane.lock, torch.inference_mode(False), torch.no_grad():
            self.lane.before(self.device)
            if self.static is None:
                self._capture(build)
            if self._replay is None:
                return None
            self.static.load(*arguments)
            self._replay()
            launched = self.static.results(), self.static.healthy.clone()
            self.lane.after(self.device)
        return launched

    def run(self, session: Session, build: Callable[[], Static], *arguments: Any) -> list[Tensor] | None:
        """The results, where they come from a graph and are healthy, or are left unchecked to the session."""
        launched = self.launch(build, *arguments)
        if launched is None:
            return None
        results, healthy = launched
        if session.unread is not None:
            session.unread.append(healthy)
            return results
        return results if bool(healthy) else None

    def _capture(self, build: Callable[[], Static]) -> None:
        try:
            static = build()
            self._replay = self.lane.record(static.run_once, self.device)
            self.static = static
        except RuntimeError as error:  # also torch.OutOfMemoryError: the chain runs without a graph then
            self.refusal = f"its capture failed: {' '.join(str(error).split())}"
            if self.device.type == "cuda" and is_out_of_memory(error):
                torch.cuda.empty_cache()

    def explain(self) -> str:
        if self.refusal:
            return f"no, because {self.refusal}"
        if self.static is not None:
            return "captured, and replayed from now on"
        return f"captured at run {CAPTURE_AT} of this shape"


def slot_of(module: nn.Module, key: Hashable, device: torch.device, lane: int) -> Slot:
    """The slot of `key` in a lane, new where there is none; the slots used last are kept."""
    kept = _slots.setdefault(module, collections.OrderedDict())
    slot = kept.pop((lane, key), None) or Slot(device, lane)
    kept[lane, key] = slot
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return slot


def why_not(energy: Any, x: Tensor, session: Session) -> str:
    """Why chains of `energy` on tensors like x are not captured, whatever their plan; an empty string when they are."""
    if session.graph is False:
        return "graph=False was asked for"
    if x.device.type not in DEVICES:
        return f"CUDA graphs are not for {x.device.type} tensors"
    if session.graph is None and os.environ.get("MGEBM_GRAPHS", "1") in ("", "0"):
        return "MGEBM_GRAPHS=0"
    if not isinstance(energy, nn.Module):
        return f"a {type(energy).__name__} is not a module"
    if x.numel() == 0:
        return "the batch is empty"
    if strides(x) is None:
        return "x is neither contiguous nor channels-last"
    if torch.compiler.is_compiling() or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return "the caller captures or compiles it"
    return ""


def why_not_plan(plan: GradientPlan, session: Session) -> str:
    """Why a plan is not captured; an empty string when it is."""
    if isinstance(plan, AutogradPlan) and session.graph is not True:
        return "the autograd plan runs the energy's own code, which may wait for the device; graph=True captures it"
    return ""


def form_of(x: Tensor, mask: Tensor | None, place: counters.Counters) -> tuple[Hashable, ...]:
    """What of a call's tensors a graph is for."""
    ids = place.sample_tensor is not None and place.sample_tensor.dim() > 0
    return tuple(x.shape), strides(x), x.device, None if mask is None else tuple(mask.shape), ids, place.stream


def addresses(module: nn.Module) -> tuple[int, ...]:
    """Where a module's own tensors lie: a graph over its own code is for these alone."""
    return tuple(tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))


def slot_for(
    energy: Any, x: Tensor, mask: Tensor | None, place: counters.Counters, session: Session, *rest: Hashable
) -> Slot | str:
    """The slot of a chain, or why it is not captured; `rest`: the numbers that a graph is for beside shapes."""
    reason = why_not(energy, x, session)
    if reason:
        return reason
    own = addresses(energy) if session.graph is True else ()
    return slot_of(energy, (form_of(x, mask, place), own, *rest), x.device, session.lane)


def slot_for_cascade(
    nets: Sequence[Any],
    start: Tensor,
    held: tuple[Tensor, Tensor] | None,
    session: Session,
    *rest: Hashable,
    **options: Hashable,
) -> Slot | None:
    """The slot of a whole cascade, None where its chains are not captured; they say why, each for itself."""
    if any(why_not(net, start, session) for net in nets):
        return None
    own = tuple(addresses(net) for net in nets) if session.graph is True else ()
    form = (tuple(start.shape), start.device, held is None)
    key = ("cascade", tuple(id(net) for net in nets), form, own, rest, tuple(sorted(options.items())))
    return slot_of(nets[0], key, start.device, session.lane)


def insist(session: Session, slot: Slot | str, where: str) -> None:
    """Raise where graph=True was asked for and cannot be had."""
    if session.graph is True and isinstance(slot, str):
        raise BackendError(f"{where}: graph=True cannot be had: {slot}")
