"""`mgebm report`: one HTML page on a run, or on several side by side."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from .options import MOST_RUNS, MOST_SEED, Threads, at_most, lasting, use_threads
from .outputs import check_place


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, side by side in this order.")],
    out: Annotated[
        Path, typer.Option(metavar="X.html|X.png", help="The page, or its samples beside training images alone.")
    ] = Path("report.html"),
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the samples beside training images.")] = 0,
    data: Annotated[
        str | None, typer.Option(metavar="PLACE", help="Where the images of the runs lie now, if they have moved.")
    ] = None,
    threads: Threads = None,
) -> None:
    """Write one HTML page on a run: nothing else is needed to look at it, and nothing is loaded from elsewhere.

    \b
    Examples:
      mgebm report runs/digits
      mgebm report runs/digits runs/letters --out both.html
      mgebm report runs/digits --out neighbours.png

    \b
    On the page, for each run:
      facts           method, data, sizes, updates, time
      samples         those that training drew, every grid beside the data, with a slider over the updates
      curves          energies, gaps, gradient to noise, learning rate and what else metrics.jsonl holds, and KID
                      and the like where `mgebm evaluate --record` measured them
      neighbours      samples beside the training images nearest to them, by pixel distance
      configuration   config.toml, and what to do next

    It takes less than 5 MB, of up to 100 runs: pictures are left out evenly where there are many.

    X.png is a picture of 16 samples of one run, each over the training image that is nearest to it.
    """
    at_most(MOST_RUNS, len(runs), "run", "runs")
    picture = out.suffix.lower() == ".png"
    if not picture and out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out: must end in .html or .png, got {out}")
    if picture and len(runs) > 1:
        raise ValueError(f"run: must be one for a picture, got {len(runs)}")
    check_place(out)
    use_threads(threads)
    from ..errors import CheckpointError
    from ..evaluation.page import neighbours, page
    from ..files import make_folder, write_bytes
    from ..learning import Run
    from ..pictures import save_png

    source = None if data is None else lasting(data)
    opened = [Run(path) for path in runs]
    for run in opened:
        with contextlib.suppress(CheckpointError):  # no model yet: the page says so in its place
            if caveat := run.find_model()[1]:
                typer.echo(caveat, err=True)
    if picture:
        drawn = neighbours(opened[0], 16, rows=2, seed=seed, source=source)
        make_folder(out.parent)
        save_png(out, drawn)
        typer.echo(f"{runs[0]}: {out}, samples of seed {seed} over the training images nearest to them", err=True)
        return
    text = page(opened, seed=seed, source=source).encode()
    make_folder(out.parent)
    write_bytes(out, text)
    typer.echo(f"{', '.join(map(str, runs))}: {out}, {len(text) / 1e6:.1f} MB", err=True)
