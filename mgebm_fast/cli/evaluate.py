"""`mgebm evaluate`: samples against held-out real images, as a table or as one JSON object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    MOST_SAMPLES,
    MOST_SEED,
    Cycles,
    Device,
    Json,
    Precision,
    RunPath,
    Steps,
    Threads,
    images_of,
    is_own,
    named_options,
    open_model,
    print_json,
    take_chains,
    use_threads,
)
from .outputs import check_place

if TYPE_CHECKING:
    from ..learning import Run


def evaluate(
    run: RunPath,
    num: Annotated[int, typer.Option(min=2, max=MOST_SAMPLES, help="How many samples to draw.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the samples.")] = 0,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Images to compare with. Default: those it was trained on.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Feature space of FID, KID, precision and recall: auto, imagenet, inception or classifier.",
        ),
    ] = "auto",
    record: Annotated[
        bool, typer.Option("--record", help="Add the figures to the run, for `mgebm report` and a model card.")
    ] = False,
    by_size: Annotated[
        bool,
        typer.Option("--by-size", help="KID at every size instead, by where chains begin: which net is to blame?"),
    ] = False,
    json: Json = False,
    steps: Steps = None,
    cycles: Cycles = None,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "auto",
) -> None:
    """Draw samples and measure how near they come to held-out real images.

    \b
    Examples:
      mgebm evaluate runs/digits --num 1000
      mgebm evaluate runs/digits --num 1000 --json > digits.json
      mgebm evaluate runs/photos --features imagenet
      mgebm evaluate runs/photos --steps 150
      mgebm evaluate runs/photos --cycles 4
      mgebm evaluate runs/photos --by-size
      mgebm evaluate runs/digits/checkpoints/step_003000 --record

    KID and FID compare feature statistics (the feature space is named); lower is nearer. Colour images are judged by a
    net that knows ImageNet where mgebm_fast[imagenet] is installed, others by a classifier trained here. precision is
    the share of samples among the training images, recall the share of these among the samples. nearest_distance is
    the mean pixel distance to the nearest training image: far below that of real held-out images it means copying.
    For labelled data, confident_share is the share of samples that a classifier recognises with probability >= 0.9, and
    class_shares splits it by class. The *_real values are the same measures of as many held-out real images.

    --record adds them to evaluations.jsonl in the folder of the run, at the update that the model is of: `mgebm report`
    draws them beside the curves of training, and `mgebm export --to pretrained` writes them on the model card. They are
    of the model's own samples against the run's own data, so that it is refused beside --steps, --cycles, --by-size,
    --precision and other --data.

    --by-size also begins chains at held-out images of each size of a multi-grid model. KID at a size, of chains begun
    at the size below, is the error of that size's own net; what samples have beyond it comes from coarser ones.
    """
    use_threads(threads)
    from json import dumps

    from ..evaluation import evaluate as measure
    from ..evaluation import evaluate_by_size, format_by_size, format_report
    from ..evaluation.evaluate import record_of
    from ..files import read_regular, write_inside
    from ..models.storage import MOST_JSON

    asked = [f"{name} {value}" for name, value in (("--steps", steps), ("--cycles", cycles)) if value is not None]
    asked += [*["--by-size"] * by_size, *[f"--precision {precision}"] * (precision != "auto")]
    if record and asked:
        raise ValueError(f"--record: must be left out with {asked[0]}: it is for the model's own samples")
    if by_size and cycles is not None:
        raise ValueError("--cycles: must be left out with --by-size, which goes up once")
    model, config = open_model(run, device, "evaluate")
    take_chains(model, steps, cycles, run)
    trained = _recorded(run) if record else None
    images = images_of(run, model, config, data)
    if record and config and not (images.keywords["like"] or is_own(images.args[0], config)):
        raise ValueError(f"--record: must be left out with --data {data}: it is for the run's own data, {config.data}")
    train, held_out = images(split="train"), images(split="held_out")
    with named_options("features"):
        options: dict[str, Any] = {"num": num, "seed": seed, "features": features, "precision": precision}
        result = (evaluate_by_size if by_size else measure)(model, train, held_out, **options)
    if words := _collapse_of(run):
        result["notes"].append(words)
    if steps is not None:
        result["notes"].append(f"chains of {steps} steps a grid (--steps)")
    if cycles is not None:
        result["notes"].append(
            "no V-cycles (--cycles)" if cycles == "none" else f"V-cycles down to {cycles} (--cycles)"
        )
    if precision != "auto":
        result["notes"].append(f"chains with gradients in {precision} (--precision)")
    if trained is not None:
        file, found = trained
        line = dumps(record_of(result, found.update_of(file))) + "\n"
        before = read_regular(found.evaluations_file, MOST_JSON) if found.evaluations_file.exists() else b""
        write_inside(found.evaluations_file, before + line.encode())
        typer.echo(f"{found.evaluations_file}: figures of update {found.update_of(file)}", err=True)
    if json:
        print_json(result)
        return
    from rich.console import Console

    Console().print((format_by_size if by_size else format_report)(result))


def _recorded(path: Path) -> tuple[Path, Run]:
    """The model file and the run that figures are recorded in; ValueError where there is no run, or no place."""
    from ..learning.run import checkpoint, stored_run

    file, run, _ = stored_run.find(path)
    if run is None or not run.checkpoints():
        raise ValueError(f"--record: run must be the folder of a trained run, or one of its checkpoints, got {path}")
    if checkpoint.is_set_aside(file.parent):
        raise ValueError(f"--record: run must be one of the run's checkpoints, got {path}, which was set aside")
    check_place(run.evaluations_file, "--record")
    run.evaluations()
    return file, run


def _collapse_of(path: Path) -> str:
    """What to say of a run whose model is the best from before a collapse; "" of any other."""
    from ..learning.run import stored_run

    run = stored_run.find(path).run
    return "" if run is None else run.collapse
