"""Diagnostics of a trained model's chains: figures grid by grid, notes on what they mean, and plots."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_bytes
from ..models import EnergyModel, MultiGrid
from ..pictures import labelled_panel, save_png
from ..sampling import Langevin, diagnostics
from ..sampling.corrected import Corrected
from ..sampling.diagnostics import Recorder, Trace
from ..tables import console_table, note, number
from .plots import ChainReport, plot_chain

RECORDS = 250  # records of a chain at most: about as many as a plot can show
MIXED = 1.05  # split R-hat above which halves of chains count as different
INSTALL = 'pip install "mgebm_fast[diagnostics]"'


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The chains of a model, coarse to fine."""

    chains: list[ChainReport]
    notes: list[str]
    seconds: float

    def figures(self) -> dict[str, Any]:
        """Everything in plain JSON types."""
        chains = [{"name": chain.name, **chain.figures} for chain in self.chains]
        return {"chains": chains, "notes": self.notes, "seconds": round(self.seconds, 2)}

    def write(self, folder: str | os.PathLike[str], to_uint8: Any) -> list[Path]:
        """Pictures of every chain in `folder`: a plot, where matplotlib is there, and the states of some samples.

        `to_uint8` turns states into bytes, as `MultiGrid.to_uint8`.
        """
        folder, written = Path(folder), []
        folder.mkdir(parents=True, exist_ok=True)
        for chain in self.chains:
            stem = chain.name.replace(" ", "_")
            if importlib.util.find_spec("matplotlib") is not None:
                written.append(write_bytes(folder / f"{stem}.png", plot_chain(chain)))
            rows = [(f"after step {step + 1}", to_uint8(x)) for step, x in chain.trace.states if x.dim() == 4]
            if rows:
                picture = labelled_panel(rows, across=1, columns=len(rows[0][1]), margin=4)
                written.append(save_png(folder / f"{stem}_states.png", picture))
        return written


