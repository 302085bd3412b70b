"""cuDNN's switches while a plan runs: float32 that is float32, and the same bits in every call."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class _ExactCudnn:
    """cuDNN's switches, which are the process's: the first chain in turns them, the last one out turns them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: tuple[Any, ...] = ()

    def enter(self) -> None:
        cudnn: Any = torch.backends.cudnn
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            self._before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.deterministic, _old_switch()
            if self._before[-1] is not None:
                # All switches must agree, or a read of `cudnn.allow_tf32` meanwhile raises torch's error.
                cudnn.allow_tf32, cudnn.rnn.fp32_precision = False, "ieee"
            cudnn.conv.fp32_precision, cudnn.deterministic = "ieee", True

    def leave(self) -> None:
        cudnn: Any = torch.backends.cudnn
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            conv, rnn, cudnn.deterministic, allowed = self._before
            if allowed is not None:
                cudnn.allow_tf32 = allowed
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = conv, rnn


def _old_switch() -> bool | None:
    """`cudnn.allow_tf32`, None where torch will not say because the newer switches disagree."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return None


_exact = _ExactCudnn()


@contextlib.contextmanager
def exact_cudnn(device: torch.device) -> Iterator[None]:
    """cuDNN's float32 as float32, not TF32, and with algorithms that give the same bits in every call.

    For the whole process while any thread is inside: torch has no such switch per thread.
    """
    if device.type != "cuda":
        yield
        return
    _exact.enter()
    try:
        yield
    finally:
        _exact.leave()
