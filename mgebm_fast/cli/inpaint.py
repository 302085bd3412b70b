"""`mgebm inpaint`: hide pixels of held-out images, let a run fill them, and measure how well."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    MOST_SAMPLES,
    MOST_SEED,
    Device,
    Json,
    Precision,
    RunPath,
    Threads,
    images_of,
    open_model,
    print_json,
    use_threads,
)
from .outputs import check_out

if TYPE_CHECKING:
    from ..data import ImageData
    from ..learning import TrainConfig
    from ..models import Model

SHOWN = 16  # images of a picture


def inpaint(
    run: RunPath,
    mask: Annotated[
        str, typer.Option(metavar="square|doodle|pepper|FILE", help="What is hidden, by kind or by a mask of your own.")
    ] = "square",
    num: Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="How many images.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Seed of the choice of images, the occlusions and the chains.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="X.png or X.npy. Default: inpainted.png, and nothing with --json."),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            metavar="auto|FLOAT",
            help="Chain length relative to a sample's. Default: auto where the training images can be read, else 1.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Images to fill. Default: those it was trained on.")
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "auto",
) -> None:
    """Complete held-out images of which a part is hidden: known pixels are held, the chains fill the rest.

    \b
    Examples:
      mgebm inpaint runs/digits --mask square --out square.png
      mgebm inpaint runs/digits --mask pepper --num 360 --json > pepper.json
      mgebm inpaint runs/digits --mask my_mask.png --data my_digits/
      mgebm inpaint runs/digits --length 0.5

    \b
    --mask   square  a square of half the side, anywhere
             doodle  strokes over about a quarter of the pixels
             pepper  60 % of the pixels
             FILE    a picture of the model's size, bright where hidden, or an .npy array of (N, S, S), non-zero there
    --out    X.png   rows original / occluded / completed of the first 16 images
             X.npy   uint8 (N, C, S, S), every completed image
    --length auto    of 0.25, 0.5, 1 and 2 the one with the least error on the same occlusion of 64 training images;
                     1 unless another is clearly better
             0.5     every grid's chain takes half the steps that it takes for a sample

    error is the mean absolute difference on the hidden pixels as a share of the range; PSNR is of the whole image.
    Both are given beside those of a fill by the mean of the known pixels, which knows nothing of the data.
    """
    if out is None and not json:
        out = Path("inpainted.png")
    if out is not None and out.suffix.lower() not in (".png", ".npy"):
        raise ValueError(f"--out: must end in .png or .npy, got {out}")
    kind = None if out is None else check_out(out, overwrite=False, grids=False)
    asked = _read_length(length)
    use_threads(threads)
    import numpy as np
    from rich.console import Console

    from ..evaluation.inpainting import PickedLength, pick_length
    from ..evaluation.inpainting import inpaint as fill
    from ..evaluation.labels import labels_of
    from ..learning.run.progress import working
    from ..models.occlusions import KINDS, occlusion, read_mask

    model, config = open_model(run, device, "inpaint")
    if asked is not None and asked != 1 and not model.sampling:
        raise ValueError(
            f"--length: must be 1 for {run}, a {type(model).__name__} without chains of images, got {asked}"
        )
    if asked is not None and (steps := max((chain.steps for chain in model.chains(asked)), default=0)) >= 2**32:
        raise ValueError(
            f"--length: must leave every chain fewer than 2**32 steps, got {asked:g}, which makes {steps:g}"
        )
    size = model.sizes[-1]
    given = None if mask in KINDS else read_mask(mask, size)
    part = images_of(run, model, config, data)
    if part.keywords["like"]:
        part(split="train")  # to report what differs
    images = part(split="held_out")
    if not len(images):
        raise ValueError(f"--data: must hold out images to fill, got none held out of {images.name}")
    chosen = np.random.default_rng(seed).permutation(len(images))[:num]
    if given is not None and len(given) not in (1, len(chosen)):
        raise ValueError(f"--mask: must hold one mask, or one for each of the {len(chosen)} images, got {len(given)}")
    notes = [f"only {len(images)} held-out images"] if len(images) < num else []
    labels = labels_of(model, images, chosen)
    if labels is None and bool(getattr(model, "classes", ())):
        notes.append("classes are drawn, not those of the images, which have no labels of the model's classes")
    training = None
    if asked is None and model.sampling:
        training, why = _training_images(run, model, config, seed, data if part.keywords["like"] else None)
        if training is None and length is not None:
            raise ValueError(f"--length: auto must have images that {run} was trained on, but {why}")
        notes += [] if training is not None else [f"length 1, a sample's: {why}"]
    with working(f"filling {len(chosen)} images") as tell:
        picked = PickedLength(1.0 if asked is None else asked)
        if training is not None:
            typer.echo(
                f"picking the length of the chains on {len(training)} training images (--length 1 does not)", err=True
            )
            picked = pick_length(
                model, training.batch(slice(None)), mask if given is None else given,
                labels=labels_of(model, training, slice(None)), seed=seed, precision=precision, report=tell,
            )  # fmt: skip
            tell(f"filling {len(chosen)} images")
        hidden = occlusion(mask, len(chosen), size, seed=seed) if given is None else given
        result = fill(
            model, images.batch(chosen), hidden, labels=labels, seed=seed, length=picked.length, precision=precision
        )

    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        _WRITERS[str(kind)](out, result)
        typer.echo(f"{run}, {mask} on {len(chosen)} held-out images of {images.name}: {out}", err=True)
    figures = {"mask": mask, "data": images.name, "seed": seed, **result.figures(), **picked.figures(), "notes": notes}
    if json:
        print_json(figures)
        return
    Console().print(_table(figures))
    for note in notes:
        typer.echo(f"note  {note}", err=True)


def _read_length(text: str | None) -> float | None:
    """The number that `--length` gives; None where the length is to be picked."""
    if text in (None, "auto"):
        return None
    try:
        length = float(text)
    except ValueError:
        length = math.nan
    if not 0 < length < math.inf:
        raise ValueError(f"--length: must be auto or a finite number > 0, got {text!r}")
    return length


def _training_images(
    run: Path, model: Model, config: TrainConfig | None, seed: int, data: str | None = None
) -> tuple[ImageData | None, str]:
    """What the length is picked on; None, and why, where the run's training images, which may lie at `data` now, cannot
    be read."""
    from ..errors import DataError
    from ..evaluation.inpainting import LENGTH_IMAGES

    if config is None or not config.data:
        return None, f"{run} does not say what it was trained on"
    try:
        # Only what is needed is read: where every image can be decoded, those that `length_images` takes of all.
        images = images_of(run, model, config, data)(split="train", most=LENGTH_IMAGES, seed=seed)
    except (DataError, OSError, ImportError) as error:
        why = error.words if isinstance(error, DataError) else error
        return None, f"its training images cannot be read: {why}"
    return images, ""


def _table(figures: dict):
    from ..tables import console_table, number

    share = f"{figures['occluded_share']:.0%} of the pixels hidden ({figures['mask']}), {figures['num']} images"
    tried = [
        f"{length}: diverged" if error is None else f"{length}: {error:.4f}"
        for length, error in figures["length_errors"].items()
    ]
    chains = f"chains {figures['length']:g} × as long as a sample's"
    if tried:
        chains += f", picked on {figures['length_images']} training images by error ({', '.join(tried)})"
    rows = [
        (name, *(number(figures[f"{key}{of}"], form) for of in ("", "_mean_fill")), reading)
        for key, name, form, reading in (
            ("error", "error", "{:.4f}", "share of the range; lower is better"),
            ("psnr", "PSNR (dB)", "{:.2f}", "of the whole image; higher is better"),
        )
    ]
    return console_table(
        share, ("figure", "model", "mean fill", "reading"), rows, left=(0, 3), caption=chains, caption_justify="left"
    )


def _write_png(out: Path, result) -> None:
    from ..pictures import save_png

    save_png(out, result.picture(SHOWN))


def _write_npy(out: Path, result) -> None:
    from ..files import write_npy

    write_npy(out, result.completed.numpy())


_WRITERS = {".png": _write_png, ".npy": _write_npy}