def diagnose(
    model: EnergyModel,
    *,
    num: int = 64,
    steps: int | None = None,
    seed: int = 0,
    warm_up: float = 0.5,
    every: int | None = None,
) -> Diagnosis:
    """Run a model's sampling chains, `num` of each, and measure them step by step.

    Args:
        steps: of every chain; None: those that the model samples with.
        warm_up: share of a chain that figures leave out; traces keep it.
        every: record every so many steps; None: so that a chain has at most 250 records.

    ESS and R-hat need arviz, and are null with a note where it is missing. The chains are those of
    `model.sample(num, seed=seed)`, in float32.
    """
    if not 0 <= warm_up < 1:
        raise ValueError(f"diagnose: warm_up must be in [0, 1), got {warm_up}")
    began = time.monotonic()
    cyclic = isinstance(model, MultiGrid) and bool(model.cycles)
    once = model.without_cycles() if isinstance(model, MultiGrid) else contextlib.nullcontext()
    with _lengthened(model, steps), once:
        chains = model.measured()
        mask = model.moving() if isinstance(model, MultiGrid) and model.classes else None
        recorders = [
            Recorder(
                energy,
                chain,
                every=-(-chain.steps // RECORDS) if every is None else every,
                mask=mask,
                seed=seed,
                grid=grid,
            )  # fmt: skip
            for grid, (energy, chain) in enumerate(chains, start=1)
        ]
        model.sample(num, seed=seed, callback=lambda grid, step, x: recorders[grid - 1](step, x), precision="fp32")
    reports = []
    for grid, ((_, chain), recorder) in enumerate(zip(chains, recorders, strict=True), start=1):
        name = f"grid {grid} size {model.sizes[grid]}"
        trace = recorder.trace(num)
        if mask is not None:  # pictures without label planes
            trace = dataclasses.replace(trace, states=[(step, x[:, : model.channels]) for step, x in trace.states])
        reports.append(report(name, chain, trace, warm_up=warm_up))
    coupled = any(recorder.coupled for recorder in recorders)
    notes = [*(["of the first way up alone, without V-cycles"] if cyclic else []), *_notes(reports, coupled)]
    return Diagnosis(reports, notes, time.monotonic() - began)


@contextlib.contextmanager
def _lengthened(model: EnergyModel, steps: int | None) -> Iterator[None]:
    """Inside, every chain that the model samples with has `steps` steps."""
    dynamics, sample_steps = model.langevin, model.sample_steps
    try:
        if steps is not None:
            model.langevin = tuple(chain.of_length(steps) for chain in dynamics)
            model.sample_steps = None
        yield
    finally:
        model.langevin, model.sample_steps = dynamics, sample_steps


def report(name: str, chain: Langevin | Corrected, trace: Trace, *, warm_up: float = 0.5) -> ChainReport:
    """The figures of a recorded chain.

    Returns, in `figures`:
      steps, recorded, kept         of the chain, recorded, and left after the warm-up
      drift, noise_std, temperature of a step, T = noise_std²/(2 drift), of the last where numbers vary; a corrected
                                    chain's own
      potential_first, potential_last   medians over the chains at the first and last record
      gradient_to_noise             mean of rms(drift of a step) / rms(its noise)
      acceptance, log_acceptance    mean Metropolis acceptance if corrected, and the median of its logarithm
      ess, rhat                     {"potential", "mean", "worst"}: of U, of the mean pixel, and the worst of those and
                                    of 8 fixed random projections
      autocorrelation_steps         steps until the autocorrelation of U and of the mean pixel is below 1/e, else null
    """
    kept = trace.after(warm_up)
    pace = int(trace.steps[1] - trace.steps[0]) if len(trace.steps) > 1 else 1
    figures: dict[str, Any] = {"steps": chain.steps, "recorded": len(trace.steps), "kept": len(kept.steps)}
    figures["chains"] = trace.potential.shape[1]
    if isinstance(chain, Langevin):
        numbers = chain.by_step()[-1]
        figures |= {"drift": numbers.drift, "noise_std": numbers.noise_std}
        figures["temperature"] = numbers.noise_std**2 / (2 * numbers.drift) if numbers.drift else None
    else:
        figures |= {"step_size": chain.step_size, "temperature": chain.temperature}
    figures["potential_first"] = _number(np.median(trace.potential[0]))
    figures["potential_last"] = _number(np.median(trace.potential[-1]))
    figures["gradient_to_noise"] = None if kept.gradient_to_noise is None else _number(kept.gradient_to_noise.mean())
    acceptance = kept.acceptance
    figures["acceptance"] = None if acceptance is None else _number(acceptance.mean())
    figures["log_acceptance"] = None if kept.log_acceptance is None else _number(np.median(kept.log_acceptance))
    figures["ess"], figures["rhat"] = _mixing(kept)
    figures["autocorrelation_steps"] = {
        name: _decay(diagnostics.autocorrelation(kept.quantities[name]), pace) for name in ("potential", "mean")
    }
    return ChainReport(name, trace, figures, warm_up)


def _mixing(kept: Trace) -> tuple[dict[str, float | None] | None, dict[str, float | None] | None]:
    if importlib.util.find_spec("arviz") is None:
        return None, None
    measures = []
    for function, worst in ((diagnostics.ess, min), (diagnostics.split_rhat, max)):
        values = {name: function(draws) for name, draws in kept.quantities.items()}
        known = [value for value in values.values() if value is not None]
        measures.append({
            "potential": values["potential"], "mean": values["mean"], "worst": worst(known) if known else None
        })  # fmt: skip
    return measures[0], measures[1]


def _decay(rho: np.ndarray, pace: int) -> int | None:
    below = np.flatnonzero(rho < np.exp(-1.0))
    return int(below[0]) * pace if len(below) else None


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _notes(reports: list[ChainReport], coupled: bool) -> list[str]:
    notes = []
    if importlib.util.find_spec("arviz") is None:
        notes.append(f"ess and rhat are left out: arviz is not installed ({INSTALL})")
    if coupled:
        notes.append("batch statistics couple the samples: acceptance is that of whole batches, ESS is optimistic")
    if any(r.figures["acceptance"] is None for r in reports):
        notes.append(
            "a chain that is noise-free, or whose numbers vary, has no one law: acceptance and gradient-to-noise ratio "
            "are left out"
        )
    apart = [r.name for r in reports if r.figures["rhat"] and (r.figures["rhat"]["worst"] or 1) > MIXED]
    if apart:
        notes.append(
            f"{', '.join(apart)}: split R-hat above {MIXED}, chains still depend on where they began: their samples "
            "are those of a short run, not of exp(-U/T)"
        )
    rejected = [r for r in reports if r.figures["acceptance"] is not None and r.figures["acceptance"] < 0.1]
    exact = [r.name for r in rejected if "step_size" in r.figures]
    if exact:
        notes.append(
            f"{', '.join(exact)}: the chain refuses nearly every proposal and hardly moves: smaller steps help"
        )
    rough = [r.name for r in rejected if "step_size" not in r.figures]
    if rough:
        notes.append(
            f"{', '.join(rough)}: a corrected chain would refuse nearly every step: what these chains sample is shaped "
            "by the step size, not by exp(-U/T) alone"
        )
    return notes


def format_diagnosis(diagnosis: Diagnosis) -> Any:
    """A table, one column a chain, for a rich console's `print`."""
    from rich.console import Group
    from rich.text import Text

    def nested(key: str, name: str) -> list[Any]:
        return [(chain.figures[key] or {}).get(name) for chain in diagnosis.chains]

    def plain(key: str) -> list[Any]:
        return [chain.figures[key] for chain in diagnosis.chains]

    draws = [chain.figures["kept"] * chain.figures["chains"] for chain in diagnosis.chains]
    rows = [("steps", plain("steps"), "{}"), ("temperature", plain("temperature"), "{:.3g}"),
            ("U at the first record", plain("potential_first"), "{:.4g}"),
            ("U at the last", plain("potential_last"), "{:.4g}"),
            ("gradient to noise", plain("gradient_to_noise"), "{:.3g}"),
            ("acceptance if corrected", plain("acceptance"), "{:.3f}"),
            ("its log, median", plain("log_acceptance"), "{:.3g}"), ("draws after warm-up", draws, "{}"),
            ("ESS of U", nested("ess", "potential"), "{:.0f}"), ("ESS, worst", nested("ess", "worst"), "{:.0f}"),
            ("R-hat of U", nested("rhat", "potential"), "{:.3f}"), ("R-hat, worst", nested("rhat", "worst"), "{:.3f}"),
            ("autocorrelation of U, steps", nested("autocorrelation_steps", "potential"), "{}")]  # fmt: skip
    table = console_table(
        f"{diagnosis.chains[0].figures['chains']} chains a grid",
        ["figure", *(chain.name for chain in diagnosis.chains)],
        [[name, *(number(value, form) for value in values)] for name, values, form in rows],
        styles=("bold",),
    )
    lines = [note("note", words) for words in diagnosis.notes]
    return Group(table, *lines, Text(f"of the last {1 - diagnosis.chains[0].warm_up:.0%} of each chain", style="dim"))
