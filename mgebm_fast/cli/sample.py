"""`mgebm sample`: draw samples of a run with no data, and write them as a picture, an array or a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    MOST_SAMPLES,
    MOST_SEED,
    Cycles,
    Device,
    Precision,
    RunPath,
    Steps,
    Threads,
    at_most,
    find_rank_device,
    one_voice,
    open_run,
    take_chains,
    use_threads,
)
from .outputs import IMAGE_FILES, SAMPLE_WRITERS, check_out, check_place

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..models import Model


def sample(
    run: RunPath,
    num: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_SAMPLES, help="How many samples. Default: 64 images, one video or sound."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="The same seed gives the same samples.")] = 0,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE|DIR",
            help="X.png, X.npy, a folder for one PNG a sample; of videos also X.gif, X.mp4; of sounds X.wav.",
        ),
    ] = Path("samples.png"),
    first_sample: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Number of the first sample: go on where an earlier call stopped.")
    ] = 0,
    best: Annotated[
        int | None,
        typer.Option(
            min=1, max=MOST_SAMPLES, help="Keep so many of the NUM samples, those of lowest energy, lowest first."
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class", metavar="NAME", help="Draw this class, of a class-conditional run; several, or all: in turn."
        ),
    ] = None,
    grids: Annotated[bool, typer.Option("--grids", help="Show the samples at every size, coarse to fine.")] = False,
    generator: Annotated[
        bool, typer.Option("--generator", help="Draw by the generator alone, where a run has one; no chain refines it.")
    ] = False,
    interpolate: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=MOST_SAMPLES,
            metavar="POINTS",
            help="NUM rows of as many images between two draws of a generator.",
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=2, max=4096, help="Side of the images, of a model that takes any: a texture's.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the samples in a folder that is not empty.")
    ] = False,
    steps: Steps = None,
    cycles: Cycles = None,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "auto",
) -> None:
    """Draw samples from a trained model. No data is needed: the run keeps the colours that chains start from.

    \b
    Examples:
      mgebm sample runs/digits --num 64 --seed 1 --out samples.png
      mgebm sample runs/digits --num 1000 --out samples.npy
      mgebm sample runs/digits --num 16 --grids --out grids.png
      mgebm sample runs/digits --num 500 --best 64 --out best.png
      mgebm sample runs/photos --cycles 4 --num 16 --out again.png
      mgebm sample digits-by-class --class 3 --class 8 --num 20 --out threes-and-eights.png
      mgebm sample digits-by-class --class all --num 100 --out classes.png
      mgebm sample runs/coop --generator --out alone.png
      mgebm sample runs/coop --interpolate 10 --num 8 --out between.png
      mgebm sample runs/texture --size 224 --num 1 --out wall.png
      mgebm sample runs/fire --num 3 --out fire.gif
      mgebm sample runs/chimes --out chimes.wav

    --out says what is written, whole or not at all (but for --overwrite, which replaces files one by one):

    \b
      X.png   one picture of all samples with gaps between them (small ones enlarged)
      X.npy   uint8 (N, C, H, W) = round(255 (x - lo) / (hi - lo)), [lo, hi] the model's range of pixel values
      else    a folder with sample_00000.png, ... ; one that holds anything is refused without --overwrite

    Of a model of videos X.gif and X.mp4 show them side by side, X.png a row of frames of each, X.npy holds uint8
    (N, C, T, H, W), and a folder their frames as PNG files. Of sounds X.wav holds one, X.png shows waveforms and
    spectra, X.npy holds float32 (N, 1, L) in [-1, 1], and a folder one wav file each.

    --best keeps the samples of lowest energy, as `mgebm score` has it. They are the likeliest under the model, not the
    best looking, and they vary less than samples do.

    The run's averaged (EMA) weights are used where it has them. Sample i depends on (seed, i) and the model alone;
    with norm = "batch" also on its group, so there --first-sample must be a multiple of the batch size.
    """
    use_threads(threads)
    from ..learning.run.distributed import joined
    from ..models import Model, SpatialTemporal

    hardware = find_rank_device(device)
    with joined(hardware) as ranks, one_voice(ranks):
        with ranks.together():
            source, _ = open_run(run)
            model = Model.load(source, device=hardware)
            take_chains(model, steps, cycles, run)
            if size is not None:
                model = _resized(model, size, run)
            recorded = model if isinstance(model, SpatialTemporal) else None
            num = num or (1 if recorded else 64)
            at_most(MOST_SAMPLES, num * (interpolate or 1), "--interpolate", "images, NUM rows of POINTS")
            if first_sample + num > 2**32:
                raise ValueError(f"--first-sample: must leave --num {num} samples below 2**32, got {first_sample}")
            labels = _labels(model, run, classes) if classes else []
            if best is not None:
                _check_best(model, run, best, num, interpolate)
            files: tuple[str, ...] = IMAGE_FILES
            if recorded:
                from ..evaluation import recordings

                files = recordings.check(recorded, out, num, grids)
            kind = check_out(out, overwrite, grids, files, attempt=False)
            _check_group(model, first_sample)
            if generator or interpolate is not None:
                option = "--generator" if interpolate is None else "--interpolate"
                _check_generator(model, run, option, grids, steps)
        with ranks.together():  # once all ranks have checked, since the check makes folders for a moment
            if ranks.first:
                check_place(out, folder=out.is_dir())
        if recorded:
            with ranks.together():
                if ranks.first:
                    (x,) = _chains(recorded, num, seed=seed, first_sample=first_sample, precision=precision)
                    out.parent.mkdir(parents=True, exist_ok=True)
                    recordings.write(recorded, x, out, kind, first_sample)
                    typer.echo(f"{num} samples of {run} (seed {seed}): {out}", err=True)
            return
        shares = _shares(num, model.batch_size, ranks.size)
        own = shares[ranks.rank]
        with ranks.together():
            place = {"seed": seed, "first_sample": first_sample + own.start}
            if generator or interpolate is not None:
                batches = _generate(model, len(own), interpolate, **place)
            else:
                of_own = [labels[(first_sample + i) % len(labels)] for i in own] if labels else None
                batches = _draw(model, len(own), **place, labels=of_own, precision=precision)
        each = interpolate or 1
        collected = [ranks.collect(batch, [each * len(share) for share in shares]) for batch in batches]
        images = {size: batch.numpy() for size, batch in zip(model.sizes[-len(batches) :], collected, strict=True)}
        first, count = first_sample * each, num * each
        numbers: Sequence[int] = range(first, first + count)
        if best is not None and ranks.first:
            chosen = _lowest(model, images[model.sizes[-1]], best)
            images = {size: batch[chosen] for size, batch in images.items()}
            numbers = [first + int(i) for i in chosen]
        if not grids:
            images = {model.sizes[-1]: images[model.sizes[-1]]}
        with ranks.together():
            if ranks.first:
                out.parent.mkdir(parents=True, exist_ok=True)
                SAMPLE_WRITERS[kind](out, images, numbers, interpolate)
        low, high = model.value_range
        what = "samples" if interpolate is None else f"rows of {interpolate} images"
        kept = "" if best is None else f"{best} of lowest energy of "
        typer.echo(f"{kept}{num} {what} of {run} (seed {seed}, values {low:g} … {high:g} as 0 … 255): {out}", err=True)


def _resized(model: Model, size: int, run: Path) -> Model:
    from ..models import GenerativeConvNet

    if not isinstance(model, GenerativeConvNet):
        raise ValueError(f"--size: is for a generative ConvNet or FRAME model, got {run}, a {model.kind} of one size")
    return model.at_size(size)


def _shares(num: int, group: int, ranks: int) -> list[range]:
    """Which samples each rank draws: whole groups, so that every sample runs in the group that one process runs."""
    groups = -(-num // group)
    bounds = [min(num, group * (rank * groups // ranks)) for rank in range(ranks + 1)]
    return [range(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]


def _check_group(model: Model, first_sample: int) -> None:
    if model.coupled and first_sample % model.batch_size:
        raise ValueError(
            f"--first-sample: must be a multiple of the batch size {model.batch_size} for a model with batch "
            f"normalisation, got {first_sample}"
        )


def _check_best(model: Model, run: Path, best: int, num: int, interpolate: int | None) -> None:
    from ..models import EnergyModel, SpatialTemporal

    if not isinstance(model, EnergyModel) or isinstance(model, SpatialTemporal):
        raise ValueError(f"--best: is for models of images that have energies, got {run}, a {model.kind}")
    if interpolate is not None:
        raise ValueError("--best: must be left out beside --interpolate, whose rows belong together")
    if best > num:
        raise ValueError(f"--best: must be at most --num, {num}, got {best}")


def _lowest(model: Any, images: np.ndarray, best: int) -> np.ndarray:
    """Indices of the `best` images of lowest energy, lowest first."""
    import numpy as np

    from ..data import ImageData
    from ..evaluation.scoring import SUM, score

    return np.argsort(score(model, ImageData(images)).energies[SUM], kind="stable")[:best]


def _check_generator(model: Model, run: Path, option: str, grids: bool, steps: str | None) -> None:
    from ..models.latent import Generates

    if not isinstance(model, Generates):
        raise ValueError(
            f"{option}: the run must have a generator (methods cooperative, abp), got {run}, a {model.kind}"
        )
    if grids:
        raise ValueError(f"--grids: must be left out beside {option}, whose images have one size")
    if steps is not None:
        raise ValueError(f"--steps: must be left out beside {option}, where no chain is run, got {steps}")


def _generate(model, num: int, points: int | None, *, seed: int, first_sample: int) -> list:
    """uint8 images of the generator alone: samples, or rows of `points` between samples 2r and 2r + 1."""
    import torch

    size = model.sizes[-1]
    if num == 0:
        return [torch.empty(0, model.channels, size, size, dtype=torch.uint8)]
    if points is None:
        return [model.to_uint8(model.generate(num, seed=seed, first_sample=first_sample))]
    rows = model.interpolate(num, points, seed=seed, first_sample=2 * first_sample)
    return [model.to_uint8(rows).flatten(0, 1)]


def _labels(model: Model, run: Path, classes: list[str]) -> list[int]:
    """The numbers of classes of a class-conditional model."""
    from ..errors import suggest

    names = getattr(model, "classes", ())
    must = f"one of {', '.join(names)}" if names else "left out, unless a run has multigrid.conditional = true"
    classes = list(names) if classes == ["all"] and names and "all" not in names else classes
    for name in set(classes) - set(names):
        raise ValueError(f"--class: must be {must}, got {name!r} for {run}{suggest(name, names)}")
    return [names.index(name) for name in classes]


def _draw(
    model: Model, num: int, *, seed: int, first_sample: int, labels: list[int] | None = None, precision: str
) -> list:
    """uint8 samples at every size."""
    import torch

    if num == 0:  # a rank with nothing to do
        return [torch.empty(0, model.channels, size, size, dtype=torch.uint8) for size in model.sizes]
    drawn = _chains(model, num, seed=seed, first_sample=first_sample, labels=labels, precision=precision)
    return [model.to_uint8(x) for x in drawn]


def _chains(
    model: Model, num: int, *, seed: int, first_sample: int, labels: list[int] | None = None, precision: str
) -> list[Tensor]:
    """Samples at every size in the model's units, with a bar over the steps of all chains."""
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    groups = -(-num // model.batch_size)
    console = Console(stderr=True)
    columns = (TextColumn("sampling"), BarColumn(), TextColumn("{task.percentage:3.0f} %"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=groups * model.steps_of_sample)
        drawn = model.sample(
            num,
            seed=seed,
            first_sample=first_sample,
            return_grids=True,
            labels=None if labels is None else torch.tensor(labels),
            precision=precision,
            # A callback per step rules out CUDA graphs: only a bar that is shown may cost that.
            callback=(lambda grid, step, x: progress.advance(bar)) if console.is_terminal else None,
        )
    return list(drawn)
