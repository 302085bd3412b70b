"""The figures of `few_labels` as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...tables import console_table
from ..plots import as_png, new_figure
from .few_labels import FINE_TUNED, LEARNED, PIXELS, RANDOM, SUPERVISED

_LINES = {LEARNED: "-", FINE_TUNED: "-.", SUPERVISED: "--", RANDOM: ":", PIXELS: ":"}
_COLOURS = ("#c8501e", "#1f4e8c", "#3f7d4e", "#8a5fa8", "#b08a1e", "#4aa3b5", "#a34a6b")
_GREYS = ("#30343a", "#7b828c", "#a9b0ba", "#c9ced6")


def format_few_labels(result: Mapping[str, Any]) -> Any:
    """A rich table: contenders down, labels a class across, accuracy in percent with its deviation over the draws."""
    title = f"accuracy on {result['num_test']} held-out images of {result['data']}, %: " + (
        "one draw" if result["draws"] == 1 else f"mean ± standard deviation of {result['draws']} draws"
    )
    rows = [[row["name"], *(_cell(row["accuracy"][str(k)]) for k in result["labels"])] for row in result["contenders"]]
    headings = ["contender", *(f"{labels} a class" for labels in result["labels"])]
    return console_table(title, headings, rows, no_wrap=range(1, len(headings)))


def _cell(figures: Mapping[str, Any]) -> str:
    spread = "" if figures["std"] is None else f" ± {100 * figures['std']:.1f}"
    return f"{100 * figures['mean']:.1f}{spread}"


def plot_few_labels(result: Mapping[str, Any]) -> bytes:
    """A PNG: accuracy over labels a class, one line a contender, bars of one standard deviation. Needs matplotlib."""
    figure = new_figure(9.5, 5)
    axes = figure.subplots()
    labels = sorted(result["labels"])
    runs = list(dict.fromkeys(row["run"] for row in result["contenders"] if row["run"]))
    others = [row["name"] for row in result["contenders"] if not row["run"]]
    count = len(result["contenders"])
    for i, row in enumerate(result["contenders"]):
        own = row["run"] is not None
        colour = (
            _COLOURS[runs.index(row["run"]) % len(_COLOURS)] if own else _GREYS[others.index(row["name"]) % len(_GREYS)]
        )
        figures = [row["accuracy"][str(k)] for k in labels]
        # beside each other, else the bars of contenders that do as well hide each other
        places = [k * 1.02 ** (i - (count - 1) / 2) for k in labels]
        axes.errorbar(
            places, [100 * f["mean"] for f in figures], yerr=[100 * (f["std"] or 0.0) for f in figures],
            label=row["name"], color=colour, linestyle=_LINES[row["kind"]], linewidth=2.0 if own else 1.4, marker="o",
            markersize=4, capsize=2, elinewidth=0.9,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks(labels, [str(k) for k in labels])
    axes.minorticks_off()
    axes.set(xlabel="labelled images a class", ylabel="accuracy on held-out images, %")
    spread = "one draw" if result["draws"] == 1 else f"{result['draws']} draws, bars are one standard deviation"
    axes.set_title(f"{result['data']}: {spread}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    return as_png(figure)
