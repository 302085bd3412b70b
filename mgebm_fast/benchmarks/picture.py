"""One picture a table: horizontal bars, the shorter the faster. Needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .report import Row

OURS, THEIRS = "#c8501e", "#9aa5b1"
_BAR_INCHES, _HEAD_INCHES = 0.27, 0.75


def why_not() -> str:
    """What is missing to draw, and what to do; an empty string where nothing is."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is missing: pip install 'mgebm_fast[plot]'"
    return ""


def draw(rows: Sequence[Row], path: Path) -> Path:
    """The rows of one table as a picture, SVG or PNG by the suffix of `path`: one panel a case, one bar a contender.

    A bar is the median, its whisker the quartiles; its label has the speed relative to plain_loop and the precision.
    Contenders without a figure are left out. ValueError where no row has one.
    """
    shown = [row for row in rows if row.ok]
    if not shown:
        raise ValueError("picture: rows must hold at least one figure, got none")
    panels: dict[str, list[Row]] = {}
    for row in shown:
        panels.setdefault(row.case, []).append(row)
    figure, axes = _panels([len(panel) for panel in panels.values()])
    for axis, (case, panel) in zip(axes, panels.items(), strict=True):
        first = panel[0]
        medians = [row.ms or 0.0 for row in panel]
        spread = [
            [ms - (row.low_ms or 0.0) for ms, row in zip(medians, panel, strict=True)],
            [(row.high_ms or 0.0) - ms for ms, row in zip(medians, panel, strict=True)],
        ]
        labels = [
            f"{row.ms:.3g} ms" + (f" · {row.vs_plain_loop:.2f}×" if row.vs_plain_loop else "") + f" · {row.precision}"
            for row in panel
        ]
        names = [row.contender for row in panel]
        _bars(axis, names, medians, labels, xerr=spread)
        axis.set_xlabel(f"ms a {first.unit}; × is the speed relative to plain_loop")
        axis.set_title(f"{case}: batch {first.batch}, norm {first.norm}, K = {first.langevin_steps}", loc="left")
    return _save(figure, f"{first.device} · torch {first.torch}", path)


def draw_ops(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """The rows of the ops' CSV as a picture: one panel a device, bars in percent of its copy bandwidth."""
    panels: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        panels.setdefault(row["device"], {}).setdefault(f"{row['op']} {row['case']}", row)
    if not panels:
        raise ValueError("picture: rows must hold at least one figure, got none")
    figure, axes = _panels([len(panel) for panel in panels.values()])
    for axis, (device, panel) in zip(axes, panels.items(), strict=True):
        labels = [f"{float(r['gb_per_s']):.3g} GB/s · {float(r['ratio']):.1f}× {r['baseline']}" for r in panel.values()]
        _bars(axis, list(panel), [float(row["percent_of_copy"]) for row in panel.values()], labels, ours=True)
        axis.set_xlabel("% of the measured copy bandwidth")
        axis.set_title(device, loc="left")
    return _save(figure, f"torch {rows[0]['torch']}", path)


def _panels(bars: Sequence[int]) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # no pyplot: it would choose a window system

    heights = [_HEAD_INCHES + _BAR_INCHES * count for count in bars]
    figure = Figure(figsize=(9, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(bars), 1, squeeze=False, height_ratios=heights)
    return figure, [axis for (axis,) in axes]


def _bars(
    axis: Any,
    names: Sequence[str],
    values: Sequence[float],
    labels: Sequence[str],
    *,
    ours: bool = False,
    xerr: Any = None,
) -> None:
    colours = [OURS if ours or name.startswith("mgebm") else THEIRS for name in names]
    places = range(len(names))
    bars = axis.barh(places, values, color=colours, xerr=xerr, error_kw={"elinewidth": 0.8, "ecolor": "#333333"})
    axis.bar_label(bars, labels, padding=4, fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axis.set_xlim(0, 1.5 * max(values))  # room for the labels
    axis.tick_params(axis="x", labelsize=8)
    axis.xaxis.label.set_fontsize(8)
    axis.title.set_fontsize(10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Any, footer: str, path: Path) -> Path:
    figure.supxlabel(footer, fontsize=8, color="#555555", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    return path
