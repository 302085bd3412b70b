"""Lanes: graphs that never run at the same time, on one device, with the memory pool and the stream that they share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch


class Lane:
    """What graphs that never run at the same time share: a memory pool, and who uses it now."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._pool: Any = None
        self._side: Any = None  # the stream of its captures: graphs share a pool's memory on one stream alone
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()
        self.last: Any = None  # event after the last replay: the next may come from another stream

    def record(self, body: Callable[[], None], device: torch.device) -> Callable[[], None]:
        """Run `body` once to warm libraries up, capture it, and return what replays it."""
        with torch.cuda.device(device):
            if not self._graphs:  # a pool is freed with its last graph
                self._pool = torch.cuda.graph_pool_handle()
            self._side = self._side or torch.cuda.Stream(device)
            side, current = self._side, torch.cuda.current_stream(device)
            side.wait_stream(current)
            with torch.cuda.stream(side):
                body()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                # torch's own stream for captures is of whichever device was captured on first: one of this device is
                # given. Other threads (a loader that pins memory) may go on calling CUDA meanwhile.
                with torch.cuda.graph(graph, pool=self._pool, stream=side, capture_error_mode="thread_local"):
                    body()
            finally:
                torch.cuda.set_stream(current)  # torch does not restore the stream when a capture fails
            self._graphs.add(graph)
        return graph.replay

    def before(self, device: torch.device) -> None:
        if self.last is not None:
            torch.cuda.current_stream(device).wait_event(self.last)

    def after(self, device: torch.device) -> None:
        if device.type == "cuda":
            self.last = torch.cuda.current_stream(device).record_event()
