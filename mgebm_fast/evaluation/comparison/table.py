"""The table of a comparison: means and spreads over seeds, as CSV, Markdown and for a terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...tables import console_table, csv_text, number
from ...tables import markdown as markdown_table

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Column:
    """A figure of the table: its key, its title, how it is written, and what makes a value the best one."""

    key: str
    title: str
    form: str
    best: str = ""  # "low", "high", "real" (nearest to that of held-out images), or "" for none

    def loss(self, value: float, real: float | None) -> float | None:
        """The quantity that the best value minimises; None where no value counts as best."""
        if self.best == "real":
            return None if real is None else abs(value - real)
        return {"low": value, "high": -value}.get(self.best)


SAMPLES = (
    Column("kid", "KID", ".4f", "low"),
    Column("fid", "FID", ".3f", "low"),
    Column("fid_matched", "FID, matched", ".3f", "low"),
    Column("confident_share", "recognised", ".3f", "real"),
    Column("smallest_class_share", "smallest class", ".3f", "real"),
    Column("nearest_distance", "nearest", ".1f"),
)
INPAINTING = tuple(
    Column(f"{kind}_{key}", f"{kind} {title}", form, best)
    for kind in ("square", "doodle", "pepper")
    for key, title, form, best in (("error", "error", ".4f", "low"), ("psnr", "PSNR", ".2f", "high"))
)
COST = (
    Column("seconds_an_update", "s an update", ".4f"),
    Column("seconds", "s in all", ".0f"),
    Column("work", "work", ".3f"),
)
GROUPS = (("Samples", SAMPLES), ("In-painting", INPAINTING), ("Cost", COST))
COLUMNS = (*SAMPLES, *INPAINTING, *COST)
_BASELINES = {"Samples": "held-out images", "In-painting": "mean of the known pixels"}


def tabulate(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a preset, in the order they come: over its runs that have figures

        <key>       mean over seeds
        <key>_sd    standard deviation over seeds, n − 1 in the denominator; None for one seed
        <key>_best  whether it is best by more than the spread: its lead on every other row exceeds the root of the sum
                    of the squares of the two standard deviations, that of a difference of two runs

    `work` is relative to the first row; None where that made no update.
    """
    rows: list[dict[str, Any]] = []
    unit = records[0]["work"] if records else 1
    for preset in dict.fromkeys(record["preset"] for record in records):
        runs = [record for record in records if record["preset"] == preset]
        shares = [record["work"] / unit if unit else None for record in runs]
        good = [r["figures"] | {"work": share} for r, share in zip(runs, shares, strict=True) if "failed" not in r]
        row: dict[str, Any] = {"preset": preset, "method": runs[0]["method"], "updates": runs[0]["updates"]}
        row |= {"runs": len(good), "failed": len(runs) - len(good)}
        for column in COLUMNS:
            values = [figures[column.key] for figures in good if figures.get(column.key) is not None]
            whole = len(values) == len(good) > 0
            row[column.key] = statistics.fmean(values) if whole else None
            row[f"{column.key}_sd"] = statistics.stdev(values) if whole and len(values) > 1 else None
        rows.append(row)
    real = baselines(records)
    for column in COLUMNS:
        for row in rows:
            row[f"{column.key}_best"] = _leads(row, [other for other in rows if other is not row], column, real)
    return rows


def _leads(row: dict[str, Any], others: Iterable[dict[str, Any]], column: Column, real: dict[str, Any]) -> bool:
    def standing(of: dict[str, Any]) -> tuple[float, float] | None:
        value, spread = of[column.key], of[f"{column.key}_sd"]
        loss = None if value is None else column.loss(value, real.get(column.key))
        return None if loss is None or spread is None else (loss, spread)

    own = standing(row)
    theirs = [
        found for other in others if other[column.key] is not None and (found := standing(other) or (-math.inf, 0))
    ]
    if own is None or not theirs:
        return False
    return all(loss - own[0] > math.hypot(spread, own[1]) for loss, spread in theirs)


