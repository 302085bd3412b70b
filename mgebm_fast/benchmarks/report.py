"""The rows of a table: as a dataclass, a CSV file, and a table on the terminal."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import tables
from ..files import write_bytes

if TYPE_CHECKING:
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender in one case. Times are milliseconds a `unit`: a Langevin step of every grid, or an update."""

    table: str
    case: str
    contender: str
    precision: str
    status: str  # "ok", or why there is no figure
    unit: str = "step"
    ms: float | None = None  # median of the rounds
    low_ms: float | None = None  # first quartile
    high_ms: float | None = None  # third quartile
    rounds: int = 0
    vs_plain_loop: float | None = None  # how many times faster than plain_loop
    vs_seed_loop: float | None = None
    gflops: float | None = None  # GFLOP/s of the convolutions, from work.macs_inside
    ceiling_gflops: float | None = None  # measured matrix rate of this precision
    percent_of_ceiling: float | None = None
    gradient_error: float | None = None  # relative L2 to float64
    gpu_busy_percent: float | None = None
    norm: str = ""
    batch: int = 0
    langevin_steps: str = ""
    explain: str = ""
    device: str = ""
    torch: str = ""
    mgebm_fast: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """All rows as CSV, the file whole or not at all."""
    names = [field.name for field in dataclasses.fields(Row)]
    shortened = ({name: _short(value) for name, value in dataclasses.asdict(row).items()} for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_bytes(path, tables.csv_text(names, shortened).encode())


def read_csv(path: Path) -> list[Row]:
    """The rows that `write_csv` wrote."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(Row)}

    def value(name: str, text: str) -> Any:
        if kinds[name] == "int":
            return int(text)
        return (float(text) if text else None) if kinds[name].startswith("float") else text

    with path.open(newline="") as file:
        return [Row(**{name: value(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def console_table(rows: Sequence[Row]) -> Table:
    """The rows of one case, for rich."""
    first = rows[0]
    title = f"{first.case}: batch {first.batch}, norm {first.norm}, {first.langevin_steps} Langevin steps"
    headings = ("", "", f"ms a {first.unit}", "spread", "vs plain", "vs seed", "GFLOP/s", "% peak", "∇ off")
    cells = [_measured(row) if row.ok else _unmeasured(row) for row in rows]
    look: dict[str, Any] = {"title_style": "bold", "box": None, "pad_edge": False}
    return tables.console_table(title, headings, cells, no_wrap=range(len(headings)), **look)


def _measured(row: Row) -> list[str]:
    return [
        row.contender, row.precision, _time(row.ms), _spread(row), _times(row.vs_plain_loop), _times(row.vs_seed_loop),
        f"{row.gflops:.0f}", _percent(row.percent_of_ceiling), f"{row.gradient_error:.1e}",
        "bold" if row.contender.startswith("mgebm") else "",
    ]  # fmt: skip


def _unmeasured(row: Row) -> list[str]:
    off = "" if row.gradient_error is None else f"{row.gradient_error:.1e}"
    status = "failed" if row.status.startswith("failed") else "–"
    return [row.contender, row.precision, status, *[""] * 5, off, "dim"]


def _time(ms: float | None) -> str:
    return "" if ms is None else f"{ms:.4g}" if ms < 1000 else f"{ms:.0f}"


def _spread(row: Row) -> str:
    """Half the distance of the quartiles, in percent of the median."""
    if not row.ms or row.low_ms is None or row.high_ms is None:
        return ""
    return f"±{50 * (row.high_ms - row.low_ms) / row.ms:.1f} %"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
