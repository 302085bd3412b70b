"""The tables that end a run of the benches, and their CSV.

A bench of an op checks its result against the reference first, then calls `report`; a bench of a whole chain or of a
training iteration calls `whole`, which does both. `--csv FILE` keeps the rows of the ops; `mgebm bench --csv DIR` keeps
those of chains and training. `--tiny` shows that chains and training run, at sizes whose figures mean nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mgebm_fast import native
from mgebm_fast.benchmarks import Row, console_table, run_case
from mgebm_fast.benchmarks.timing import copy_bandwidth, device_name, measure
from mgebm_fast.tables import csv_text

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
ROWS: list[dict] = []
SECONDS = 20.0  # of the rounds of a case, once there are five; so long an op has one round of pytest-benchmark's beside
LONG = 0.2
WHOLE: list[list[Row]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--csv", default=None, help="write the rows of the ops' table to this CSV file")
    parser.addoption("--tiny", action="store_true", help="whole chains and training at sizes that mean nothing")


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def report(request, benchmark, device):
    """report(op, case, moved, ours, **baselines): interleaved medians; `moved` is the op's bytes model; `steps`: of a
    chain, which are made in one call."""

    def run(op: str, case: str, moved: int, ours, *, steps: int = 1, **baselines) -> None:
        timings = measure({"ours": ours, **baselines}, device, seconds=SECONDS, least=5)
        seconds = {name: timing.median for name, timing in timings.items()}

        def once():
            ours()
            if device == "cuda":
                torch.cuda.synchronize()

        short = seconds["ours"] < LONG
        benchmark.pedantic(once, rounds=5 if short else 1, warmup_rounds=int(short))
        rate = moved / seconds["ours"]
        row = {
            "op": op,
            "case": case,
            "device": device_name(device),
            "ours_us": round(seconds["ours"] * 1e6, 2),
            "bytes": moved,
            "gb_per_s": round(rate / 1e9, 2),
            "percent_of_copy": round(100 * rate / copy_bandwidth(device), 1),
            "steps": steps,
            "rounds": timings["ours"].rounds,
            "torch": torch.__version__,
        }
        benchmark.extra_info.update(row)
        for name in baselines:
            ROWS.append({**row, "baseline": name, "baseline_us": round(seconds[name] * 1e6, 2),
                         "ratio": round(seconds[name] / seconds["ours"], 2)})  # fmt: skip
        if path := request.config.getoption("--csv"):  # at once: a run that is cut leaves what it has
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(csv_text(list(ROWS[0]), ROWS), encoding="utf-8", newline="")

    return run


@pytest.fixture
def whole(request, device):
    """whole(case): every contender of a chain or a training iteration; it fails where this package's gradient does."""

    def run(case) -> None:
        tiny = request.config.getoption("--tiny")
        rows = run_case(case.tiny() if tiny else case, device=device)
        WHOLE.append(rows)
        wrong = [f"{row.contender}: {row.status}" for row in rows if row.contender.startswith("mgebm") and not row.ok]
        assert not wrong, "; ".join(wrong)

    return run


def _libraries() -> list[str]:
    """What torch's own loop runs by: its kernels, and what the environment allows its library of convolutions."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    return [f"torch by {torch.backends.cpu.get_cpu_capability()}", *([f"oneDNN up to {limit}"] if limit else [])]


def _table(chains: list[dict]) -> str:
    """Chains as Markdown, for docs/benchmarks.md; a case is "energy on x"."""
    lines = ["| energy | x | plain loop, fp32 | mgebm, fp32 | mgebm, auto | auto against plain | rounds | ISA |"]
    lines.append("|---|---|" + "---:|" * 5 + "---|")
    for row in chains:
        energy, _, shape = row["case"].rpartition(" on ")
        auto = [r for r in ROWS if r["case"] == row["case"] and r["baseline"] == "auto"]
        ours, plain = row["ours_us"], row["baseline_us"]
        times = [plain, ours, auto[0]["baseline_us"] if auto else ours]
        cells = [energy, shape, *(f"{us / 1e3 / row['steps']:.3g}" for us in times), f"{plain / times[2]:.2f}×"]
        lines.append(f"| {' | '.join(cells)} | {row['rounds']} | {native.isa()} |")
    return "\n".join(lines)


def pytest_terminal_summary(terminalreporter, config) -> None:
    for rows in WHOLE:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(console_table(rows))
        terminalreporter.write_line("\n" + capture.get())
    if not ROWS:
        return
    terminalreporter.section("ops: medians of interleaved runs, results checked first")
    for device in DEVICES:
        rows = [row for row in ROWS if row["device"] == device_name(device)]
        if rows:
            terminalreporter.write_line(f"{device_name(device)}: copy {copy_bandwidth(device) / 1e9:.1f} GB/s")
        for row in rows:
            terminalreporter.write_line(
                f"  {row['op']:15} {row['case']:42} {row['ours_us']:10.1f} us  {row['gb_per_s']:8.2f} GB/s "
                f"({row['percent_of_copy']:5.1f} % of copy)  {row['ratio']:6.2f}x {row['baseline']}, "
                f"{row['rounds']} rounds"
            )
    if chains := [row for row in ROWS if row["steps"] > 1 and row["baseline"] == "plain_loop"]:
        terminalreporter.write_line(f"\nms a step, medians; ours by {native.isa()}, {', '.join(_libraries())}\n")
        terminalreporter.write_line(_table(chains))
    if path := config.getoption("--csv"):
        terminalreporter.write_line(f"wrote {path}")
