"""`mgebm classify`: what the features that runs learnt without labels are worth to a classifier with few labels."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    MOST_RUNS,
    MOST_SEED,
    Device,
    Json,
    Threads,
    at_most,
    images_of,
    named_options,
    open_model,
    print_json,
    use_threads,
)
from .outputs import check_place


def classify(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, checkpoint folders or model files.")],
    labels: Annotated[
        str, typer.Option(metavar="K,K,...", help="Labelled images a class; a column of the table each.")
    ] = "10,20,50",
    draws: Annotated[
        int, typer.Option(min=1, max=1000, help="Choices of the labelled images, the same for everyone.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the draws and of random weights.")] = 0,
    fine_tune: Annotated[
        bool, typer.Option("--fine-tune", help="Also train each run's nets on, from the learned weights.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Labelled images. Default: those the runs were trained on.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="X.png", help="Draw accuracy over the number of labels.")
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Classify held-out images with few labels: learned features against the same nets trained on the labels alone.

    \b
    Examples:
      mgebm classify runs/digits
      mgebm classify runs/digits runs/digits-cd --labels 10,20,50 --picture curve.png
      mgebm classify runs/digits --draws 10 --fine-tune --json > few.json

    \b
    Every contender gets the same draws of labelled training images and is tested on all held-out ones:
      RUN: features                  its energy nets, frozen, read by a support-vector classifier
      RUN: fine-tuned                its nets trained on the labelled images, from the learned weights (--fine-tune)
      nets of RUN: supervised only   the same layers trained on the labelled images, from random weights
      nets of RUN: random, frozen    the same layers, random and frozen, read as learned ones are
      pixels                         no net: the same classifier, and logistic regression

    Runs of the same layers share the supervised and the random rows. The classifier's settings are chosen by
    cross-validation on the labelled images. --picture needs matplotlib: pip install "mgebm_fast[plot]".
    """
    wanted = _numbers(labels)
    at_most(MOST_RUNS, len(runs), "run", "runs")
    _check_picture(picture)
    use_threads(threads)
    from rich.console import Console

    from ..evaluation.few_labels.few_labels import few_labels
    from ..evaluation.few_labels.net_features import energy_nets
    from ..evaluation.few_labels.report import format_few_labels, plot_few_labels
    from ..files import write_bytes
    from ..learning.run.progress import working

    models, parts = {}, {}
    for run in runs:
        model, config = open_model(run, device, "classify")
        try:
            energy_nets(model)
        except ValueError:
            kind = ("class-conditional " if getattr(model, "classes", ()) else "") + type(model).__name__
            raise ValueError(f"run: must have an energy net whose features can be read, got {run}, a {kind}") from None
        if str(run) in models:
            raise ValueError(f"run: must be given once, got {run} twice")
        models[str(run)], parts[str(run)] = model, images_of(run, model, config, data)
    first = parts[str(runs[0])]
    for name, found in parts.items():
        if found.args != first.args:
            raise ValueError(
                f"run: must all be of the same data, size, channels and classes, got {_words(first.args)} in {runs[0]} "
                f"and {_words(found.args)} in {name}"
            )
    known = next((part for part in parts.values() if part.keywords["like"]), first)
    train, held_out = known(split="train"), known(split="held_out")
    with named_options("labels", "data", "draws", "seed"), working("reading features") as tell:
        result = few_labels(
            models, train, held_out, labels=wanted, draws=draws, seed=seed, fine_tune=fine_tune,
            progress=lambda name, done, total: tell(f"{done + 1} of {total}: {name}"),
        )  # fmt: skip
    if json:
        print_json(result)
    else:
        Console().print(format_few_labels(result))
    if picture is not None:  # last: figures are there even where the file cannot be written
        picture.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(picture, plot_few_labels(result))
        typer.echo(f"{picture}: {len(result['contenders'])} contenders", err=True)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"--labels: must be different whole numbers of at least 2 with commas between them, got {text!r}"
        )
    at_most(MOST_RUNS, len(numbers), "--labels", "numbers")
    return numbers


def _check_picture(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() != ".png":
        raise ValueError(f"--picture: must end in .png, got {path}")
    if path.is_dir():
        raise ValueError(f"--picture: must be a file, got the folder {path}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError('--picture: needs matplotlib: pip install "mgebm_fast[plot]"')
    check_place(path, "--picture")


def _words(source: tuple) -> str:
    name, size, channels, classes = source
    return f"{name or 'unnamed data'} {channels}x{size}x{size}" + (f" ({', '.join(classes)})" if classes else "")
