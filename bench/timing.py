"""Interleaved timing and the machine's measured copy bandwidth, on CPU and CUDA."""

from __future__ import annotations

import functools
import platform
import re
import statistics
import time
from collections.abc import Callable

import torch

COPY_BYTES = 1 << 28
# Small kernels are timed in batches that last about this long, so that the clock's own cost vanishes.
BATCH_SECONDS = 2e-3


def device_name(device: str) -> str:
    """The device in words: the GPU's name, or the CPU's with torch's thread count."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def device_slug(device: str) -> str:
    """A folder name for the device's results."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _seconds(run: Callable[[], object], repeats: int, device: str) -> float:
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def interleaved(contenders: dict[str, Callable[[], object]], device: str, rounds: int = 21) -> dict[str, float]:
    """Median seconds a call of each contender, taken in turn (A B C A B C …) so that drift meets all alike."""
    repeats = {}
    for name, run in contenders.items():
        run()
        repeats[name] = max(1, round(BATCH_SECONDS / max(_seconds(run, 1, device), 1e-9)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(_seconds(run, repeats[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large device copy, read and written bytes both counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, device, rounds=11)["copy"]
    return 2 * COPY_BYTES / seconds
