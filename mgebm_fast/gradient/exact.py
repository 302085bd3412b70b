"""How a GPU multiplies float32 meanwhile: as float32, with the same bits in every call, or as TF32."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class _Switches:
    """torch's switches, which are the process's: the first one in turns them, the last one out turns them back.
    Float32 goes before TF32 where both are asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = {"ieee": 0, "tf32": 0}
        self._before: tuple[Any, ...] = ()

    def enter(self, kind: str) -> None:
        cudnn: Any = torch.backends.cudnn
        with self._lock:
            if not any(self._inside.values()):
                old = _old_switch()
                self._before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.deterministic, old, _matmul()
            self._inside[kind] += 1
            self._turn()

    def leave(self, kind: str) -> None:
        cudnn: Any = torch.backends.cudnn
        with self._lock:
            self._inside[kind] -= 1
            if any(self._inside.values()):
                self._turn()
                return
            conv, rnn, cudnn.deterministic, allowed, products = self._before
            if allowed is not None:
                cudnn.allow_tf32 = allowed
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = conv, rnn
            if products is not None and products != _matmul():
                backends: Any = torch.backends
                torch.set_float32_matmul_precision(products[0])
                backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision = products[1:]

    def _turn(self) -> None:
        cudnn: Any = torch.backends.cudnn
        kind = "ieee" if self._inside["ieee"] else "tf32"
        if self._before[3] is not None:
            # All switches must agree, or a read of `cudnn.allow_tf32` meanwhile raises torch's error.
            cudnn.allow_tf32, cudnn.rnn.fp32_precision = kind == "tf32", kind
        cudnn.conv.fp32_precision = kind
        cudnn.deterministic = kind == "ieee" or self._before[2]
        if (products := _matmul()) is not None and (products[0] == "highest") != (kind == "ieee"):
            torch.set_float32_matmul_precision("highest" if kind == "ieee" else "high")


def _old_switch() -> bool | None:
    """`cudnn.allow_tf32`, None where torch will not say because the newer switches disagree."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


def _matmul() -> tuple[str, str, str] | None:
    """How matrix products multiply float32: the switch of all devices, and those of CUDA and oneDNN that it sets too;
    None where torch will not say, as above: they are left alone then."""
    backends: Any = torch.backends
    try:
        every = torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
    return every, backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision


_switches = _Switches()


@contextlib.contextmanager
def float32_as(kind: str, device: torch.device) -> Iterator[None]:
    """Inside, convolutions and matrix products on a GPU take float32 operands as they are ("ieee"), by algorithms of
    cuDNN that give the same bits in every call; or round them to TF32 ("tf32").

    For the whole process while any thread is inside: torch has no such switch per thread.
    """
    if device.type != "cuda":
        yield
        return
    _switches.enter(kind)
    try:
        yield
    finally:
        _switches.leave(kind)


def exact_cudnn(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """`float32_as("ieee")`: what plans run in."""
    return float32_as("ieee", device)
