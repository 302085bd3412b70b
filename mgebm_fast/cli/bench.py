"""`mgebm bench`: how fast this machine runs the chains, against the loops that people write."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..checks import one_of
from .options import Device, Json, Threads, find_device, use_threads

if TYPE_CHECKING:
    from ..benchmarks.cases import Case
    from ..benchmarks.contenders import Contender
    from ..benchmarks.report import Row

_LOG_WIDTH = 100
_EMULATED = 8.0  # times slower than float32: 16 bits are emulated
_TABLES = ("chains", "training", "peers", "ops")


def bench(
    tables: Annotated[
        list[str] | None,
        typer.Argument(metavar="[chains] [training] [peers] [ops]", help="Default: chains; --full: all."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All cases, contenders and tables, and more rounds; leave it alone for long.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="CASE", help="Measure this case; may be repeated.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="NAME", help="Measure this contender, beside plain_loop; may be repeated."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="DIR", help="Write DIR/chains.csv, ..., one a table.")] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw chains.svg, ..., one a table, in the folder of --csv, else here.")
    ] = False,
    json: Json = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Small nets and two steps: shows that it runs, the figures mean nothing.")
    ] = False,
    list_all: Annotated[bool, typer.Option("--list", help="List cases and contenders, measure nothing.")] = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure this machine: whole chains, training iterations, or single ops, against what people write by hand.

    \b
    Examples:
      mgebm bench                              chains, the quick way: a minute or two on two cores
      mgebm bench training                     whole training iterations
      mgebm bench peers                        a residual net and a toy, beside TorchEBM, ebmkit and posteriors
      mgebm bench --only cascade --against compile_bf16
      mgebm bench --full --csv results --plot  everything, with CSV files and pictures
      mgebm bench --list

    \b
    How to read a table:
      ms a step   median of interleaved rounds; spread: half the distance of their quartiles
      vs plain    times as fast as plain_loop: autograd.grad, frozen weights, float32
      vs seed     times as fast as seed_loop: backward() with live weights and retain_graph
      % peak      of the matrix rate measured here in the same precision
      ∇ off       relative distance of the gradient from float64, checked before anything is timed

    A contender with a wrong gradient, or whose package is missing, gets no figure and a line that says why. Without
    --full, chains of the larger nets take 4 steps for 10, and timing ends after 8 seconds a case or one round. Leave
    the machine alone while it measures. docs/benchmarks.md says what each contender is.
    """
    import json as json_module

    named = list(dict.fromkeys(tables or (_TABLES if full else ("chains",))))
    for name in named:
        one_of(name, _TABLES, "table", "bench")
    use_threads(threads)
    from ..benchmarks import picture
    from ..benchmarks.cases import cases
    from ..benchmarks.run import choose

    place = str(find_device(device))
    if only and tables is None:
        named = ["chains", "training", "peers"]
    chosen = cases([name for name in named if name != "ops"], device=place, only=only or (), full=full, tiny=tiny)
    wanted = {case.table: choose(against or (), full=full, table=case.table) for case in chosen}
    if list_all:
        _list(cases(device=place, full=True), json)
        return
    if plot and (reason := picture.why_not()):
        raise ValueError(f"--plot: {reason}")
    with_ops = _wants_ops(named, tables, only, tiny)
    pictures = (csv or Path()) if plot else None
    rows, peak = _measure(chosen, wanted, place, full=full, csv=csv, pictures=pictures, quiet=json, tiny=tiny)
    ops = _ops(csv, pictures, json) if with_ops else []
    if json:
        result = {"ceilings": peak, "rows": [dataclasses.asdict(row) for row in rows], "ops": ops}
        typer.echo(json_module.dumps(result, ensure_ascii=False))


def _wants_ops(named: list[str], tables: list[str] | None, only: list[str] | None, tiny: bool) -> bool:
    """Whether the ops are measured; ValueError where they were asked for by name and cannot be."""
    from ..benchmarks.ops import why_not

    if "ops" not in named or only or tiny:
        return False
    reason = why_not()
    if reason and tables:
        raise ValueError(f"bench ops: {reason}")
    if reason:
        typer.echo(f"ops: not measured: {reason}", err=True)
    return not reason


