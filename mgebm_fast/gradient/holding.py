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


class _Innermost(threading.local):
    """What this thread's innermost hold is of."""

    energy: Any = None
    on_meta = False


_innermost = _Innermost()


def on_meta(energy: Any) -> bool:
    """Whether an energy has weights on meta, of which torch makes, on a CPU, gradients of what its memory holds; inside
    a hold of it as found at its start."""
    return _innermost.on_meta if _innermost.energy is energy else any(_asked(m)[1] for m in modules_of(energy))


class frozen_parameters:  # noqa: N801  (used as a function)
    """Inside, the modules that a callable runs (`reach.modules_of`) are held: buffers that a forward moves, as running
    statistics and the vectors of a spectral norm in train mode, are put back at the end.

    A chain never needs weight gradients. While no other Python thread is alive the parameters are switched to
    `requires_grad=False` meanwhile, which keeps less memory; with others, which may be training them, they are left
    alone: the gradient in x is the same. Raises Refused of a module without weights yet.
    """

    __slots__ = ("_energy", "_modules", "_outer")

    def __init__(self, energy: Callable[..., Any]) -> None:
        self._energy = energy

    def __enter__(self) -> None:
        found, any_on_meta = list[nn.Module](), False
        for module in modules_of(self._energy):
            moves, meta = _asked(module)
            any_on_meta = any_on_meta or meta
            if moves:
                found.append(module)
        alone = threading.active_count() == 1
        self._modules: list[nn.Module] = []
        with _lock:
            try:
                for module in found:
                    self._hold(module, alone)
            except BaseException:  # as where there is no memory for a copy of a buffer
                self._let_go()
                raise
        self._outer = _innermost.energy, _innermost.on_meta
        _innermost.energy, _innermost.on_meta = self._energy, any_on_meta

    def __exit__(self, *error: object) -> None:
        _innermost.energy, _innermost.on_meta = self._outer
        with _lock:
            self._let_go()

    def _hold(self, module: nn.Module, alone: bool) -> None:
        held = _held.get(id(module))
        if held is None:
            held = _held[id(module)] = _note(module)
        held.count += 1
        self._modules.append(module)
        if alone:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad and parameter.is_leaf:
                    parameter.requires_grad = False
                    held.frozen.append(parameter)

    def _let_go(self) -> None:
        for module in self._modules:
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


def _asked(module: nn.Module) -> tuple[bool, bool]:
    """Whether a chain could change a module, since it has a buffer, or a parameter that is not frozen; and whether any
    of these is on meta. Raises Refused of a module without weights yet."""
    parameters, buffers = module._parameters, module._buffers
    moves, meta = bool(buffers), False
    for tensor in (*parameters.values(), *buffers.values()) if parameters or buffers else ():
        if tensor is None:
            continue
        if type(tensor) is not nn.Parameter and is_lazy(tensor):
            must = "be called on x once before, which makes its weights"
            raise Refused("energy", must, f"a {type(module).__name__} without", "chain")
        moves, meta = moves or tensor.requires_grad, meta or tensor.is_meta
    return moves, meta


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