def baselines(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of held-out images, and of a fill by the mean, which all runs share."""
    return next((record["real"] for record in records if "real" in record), {})


def figures_csv(records: Sequence[dict[str, Any]]) -> str:
    """One row a run."""
    names = ["preset", "method", "seed", "updates", *(column.key for column in COLUMNS), "failed"]
    rows = [{**record, **record.get("figures", {})} for record in records]
    return csv_text(names, rows)


def table_csv(rows: Sequence[dict[str, Any]]) -> str:
    """One row a preset."""
    names = ["preset", "method", "updates", "runs", "failed"]
    names += [f"{column.key}{suffix}" for column in COLUMNS for suffix in ("", "_sd", "_best")]
    return csv_text(names, rows)


def cell(row: dict[str, Any], column: Column, emphasis: str = "") -> str:
    """mean ± standard deviation, between two `emphasis` where it is best."""
    value, spread = row[column.key], row[f"{column.key}_sd"]
    if value is None:
        return "–"
    text = format(value, column.form) + ("" if spread is None or column.key == "work" else f" ± {spread:{column.form}}")
    return f"{emphasis}{text}{emphasis}" if row[f"{column.key}_best"] else text


def _tables(
    rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, list[Column], Any]]:
    """(title, columns, cells of the baseline's row or None) of each table that has a figure."""
    real = baselines(records)
    for group, columns in GROUPS:
        shown = [column for column in columns if any(row[column.key] is not None for row in rows)]
        known = group in _BASELINES and any(real.get(column.key) is not None for column in shown)
        cells = [number(real.get(column.key), f"{{:{column.form}}}") for column in shown]
        if shown:
            yield group, shown, [_BASELINES[group], *cells] if known else None


def markdown(rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> str:
    """Three tables: samples, in-painting, cost."""
    parts = []
    for group, shown, baseline in _tables(rows, records):
        lines = [[f"`{row['preset']}`", *(cell(row, column, "**") for column in shown)] for row in rows]
        parts.append(markdown_table([group, *(c.title for c in shown)], lines + ([baseline] if baseline else [])))
    return "\n\n".join([*parts, *legend(rows, records)]) + "\n"


def legend(rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> list[str]:
    """What a reader must know beside the tables, a paragraph each."""
    seeds = list(dict.fromkeys(record["seed"] for record in records))
    measured = next((record for record in records if "figures" in record), None)
    one = len(seeds) == 1
    text = "One seed, no spread." if one else (
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; bold: best by more than the spread."
    )  # fmt: skip
    if measured is None:
        return [text]
    text += (
        f" {measured['num']} samples a run, {measured['num_real']} held-out images. Work is relative to the first row."
    )
    paragraphs = [text, f"Feature space: {measured['feature_space']}."]
    for record in records:
        if collapse := record.get("collapse"):
            paragraphs.append(f"{record['preset']}, seed {record['seed']}: {collapse}.")
        if times := record.get("rollbacks"):
            paragraphs.append(
                f"{record['preset']}, seed {record['seed']}: diverged and went back {times} time"
                f"{'s' if times > 1 else ''}, to learn on at a lower rate; its work is that of the configuration."
            )
    for row in rows:
        if row["failed"]:
            paragraphs.append(f"{row['preset']}: {row['failed']} of {row['failed'] + row['runs']} runs diverged.")
    return paragraphs


def console_tables(rows: Sequence[dict[str, Any]], records: Sequence[dict[str, Any]]) -> RenderableType:
    """The same for a rich console's `print`."""
    from rich.console import Group
    from rich.text import Text

    def marked(row: dict[str, Any], column: Column) -> Text:
        return Text(cell(row, column), "bold green" if row[f"{column.key}_best"] else "")

    parts: list[RenderableType] = []
    for group, shown, baseline in _tables(rows, records):
        lines = [[row["preset"], *(marked(row, column) for column in shown)] for row in rows]
        lines += [[*baseline, "dim"]] if baseline else []
        headings = ["preset", *(column.title for column in shown)]
        parts.append(console_table(group, headings, lines, styles=("bold",), no_wrap=(0,)))
    return Group(*parts, *(Text(line, "dim") for line in legend(rows, records)))
