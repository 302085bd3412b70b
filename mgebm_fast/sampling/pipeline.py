"""Groups of a sample side by side: while one group is at a fine grid the next is at the coarser ones, each grid with a
stream of its own. The chains are those of one group after the other, from the same graphs, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import BackendError
from . import graphs

Groups = TypeVar("Groups")


class Pipeline:
    """Streams, one a grid. A grid's chain begins when the grid before it is done with the same group."""

    def __init__(self, device: torch.device, grids: int) -> None:
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(grids)] if device.type == "cuda" else []
        self._kept: list[Any] = []  # tensors still in use on a side stream; dropped once it is joined

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Afterwards the caller's stream has waited for all work of the pipeline."""
        try:
            yield
        finally:
            for stream in self._streams:
                torch.cuda.current_stream(self._device).wait_stream(stream)
            self._kept.clear()

    @contextlib.contextmanager
    def on(self, grid: int, *inputs: Any) -> Iterator[None]:
        """Inside, work is that of `grid`, after what the grid before it (the caller, for the first) has been given."""
        self._kept.append(inputs)
        if not self._streams:
            yield
            return
        stream = self._streams[grid - 1]
        stream.wait_stream(self._streams[grid - 2] if grid > 1 else torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield


def piped(
    draw: Callable[[graphs.Graph], Groups], device: torch.device, grids: int, graph: bool | None, callback: Any = None
) -> Groups:
    """What `draw` returns for cascades in a pipeline; drawn again without one where a chain was not healthy, so that
    an overflow or a divergence is handled, and its grid named, where it happens."""
    if device.type not in graphs.DEVICES:
        raise BackendError(f"sample: pipeline=True needs a CUDA device, the model is on {device.type}")
    if callback is not None:
        raise ValueError("sample: pipeline=True runs chains whole, and leaves no steps to report to the callback")
    pipeline, healthy = Pipeline(device, grids), list[Tensor]()
    with pipeline.joined():
        groups = draw(graphs.Session(graph, healthy, on=pipeline.on))
    if healthy and not bool(torch.stack(healthy).all()):
        return draw(graph)
    return groups
