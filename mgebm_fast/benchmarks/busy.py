"""How busy a GPU is: the time in which some kernel or copy runs, over the time of the whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .timing import Run


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end) intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def gpu_busy_percent(run: Run, seconds: float) -> float:
    """Percent of `seconds`, the time of one call measured without the profiler, that the GPU works in a call.

    The profiler sees every kernel, also those inside CUDA graphs, but slows the host: so kernel times come from it and
    the time of the whole call does not. At most 100.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return min(100.0, 100.0 * covered(spans) / 1e6 / seconds)
