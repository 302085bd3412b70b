"""Pictures of a comparison: samples of every method under data, and KID by method with seeds as points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...pictures import labelled_panel
from ..plots import as_png, new_figure

SHOWN = 20  # samples of a row
_BAR, _POINT, _REAL = "#c6d5ea", "#1f4e8c", "#b5512b"


def samples_picture(data: Tensor, rows: Sequence[tuple[str, Tensor]]) -> np.ndarray:  # uint8 (n, C, S, S) each
    """(H, W, 3) uint8: a row of data, and under it a row of each method's samples, labelled."""
    return labelled_panel([("data", data), *rows], across=1, columns=len(data), margin=6)


def kid_plot(records: Sequence[dict[str, Any]]) -> bytes:
    """A PNG: a bar a preset, the mean of its KID, a point a seed, and a line for held-out images."""
    measured = [record for record in records if "figures" in record]
    names = list(dict.fromkeys(record["preset"] for record in records))
    figure = new_figure(8, 1.0 + 0.42 * len(names))
    axes = figure.subplots()
    for place, name in enumerate(names):
        values = [record["figures"]["kid"] for record in measured if record["preset"] == name]
        if not values:
            axes.text(0, place, " diverged", va="center", fontsize=8, color=_REAL)
            continue
        axes.barh(place, np.mean(values), height=0.6, color=_BAR)
        axes.scatter(values, [place] * len(values), s=18, color=_POINT, zorder=3)
        axes.annotate(
            f"{np.mean(values):.3f}", (max([*values, 0]), place), (8, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    real = next((record["real"]["kid"] for record in measured if record["real"].get("kid") is not None), None)
    if real is not None:
        axes.axvline(real, color=_REAL, linewidth=1, linestyle="--", label=f"held-out images ({real:.3f})")
        axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.margins(x=0.12)
    axes.set_xlabel("KID, lower is better: mean (bar) and seeds (points)", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return as_png(figure, dpi=120)