def _measure(
    chosen: list[Case], wanted: dict[str, list[Contender]], device: str, *, full: bool, csv: Path | None,
    pictures: Path | None, quiet: bool, tiny: bool,
) -> tuple[list[Row], dict[str, float]]:  # fmt: skip
    """The rows of all cases, shown and stored as they come, and the machine's measured ceilings."""
    if not chosen:
        return [], {}
    import torch
    from rich.console import Console

    from .. import __version__
    from ..benchmarks import picture
    from ..benchmarks.report import console_table, write_csv
    from ..benchmarks.run import choose, run_case
    from ..benchmarks.timing import ceilings, device_name

    with _Progress(len(chosen) + 1) as progress:
        progress.tell("what this machine can do at best")
        peak = {} if tiny else ceilings(device)
        progress.advance()
    out = Console()
    if not out.is_terminal:
        out = Console(width=_LOG_WIDTH)
    if not quiet:
        rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peak.items() if name != "copy")
        best = f"; at best {rates}; copy {peak['copy'] / 1e9:,.1f} GB/s" if peak else ""
        versions = f"mgebm_fast {__version__}, torch {torch.__version__}"
        out.print(f"{device_name(device)}; {versions}{best}\n", highlight=False, soft_wrap=True)
    left_out: list[str] = []
    if peak.get("bf16", math.inf) < peak.get("fp32", 0.0) / _EMULATED and choose() in wanted.values():
        left_out = [contender.name for contender in choose() if contender.precision == "bf16"]
        typer.echo(
            f"{', '.join(left_out)}: left out, this CPU has no arithmetic of 16 bits and takes minutes for a chain; "
            f"--against {left_out[0]} measures it",
            err=True,
        )
    rows: list[Row] = []
    rounds, seconds, least = (3, 5.0, 3) if tiny else (11, 180.0, 3) if full else (5, 8.0, 1)
    for done, case in enumerate(chosen, start=1):
        with _Progress(len(chosen) + 1, done) as progress:
            measured = run_case(
                case, device=device, rounds=rounds, seconds=seconds, least=least, tell=progress.tell,
                contenders=[contender for contender in wanted[case.table] if contender.name not in left_out],
            )  # fmt: skip
        rows += measured
        if not quiet:
            out.print(console_table(measured))
            for row in measured:
                if note := _note(row):
                    out.print(f"  {row.contender}: {note}", style="dim", highlight=False, markup=False, soft_wrap=True)
            out.print()
        # After every case: a run that is cut short keeps what it found.
        table = [row for row in rows if row.table == case.table]
        if csv is not None:
            write_csv(csv / f"{case.table}.csv", table)
        if pictures is not None and any(row.ok for row in table):
            picture.draw(table, pictures / f"{case.table}.svg")
    return rows, peak


def _note(row: Row) -> str:
    """What a table has no column for: why there is no figure, which plan ran, which version of a package."""
    if not row.ok:
        return row.status
    from ..benchmarks.contenders import CONTENDERS

    busy = "" if row.gpu_busy_percent is None else f"GPU busy {row.gpu_busy_percent:.0f} %; "
    return busy + (_plan(row.explain) or (row.explain if CONTENDERS[row.contender].package else ""))


def _plan(explained: str) -> str:
    return explained.partition("gradient: ")[2].partition("\n")[0]


def _ops(csv: Path | None, pictures: Path | None, quiet: bool) -> list[dict[str, Any]]:
    import sys

    from ..benchmarks.ops import run_ops
    from ..benchmarks.picture import draw_ops

    rows = run_ops(sys.stderr if quiet else None)
    if csv is not None:
        import csv as csv_module

        csv.mkdir(parents=True, exist_ok=True)
        with (csv / "ops.csv").open("w", newline="") as file:
            writer = csv_module.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if pictures is not None:
        draw_ops(rows, pictures / "ops.svg")
    return rows


def _list(found: list[Case], json: bool) -> None:
    import json as json_module

    from ..benchmarks.contenders import CONTENDERS

    if json:
        listed = {
            "cases": [dataclasses.asdict(case) for case in found],
            "contenders": [{"name": c.name, "what": c.what, "on_demand": c.slow} for c in CONTENDERS.values()],
        }
        typer.echo(json_module.dumps(listed, ensure_ascii=False))
        return
    for table in dict.fromkeys(case.table for case in found):
        typer.echo(f"{table}:")
        for case in found:
            if case.table == table:
                what = f"preset {case.preset}" if case.preset else f"norm {case.norm}, K = {case.steps}"
                typer.echo(f"  {case.name:14} batch {case.batch}, {what}{' (--full)' if case.full else ''}")
    typer.echo("contenders:")
    for contender in CONTENDERS.values():
        typer.echo(f"  {contender.name:14} {contender.what}{' (--against, --full)' if contender.slow else ''}")


class _Progress:
    """What is being done now: a bar over the cases on a terminal; in a log file a line where that changes, and where
    one thing takes long."""

    def __init__(self, total: int, done: int = 0) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from ..learning.run.progress import Lines

        console = Console(stderr=True)
        columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=done)
        self._lines = Lines(f"{done + 1}/{total}  ") if not console.is_terminal else None

    def tell(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        if self._lines is not None:
            self._lines.tell(text)

    def advance(self) -> None:
        self._bar.advance(self._task)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
