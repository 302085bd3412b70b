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


class _Searched(threading.local):
    """What this thread's innermost hold is of, and the modules that were found: who asks inside searches no more."""

    energy: Any = None
    modules: list[nn.Module] = []  # noqa: RUF012  (replaced, never written to)


_searched = _Searched()


def held_modules(energy: Any) -> list[nn.Module]:
    """Every module that `energy` is or holds; inside a hold of it as found at its start."""
    return _searched.modules if _searched.energy is energy else list(modules_of(energy))


@contextlib.contextmanager
def frozen_parameters(energy: Callable[..., Any]) -> Iterator[None]:
    """Inside, the modules that a callable runs (`reach.modules_of`) are held: buffers that a forward moves, as running
    statistics and the vectors of a spectral norm in train mode, are put back at the end.

    A chain never needs weight gradients. While no other Python thread is alive the parameters are switched to
    `requires_grad=False` meanwhile, which keeps less memory; with others, which may be training them, they are left
    alone: the gradient in x is the same.
    """
    found, outer = list(modules_of(energy)), (_searched.energy, _searched.modules)
    modules = [module for module in found if _moves(module)]
    alone = threading.active_count() == 1
    with _lock:
        for module in modules:
            held = _held.get(id(module))
            if held is None:
                held = _held[id(module)] = _note(module)
            held.count += 1
            if alone:
                for parameter in module._parameters.values():
                    if parameter is not None and parameter.requires_grad:
                        parameter.requires_grad = False
                        held.frozen.append(parameter)
    _searched.energy, _searched.modules = energy, found
    try:
        yield
    finally:
        _searched.energy, _searched.modules = outer
        with _lock:
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
        notes = [(module, _note(module)) for module in modules_of(energy)]
        try:
            yield
        finally:
            for module, note in notes:
                _restore(module, note)


def _moves(module: nn.Module) -> bool:
    """Whether a chain could change a module: it has a buffer, or a parameter that is not frozen.

    Raises Refused of a module without weights yet."""
    moves = False
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is None:
                continue
            if is_lazy(tensor):
                kind = type(module).__name__
                must = "be called on x once before, which makes its weights"
                raise Refused("energy", must, f"a {kind} without", "chain")
            moves = moves or tensor.requires_grad or tensors is module._buffers
    return moves or bool(module._buffers)


def _note(module: nn.Module) -> _Held:
    noted: dict[str, tuple[Tensor, Tensor, int] | None] = {}
    for name, buffer in module._buffers.items():
        noted[name] = None if buffer is None else (buffer, buffer.detach().clone(), _version(buffer))
    # torch's kernels for batch and instance norm write running statistics without counting their version up.
    written = isinstance(module, _NormBase) and module.track_running_stats and module.training
    return _Held(noted, written, [])


def _restore(module: nn.Module, held: _Held) -> None:
    for parameter in held.frozen:
        parameter.requires_grad = True
    for name, noted in held.buffers.items():
        buffer = None
        if noted is not None:
            buffer, before, version = noted
            if held.written or _version(buffer) != version:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(before)
        # A forward may have put another tensor in its place; a script module's cannot.
        if not isinstance(module, torch.jit.ScriptModule) and module._buffers.get(name, held) is not buffer:
            vars(module).pop(name, None)
            module._buffers[name] = buffer


def _version(buffer: Tensor) -> int:
    return 0 if buffer.is_inference() else buffer._version
