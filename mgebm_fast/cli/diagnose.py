"""`mgebm diagnose`: how the chains of a run behave, as figures and plots."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    MOST_SAMPLES,
    MOST_SEED,
    MOST_STEPS,
    Device,
    Json,
    RunPath,
    Threads,
    find_device,
    fingerprint_of,
    open_run,
    use_threads,
)
from .outputs import check_out

if TYPE_CHECKING:
    from ..learning import TrainConfig

_OURS = r"report\.json|grid_\d+_size_[\dx]+(_states)?\.png"


def diagnose(
    run: RunPath,
    num: Annotated[
        int | None, typer.Option(min=2, max=MOST_SAMPLES, help="How many chains. Default: 64, of videos or sounds 8.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_STEPS, help="Steps of every chain. Default: as many as the run samples with."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the chains.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For plots and report.json. Default: diagnostics, and nothing with --json."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the diagnosis in a folder that holds other files as well.")
    ] = False,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Run a model's sampling chains and measure them: energies, acceptance if corrected, ESS, split R-hat.

    \b
    Examples:
      mgebm diagnose runs/digits
      mgebm diagnose runs/digits --steps 1000 --out long/
      mgebm diagnose runs/digits --json | jq '.chains[2].rhat'

    \b
    In the folder, for every grid:
      grid_3_size_8.png         energy traces, gradient-to-noise ratio, acceptance, autocorrelation
      grid_3_size_8_states.png  eight chains, top to bottom as they go; not of videos and sounds
      report.json               what --json prints

    An earlier diagnosis in the folder is replaced; one that holds anything else is refused without --overwrite.

    ESS and R-hat need arviz, plots need matplotlib: pip install "mgebm_fast[diagnostics]". Without them the
    rest is printed. What the figures mean, and what short chains do to them, is in docs/diagnostics.md.
    """
    import json as json_module

    if out is None and not json:
        out = Path("diagnostics")
    if out is not None:
        check_out(out, overwrite, grids=False, files=(), what="diagnosis", ours=_OURS)
    use_threads(threads)
    from rich.console import Console

    from ..evaluation.diagnosis import diagnose as measure
    from ..evaluation.diagnosis import format_diagnosis
    from ..files import write_bytes
    from ..learning.run.progress import working
    from ..models import EnergyModel, Model, SpatialTemporal

    source, config = open_run(run)
    model = Model.load(source, device=find_device(device))
    if not isinstance(model, EnergyModel):
        raise ValueError(f"run: must have chains to diagnose, got {run}, whose samples a generator makes alone")
    _report_changed_data(run, config)
    num = num or (8 if isinstance(model, SpatialTemporal) else 64)
    with working(f"running {num} chains a grid"):
        diagnosis = measure(model, num=num, steps=steps, seed=seed)
    figures = {"run": str(run), "num": num, "seed": seed, **diagnosis.figures()}
    text = json_module.dumps(figures, allow_nan=False, ensure_ascii=False)
    if out is not None:
        written = diagnosis.write(out, model.to_uint8)
        write_bytes(out / "report.json", (text + "\n").encode())
        for old in out.iterdir():  # of a model with more grids
            if re.fullmatch(_OURS, old.name) and old.is_file() and old not in (*written, out / "report.json"):
                old.unlink()
        plots = len([path for path in written if not path.stem.endswith("_states")])
        missing = "" if plots else ', no plots: matplotlib is not installed (pip install "mgebm_fast[diagnostics]")'
        typer.echo(f"{out}: {len(written)} pictures and report.json{missing}", err=True)
    if json:
        typer.echo(text)
        return
    Console().print(format_diagnosis(diagnosis))


def _report_changed_data(run: Path, config: TrainConfig | None) -> None:
    """Say on stderr where the data of a run are not what it learnt from, for a command that does not use them."""
    from ..data.fingerprint import difference
    from ..learning import load_data

    if config is None or (like := fingerprint_of(run, config.data, config)) is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            differs = difference(like, load_data(config, like=like).fingerprint())
    except (OSError, ValueError) as error:
        differs = f"they cannot be read: {error}"
    if differs:
        typer.echo(f"{config.data}: not what the run learnt from: {differs}", err=True)
