"""Plots of a recorded chain, by matplotlib."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np

from ..sampling.diagnostics import Trace, autocorrelation

BAND, LINE, OTHER, FAINT = "#c6d5ea", "#1f4e8c", "#b5512b", "#8b8b8b"
SINGLE = 5  # chains that are drawn one by one


@dataclasses.dataclass(frozen=True)
class ChainReport:
    """One chain's trace and its figures, in plain JSON types."""

    name: str
    trace: Trace
    figures: dict[str, Any]
    warm_up: float


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches, outside pyplot, which would choose a window system."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib: pip install "mgebm_fast[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def as_png(figure: Any, dpi: int = 100) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def plot_chain(report: ChainReport) -> bytes:
    """A PNG of four panels over the steps: potential, gradient-to-noise ratio, acceptance; and autocorrelation."""
    trace, kept = report.trace, report.trace.after(report.warm_up)
    steps = trace.steps + 1
    figure = new_figure(10, 6.4)
    from matplotlib.ticker import MaxNLocator

    figure.suptitle(f"{report.name}: {trace.potential.shape[1]} chains, {report.figures['steps']} steps")
    ((potential, ratio), (acceptance, correlation)) = figure.subplots(2, 2)

    _spread(potential, steps, trace.potential)
    for chain in trace.potential.T[:SINGLE]:
        potential.plot(steps, chain, color=FAINT, linewidth=0.6)
    potential.set(title="potential U(x)", xlabel="step")
    _or_nothing(ratio, "gradient-to-noise ratio of a step", steps, trace.gradient_to_noise)
    ratio.set_ylim(bottom=0)
    _or_nothing(acceptance, "Metropolis acceptance, if corrected", steps, trace.acceptance)
    acceptance.set_ylim(-0.02, 1.02)
    if report.figures["log_acceptance"] is not None:
        mean, log = report.figures["acceptance"], report.figures["log_acceptance"]
        acceptance.set_xlabel(f"step (after the warm-up: mean {mean:.3g}, median e^{log:.3g})")
    if len(kept.steps) < len(steps):
        for axes in (potential, ratio, acceptance):
            axes.axvline(kept.steps[0] + 1, color=OTHER, linewidth=0.8, linestyle=":")

    pace = steps[1] - steps[0] if len(steps) > 1 else 1
    for name, colour in (("potential", LINE), ("mean", OTHER)):
        rho = autocorrelation(kept.quantities[name])
        label = "potential" if name == "potential" else "mean pixel"
        correlation.plot(np.arange(len(rho)) * pace, rho, color=colour, label=label, marker=".", markersize=3)
    correlation.axhline(0, color=FAINT, linewidth=0.8)
    correlation.axhline(np.exp(-1), color=FAINT, linewidth=0.8, linestyle=":")
    correlation.set(title="autocorrelation after the warm-up", xlabel="lag in steps", ylim=(-0.4, 1.05))
    correlation.legend(frameon=False)
    for axes in (potential, ratio, acceptance, correlation):
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return as_png(figure)


def _spread(axes: Any, steps: np.ndarray, values: np.ndarray) -> None:
    """The median over the chains, and the band that holds four in five."""
    low, middle, high = np.nanquantile(values, (0.1, 0.5, 0.9), axis=1)
    axes.fill_between(steps, low, high, color=BAND, linewidth=0, label="10–90 %")
    axes.plot(steps, middle, color=LINE, linewidth=1.6, label="median")


def _or_nothing(axes: Any, title: str, steps: np.ndarray, values: np.ndarray | None) -> None:
    axes.set(title=title, xlabel="step")
    if values is None:
        axes.text(0.5, 0.5, "none: the chain has no noise", ha="center", va="center", transform=axes.transAxes)
        return
    _spread(axes, steps, values)
