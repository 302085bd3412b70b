"""Interleaved timing, and the measured ceilings of a machine: copy bandwidth and matrix rates, on CPU and CUDA."""

from __future__ import annotations

import dataclasses
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
_LONG_PRODUCT = 4.0  # seconds
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of the rounds, and their quartiles as the spread."""

    median: float
    low: float
    high: float
    rounds: int


def device_name(device: str) -> str:
    """The device in words: the GPU's name, or the CPU's with torch's thread count."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
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


def seconds_of(run: Run, repeats: int, device: str, *, wall: bool = False) -> float:
    """Seconds a call of `repeats` calls, by device events on CUDA; `wall`: by the host's clock between two
    synchronisations, for work that torch's streams do not see."""
    on_gpu = device.startswith("cuda")
    if on_gpu and not wall:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def measure(
    contenders: dict[str, Run],
    device: str,
    *,
    rounds: int = 21,
    seconds: float = float("inf"),
    least: int = 3,
    wall: frozenset[str] = frozenset(),
    failed: Callable[[str, Exception], object] | None = None,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, Timing]:
    """Times every contender in turn (A B C A B C …), so that a drift of the machine's speed affects all alike.

    Rounds end early, after `least`, once `seconds` have passed. Names in `wall` are timed by the host's clock. A call
    that is long enough by itself is timed right after the warm-up, and is the first round. A contender that raises
    while it warms up is left out and reported to `failed`, where that is given; `before` gets the name to be timed.
    """
    repeats: dict[str, int] = {}
    times: dict[str, list[float]] = {}
    for name, run in contenders.items():
        before(name)
        try:
            run()
            once = seconds_of(run, 1, device, wall=name in wall)
        except Exception as error:
            if failed is None:
                raise
            failed(name, error)
            continue
        repeats[name] = max(1, round(BATCH_SECONDS / max(once, 1e-9)))
        times[name] = [once] if repeats[name] == 1 else []
    began = time.perf_counter()
    for done in range(rounds):
        if done >= least and time.perf_counter() - began > seconds:
            break
        for name, count in repeats.items():
            if len(times[name]) > done:
                continue
            before(name)
            times[name].append(seconds_of(contenders[name], count, device, wall=name in wall))
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0], len(values))
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def interleaved(
    contenders: dict[str, Run], device: str, rounds: int = 21, *, seconds: float = float("inf"), least: int = 5
) -> dict[str, float]:
    """Median seconds a call of each contender, as `measure` takes them."""
    timings = measure(contenders, device, rounds=rounds, seconds=seconds, least=least)
    return {name: timing.median for name, timing in timings.items()}


@functools.cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large device copy, read and written bytes both counted."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = interleaved({"copy": lambda: target.copy_(source)}, device, rounds=11)["copy"]
    return 2 * COPY_BYTES / seconds


@functools.cache
def matrix_rate(device: str, precision: str, size: int | None = None) -> float:
    """FLOP a second of a large square matrix product: precision "fp32", "tf32" (CUDA), "bf16" or "fp16".

    The faster of `torch.mm` and the same product as a 1×1 convolution: on some CPUs the library behind `mm` is the
    slower one, and convolutions must not exceed the ceiling.
    """
    kind = device.partition(":")[0]
    size = MATRIX_SIZE[kind] if size is None else size
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        if kind == "cpu" and dtype != torch.float32:
            # A 16-bit type that the CPU only emulates takes half a minute a large product: measured on a small one.
            probe = torch.randn(size // 8, size // 8).to(dtype)
            seconds = measure({"mm": lambda: torch.mm(probe, probe)}, device, rounds=1)["mm"].median
            size = size // 8 if seconds * 8**3 > _LONG_PRODUCT else size
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        pixels = a.T.reshape(1, size, size, 1).contiguous(memory_format=torch.channels_last)
        weight = b.T.reshape(size, size, 1, 1)
        contenders: dict[str, Run] = {
            "mm": lambda: torch.mm(a, b),
            "conv": lambda: torch.nn.functional.conv2d(pixels, weight),
        }
        with torch.no_grad():
            timings = measure(contenders, device, rounds=7, seconds=2.0, failed=lambda name, error: None)
            best = min(timing.median for timing in timings.values())
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
    return 2 * size**3 / best


def ceilings(device: str) -> dict[str, float]:
    """What this machine was measured to do at best: matrix FLOP a second by precision, and copied bytes a second."""
    precisions = ("fp32", "tf32", "bf16", "fp16") if device.startswith("cuda") else ("fp32", "bf16")
    rates = {precision: matrix_rate(device, precision) for precision in precisions}
    return {**rates, "copy": copy_bandwidth(device)}
