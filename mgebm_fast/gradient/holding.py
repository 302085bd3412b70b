"""A chain leaves no trace in the modules that it runs: their weights need no gradient, their buffers are put back.

Several threads may hold the same modules. The first to come notes the buffers, the last to go puts back those that
changed, and only those: what nothing wrote, as the running statistics of a net in eval mode, is never written to, so
that no other thread's graph finds it modified.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from ..errors import Refused
from .reach import modules_of

_lock = threading.RLock()


@dataclasses.dataclass
class _Held:
    """One module while chains run it."""

    buffers: dict[str, tuple[Tensor, Tensor, int] | None]  # name -> (the buffer, its values, its version)
    written: bool  # whether a forward writes buffers without counting their version up
    frozen: list[nn.Parameter]
    count: int = 0


_held: dict[int, _Held] = {}  # by the id of a module, which is kept alive meanwhile


@contextlib.contextmanager
def frozen_parameters(energy: Callable[..., Any]) -> Iterator[None]:
    """Inside, the modules that a callable runs (`reach.modules_of`) are held: buffers that a forward moves, as running
    statistics and the vectors of a spectral norm in train mode, are put back at the end.

    A chain never needs weight gradients. While no other Python thread is alive the parameters are switched to
    `requires_grad=False` meanwhile, which keeps less memory; with others, which may be training them, they are left
    alone: the gradient in x is the same.
    """
    modules = [module for module in modules_of(energy) if _moves(module)]
    for module in modules:
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None and is_lazy(tensor) for tensor in tensors):
            kind = type(module).__name__
            raise Refused("energy", "be called on x once before, which makes its weights", f"a {kind} without", "chain")
    if not modules:  # frozen already, and without buffers
        yield
        return
    alone = threading.active_count() == 1
    with _lock, torch.no_grad():
        for module in modules:
            held = _held.setdefault(id(module), _Held({}, False, []))
            if held.count == 0:
                _note(module, held)
            held.count += 1
            if alone:
                frozen = [p for p in module._parameters.values() if p is not None and p.requires_grad]
                for parameter in frozen:
                    parameter.requires_grad_(False)
                held.frozen += frozen
    try:
        yield
    finally:
        with _lock, torch.no_grad():
            for module in modules:
                held = _held[id(module)]
                held.count -= 1
                if held.count == 0:
                    del _held[id(module)]
                    _restore(module, held)


@contextlib.contextmanager
def untouched(energy: Callable[..., Any]) -> Iterator[None]:
    """Inside a hold, what measuring the energy in between moves is put back at once, so that the chain goes on as
    without it."""
    with frozen_parameters(energy):
        notes = [(module, _note(module, _Held({}, False, []))) for module in modules_of(energy)]
        try:
            yield
        finally:
            with torch.no_grad():
                for module, note in notes:
                    _restore(module, note)


def _moves(module: nn.Module) -> bool:
    """Whether a chain could change a module: it has a buffer, or a parameter that is not frozen."""
    if len(module._buffers):
        return True
    return any(parameter is not None and parameter.requires_grad for parameter in module._parameters.values())


def _note(module: nn.Module, held: _Held) -> _Held:
    for name, buffer in module._buffers.items():
        held.buffers[name] = None if buffer is None else (buffer, buffer.detach().clone(), _version(buffer))
    # torch's kernels for batch and instance norm write running statistics without counting their version up.
    held.written = isinstance(module, _NormBase) and module.track_running_stats and module.training
    return held


def _restore(module: nn.Module, held: _Held) -> None:
    for parameter in held.frozen:
        parameter.requires_grad_(True)
    for name, noted in held.buffers.items():
        buffer = None
        if noted is not None:
            buffer, before, version = noted
            if held.written or _version(buffer) != version:
                with torch.inference_mode(buffer.is_inference()):
                    buffer.copy_(before)
        # A forward may have put another tensor in its place; a script module's cannot.
        if not isinstance(module, torch.jit.ScriptModule) and module._buffers.get(name, held) is not buffer:
            vars(module).pop(name, None)
            module._buffers[name] = buffer


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version
