"""The tables that end a run of the benches, and their CSV.

A bench of an op checks its result against the reference first, then calls `report`; a bench of a whole chain or of a
training iteration calls `whole`, which does both. `--csv FILE` keeps the rows of the ops; `mgebm bench --csv DIR` keeps
those of chains and training. `--tiny` shows that chains and training run, at sizes whose figures mean nothing.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from mgebm_fast.benchmarks import Row, console_table, run_case
from mgebm_fast.benchmarks.timing import copy_bandwidth, device_name, interleaved
from mgebm_fast.tables import csv_text

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
ROWS: list[dict] = []
WHOLE: list[list[Row]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--csv", default=None, help="write the rows of the ops' table to this CSV file")
    parser.addoption("--tiny", action="store_true", help="whole chains and training at sizes that mean nothing")


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def report(request, benchmark, device):
    """report(op, case, moved, ours, **baselines): interleaved medians; `moved` is the op's bytes model."""

    def run(op: str, case: str, moved: int, ours, **baselines) -> None:
        seconds = interleaved({"ours": ours, **baselines}, device)

        def once():
            ours()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(once, rounds=5, warmup_rounds=1)
        rate = moved / seconds["ours"]
        row = {
            "op": op,
            "case": case,
            "device": device_name(device),
            "ours_us": round(seconds["ours"] * 1e6, 2),
            "bytes": moved,
            "gb_per_s": round(rate / 1e9, 2),
            "percent_of_copy": round(100 * rate / copy_bandwidth(device), 1),
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
                f"({row['percent_of_copy']:5.1f} % of copy)  {row['ratio']:6.2f}x {row['baseline']}"
            )
    if path := config.getoption("--csv"):
        terminalreporter.write_line(f"wrote {path}")
