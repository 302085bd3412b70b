"""The op table and the choice of backend.

`TABLE` says in which layers each op exists, as its own file has it (`register`); a test reads it and finds the op,
under its one name, in each of them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util

import torch
from torch import Tensor

from .. import native
from ..checks import one_of
from ..errors import BackendError
from ..noise import is_eager

BACKENDS = ("auto", "reference", "native", "triton")


@dataclasses.dataclass(frozen=True)
class Layers:
    """Where an op is written; every op has the pure-torch reference."""

    cpu: bool  # csrc/ops/<op>_cpu.cpp
    cuda: bool  # csrc/ops/<op>_cuda.cu
    triton: bool  # kernels/<op>.py
    traced: bool  # registered with torch.library; an op on an object that holds packed weights is not


TABLE: dict[str, Layers] = {}


def register(op: str, *, cpu: bool = False, cuda: bool = False, triton: bool = False, traced: bool = True) -> None:
    """An op's line in the table; every file of an op has one."""
    TABLE[op] = Layers(cpu, cuda, triton, traced)


def _why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return 'triton is not installed: pip install "mgebm_fast[triton]"'
    if torch.cuda.is_available():
        return ""
    from triton import knobs

    if knobs.runtime.interpret:
        return ""
    return "torch finds no CUDA device here (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly, for tests)"


@functools.cache
def why_no_triton() -> str:
    """Why Triton kernels cannot be used here; an empty string when they can (on CUDA tensors, or interpreted)."""
    return _why_no_triton()


def unavailable(op: str, backend: str, device: torch.device) -> str:
    """Why `backend` cannot run `op` on `device`; an empty string when it can."""
    layers = TABLE[op]
    if backend == "reference":
        return ""
    if backend == "triton":
        if not layers.triton:
            return f"{op} has no Triton kernel"
        reason = _why_no_triton() if torch.compiler.is_compiling() else why_no_triton()  # a trace passes caches by
        if not reason and device.type == "cpu":
            from triton import knobs

            if not knobs.runtime.interpret:
                return "Triton runs on CUDA tensors only (TRITON_INTERPRET=1 runs it on CPU tensors, for tests)"
        return reason
    if not (layers.cuda if device.type == "cuda" else layers.cpu):
        return f"{op} has no native kernel for {device.type} tensors"
    if device.type == "cpu":
        return "" if native.available() else native.why_not()
    if device.type == "cuda":
        return native.why_no_cuda()
    return f"there are no native kernels for {device.type} tensors"


def choose(op: str, backend: str, device: torch.device, where: str = "") -> str:
    """The backend that runs `op` on `device`: a named one or an error, that starts with `where`, the op's name where
    that is empty; for "auto" the fastest that is here.

    auto: a CUDA tensor → native CUDA where built, else Triton, else the reference; a CPU tensor → native, else the
    reference.
    """
    if backend == "auto":
        order = ("native", "triton") if device.type == "cuda" else ("native",)
        return next((name for name in order if not unavailable(op, name, device)), "reference")
    where = where or op
    one_of(backend, BACKENDS, "backend", where)
    reason = unavailable(op, backend, device)
    if reason:
        raise BackendError(f"{where}: backend {backend!r} is not available for {device.type} tensors: {reason}")
    return backend


def past_dispatcher(*tensors: Tensor) -> bool:
    """Whether an op may call its kernel directly: no subclasses, nothing traces or transforms, no mode is listening.

    The dispatcher costs a custom in-place op some 80 µs a call, several times a small update itself.
    """
    return is_eager() and all(type(tensor) is Tensor for tensor in tensors)


def launch_place(tensor: Tensor) -> tuple[int, ...]:
    """The last arguments of every native launcher: (device index, current stream) on CUDA, (threads,) on a CPU."""
    if tensor.device.type == "cuda":
        return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
    return (torch.get_num_threads(),)
