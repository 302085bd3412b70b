"""Runs a case: gate, interleaved timing, rows. What fails is a row that says why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from .. import __version__
from ..checks import one_of
from .busy import gpu_busy_percent
from .cases import Case
from .chains import ChainBench, PeerBench
from .contenders import BASELINE, CONTENDERS, PEERS, QUICK, Contender
from .gate import WrongGradientError
from .loops import CompiledLoop
from .report import Row
from .timing import Run, Timing, device_name, matrix_rate, measure

Tell = Callable[[str], object]


def choose(names: Sequence[str] = (), *, full: bool = False, table: str = "") -> list[Contender]:
    """The contenders of these names and plain_loop; else those that need no compiler and no other package, or all.

    Of the table "peers" the other packages beside this one and plain_loop.
    """
    for name in names:
        one_of(name, CONTENDERS, "contender", "bench")
    usual = PEERS if table == "peers" else CONTENDERS if full else QUICK
    wanted = {*names, BASELINE} if names else set(usual)
    return [contender for name, contender in CONTENDERS.items() if name in wanted]


def run_case(
    case: Case,
    *,
    device: str = "cpu",
    contenders: Sequence[Contender] | None = None,
    rounds: int = 5,
    seconds: float = 20.0,
    least: int = 3,
    tell: Tell = lambda text: None,
) -> list[Row]:
    """One row a contender. `seconds` bounds the timing, after `least` rounds; `tell` hears what is being done.

    A contender whose gradient is wrong, whose package is missing or that runs out of memory has a row without figures.
    """
    contenders = choose(table=case.table) if contenders is None else contenders
    tell(f"{case.name}: gradients in float64")
    CompiledLoop.forget()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    if case.table == "training":
        from .training import TrainingBench

        bench: ChainBench | TrainingBench = TrainingBench(case, device)
    else:
        bench = (PeerBench if case.table == "peers" else ChainBench)(case, device)
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    common = _common(case, bench, device)
    for contender in contenders:
        if case.table == "training" and not contender.ours and contender.plain is None:
            continue
        tell(f"{case.name}: checking {contender.name}")
        row = Row(case.table, case.name, contender.name, contender.precision, "ok", **common)
        try:
            runs[contender.name], precision, error, explained = bench.prepare(contender)
            row = dataclasses.replace(row, precision=precision, gradient_error=error, explain=explained)
        except WrongGradientError as error:
            row = dataclasses.replace(
                row, precision=error.precision, gradient_error=error.error, status=f"failed: {error}"
            )
        except Exception as error:
            row = dataclasses.replace(row, status=_why(error, contender))
        rows[contender.name] = row

    def failed(name: str, error: Exception) -> None:
        rows[name] = dataclasses.replace(rows[name], status=_why(error, CONTENDERS[name]))

    wall = frozenset(contender.name for contender in contenders if contender.wall)
    timings = measure(
        runs, device, rounds=rounds, seconds=seconds, least=least, wall=wall, failed=failed,
        before=lambda name: tell(f"{case.name}: timing {name}"),
    )  # fmt: skip
    busy: dict[str, float] = {}
    if device.startswith("cuda") and case.table == "training":
        busy = {name: gpu_busy_percent(runs[name], timings[name].median) for name in timings}
    per_unit = {name: _scaled(timing, 1e3 / bench.units) for name, timing in timings.items()}
    return [
        _with_figures(row, per_unit, bench.flops, device, busy.get(name)) if row.ok else row
        for name, row in rows.items()
    ]


def _common(case: Case, bench, device: str) -> dict:
    chains = case.table != "training"
    steps = [case.steps] if chains else [chain.steps for chain in bench.dynamics]
    return {
        "unit": "step" if chains else "update",
        "norm": case.norm if chains else bench.config.norm,
        "batch": case.batch,
        "langevin_steps": ", ".join(map(str, steps if len(set(steps)) > 1 else steps[:1])),
        "device": device_name(device),
        "torch": torch.__version__,
        "mgebm_fast": __version__,
    }


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(timing.median * factor, timing.low * factor, timing.high * factor, timing.rounds)


def _with_figures(row: Row, ms: dict[str, Timing], flops: float, device: str, busy: float | None) -> Row:
    mine = ms[row.contender]
    rate, ceiling = flops / mine.median / 1e6, matrix_rate(device, row.precision) / 1e9

    def ratio(name: str) -> float | None:
        return ms[name].median / mine.median if name in ms else None

    return dataclasses.replace(
        row, ms=mine.median, low_ms=mine.low, high_ms=mine.high, rounds=mine.rounds, vs_plain_loop=ratio(BASELINE),
        vs_seed_loop=ratio("seed_loop"), gflops=rate, ceiling_gflops=ceiling, percent_of_ceiling=100 * rate / ceiling,
        gpu_busy_percent=busy,
    )  # fmt: skip


def _why(error: Exception, contender: Contender) -> str:
    if isinstance(error, ModuleNotFoundError):
        from .peers import PACKAGES

        name = (error.name or "").partition(".")[0]
        return f"not measured: pip install {PACKAGES.get(name, name)}"
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return f"failed: {type(error).__name__}: {text}"
