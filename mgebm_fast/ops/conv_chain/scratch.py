"""CPU buffers that outlive their user, for the next one: fresh pages cost as much as a step of a chain does."""

from __future__ import annotations

import bisect
import threading

import torch
from torch import Tensor

_KEPT_BYTES = 256 << 20
ALIGN = 64
_kept: list[Tensor] = []  # from the smallest on
# Reentrant: a collection may run `__del__` wherever the lock is held.
_lock = threading.RLock()


class Scratch:
    """`nbytes` bytes at `address`, aligned to 64; uninitialised. Given back when it is collected."""

    def __init__(self, nbytes: int) -> None:
        self._asked = nbytes
        self._buffer = _take(nbytes + ALIGN)
        self.nbytes = self._buffer.numel() - ALIGN
        self.address = -(-self._buffer.data_ptr() // ALIGN) * ALIGN

    def floats(self) -> Tensor:
        """Its memory, as many bytes as were asked for, as float32; for as long as it is held."""
        start = self.address - self._buffer.data_ptr()
        return self._buffer[start : start + self._asked].view(torch.float32)

    def __del__(self) -> None:
        buffer = getattr(self, "_buffer", None)
        if buffer is None or _lock is None:  # at exit the module may be gone before its buffers' users
            return
        with _lock:
            if sum(map(Tensor.numel, _kept)) + buffer.numel() <= _KEPT_BYTES:
                bisect.insort(_kept, buffer, key=Tensor.numel)


def _take(nbytes: int) -> Tensor:
    """The smallest kept buffer that is large enough, and not four times that; else a new one."""
    with _lock:
        at = bisect.bisect_left(_kept, nbytes, key=Tensor.numel)
        if at < len(_kept) and _kept[at].numel() <= 4 * nbytes:
            return _kept.pop(at)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
