"""`mgebm score`: energies of images under a run's model, their place among the training images', and AUROC of sets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError
from .options import (
    Device,
    Json,
    RunPath,
    Threads,
    at_most,
    fingerprint_of,
    images_of,
    lasting,
    load_images,
    open_model,
    print_json,
    use_threads,
)
from .outputs import check_place

if TYPE_CHECKING:
    from ..data import ImageData
    from ..learning import TrainConfig
    from ..models import EnergyModel

MOST_SETS = 1000
TRAINING_IMAGES = 5000  # of the training set, that percentiles are taken among


def score(
    run: RunPath,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES", help="Image files, folders, archives, .npy files or built-in sets; each is a set."
        ),
    ],
    reference: Annotated[
        bool,
        typer.Option("--reference", help="Add the Gaussian reference of chains that have one: U = E + |x - m|²/2σ²."),
    ] = False,
    sort: Annotated[bool, typer.Option("--sort", help="List the images of each set lowest energy first.")] = False,
    split: Annotated[
        str, typer.Option(help="Of IMAGES with parts (digits, folders with train and test): all, train or held_out.")
    ] = "all",
    data: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="The training images. Default: where the run says they are.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME|PATH", help="Images that AUROC sets IMAGES against. Default: the held-out images."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(metavar="X.csv", help="Write one line an image.")] = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="X.png", help="Draw histograms, and the lowest and highest images.")
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Energies of images: at every size and their sum, low where the model finds them likely.

    \b
    Examples:
      mgebm score runs/digits photo.png other.png
      mgebm score runs/digits letters.npy noise.npy --figure scores.png
      mgebm score runs/digits photos/ --sort --csv scores.csv
      mgebm score runs/digits digits --split held_out --json | jq '.sets[0].percentile'

    \b
    What is printed:
      E 8×8, E sum   energies at a size, and their sum. Each has a constant of its own: compare images of one model
      percentile     share of training images (5,000 at most) with a lower sum
      AUROC          how well high energy tells a set from held-out images of the training data: 1 always, 0.5 by chance
      typical        the same of the distance to the training images' median, to either side

    Low energy is not quality, and the lowest energy is not typical: in many dimensions data lie where there is volume,
    not where the density is highest, and a blank image may lie below every training image. A set that is told apart
    with an AUROC near 0 lies below the data. docs/scoring.md says more. For a model with batch normalisation its
    running statistics are taken, so that an image's energy is its own.
    """
    at_most(MOST_SETS, len(images), "images", "sets; a folder of images is one set")
    if figure is not None:
        if figure.suffix.lower() != ".png":
            raise ValueError(f"--figure: must end in .png, got {figure}")
        check_place(figure, "--figure")
        from ..evaluation.plots import new_figure

        new_figure(1, 1)  # where matplotlib is missing, an error before the work
    if csv is not None:
        check_place(csv, "--csv")
    use_threads(threads)
    from ..evaluation import scoring
    from ..files import make_folder, write_bytes
    from ..models import EnergyModel
    from ..tables import csv_text

    model, config = open_model(run, device, "score")
    if not isinstance(model, EnergyModel):
        raise ValueError(f"run: must hold a model with energies, got {run}, a {model.kind}, which is a generator alone")
    notes = [scoring.CAVEAT]
    if model.coupled:
        model = model.freeze_norm()
        notes.append("batch normalisation: under its running statistics, so that an image's energy is its own")
    if reference and all(chain.reference_std is None for chain in model.langevin):
        notes.append("no chain of this model has a Gaussian reference: U is E")
    training, held_out = _learnt_from(model, run, data, config, notes)
    if against is not None:
        held_out = _load(model, against, "all", "--against")
    given = _sets(model, images, split, lambda source: fingerprint_of(run, source, config))
    scored = [scoring.score(model, one, reference=reference) for one in given]
    inside, outside = (
        None if one is None or not len(one) else scoring.score(model, one, reference=reference)
        for one in (training, held_out)
    )
    sets = [scoring.compare(one, inside, outside) for one in scored]
    if sort:
        for one in sets:
            one["images"] = scoring.in_order(one["images"])
    result: dict[str, Any] = {
        "run": str(run),
        "reference": reference,
        "sizes": list(model.sizes[1:]),
        "training": None if inside is None else {"name": inside.name, "num": len(inside)},
        "against": None if outside is None else {"name": outside.name, "num": len(outside)},
        "sets": sets,
        "notes": notes,
    }
    if csv is not None:
        rows = scoring.rows_of(sets)
        make_folder(csv.parent)
        write_bytes(csv, csv_text(list(rows[0]), rows).encode())
    if figure is not None:
        from ..evaluation.score_plot import plot_scores

        make_folder(figure.parent)
        pairs = list(zip(scored, given, strict=True))
        write_bytes(figure, plot_scores(pairs, inside, outside, letter="U" if reference else "E"))
    for path in filter(None, (csv, figure)):
        count = sum(map(len, scored))
        typer.echo(f"{count} image{'s' * (count != 1)} by {run}: {path}", err=True)
    if json:
        print_json(result)
        return
    from rich.console import Console

    console = Console()
    console.print(scoring.format_scores(result, console.width))


def _load(model: EnergyModel, source: str, split: str, what: str, like: dict[str, Any] | None = None) -> ImageData:
    try:
        return load_images(lasting(source), model.sizes[-1], model.channels, split=split, like=like)
    except DataError as error:
        raise error.at(what) from None


def _sets(
    model: EnergyModel, sources: list[str], split: str, like: Callable[[str], dict[str, Any] | None]
) -> list[ImageData]:
    """The sets to score: picture files together are one, and every other source is one. `like(source)` is the
    fingerprint of a run's own, which is divided as it was then."""
    from ..data.policy import EXTENSIONS

    if split not in ("all", "train", "held_out"):
        raise ValueError(f"--split: must be all, train or held_out, got {split!r}")
    files = [source for source in sources if Path(source).suffix.lower() in EXTENSIONS and Path(source).is_file()]
    found = [_pictures(files, model.sizes[-1], model.channels)] if files else []
    for source in sources:
        if source not in files:
            known = None if split == "all" else like(lasting(source))
            found.append(_load(model, source, split, "IMAGES", known))
            if not len(found[-1]):
                raise ValueError(f"IMAGES: must hold images, got none held out of {source}")
    return found


def _pictures(paths: list[str], size: int, channels: int) -> ImageData:
    import numpy as np

    from ..data import ImageData
    from ..data.foreign import bounded_bytes, reading
    from ..data.policy import decode

    images = []
    for path in paths:
        with reading(path, "a picture", what="IMAGES"):
            images.append(decode(bounded_bytes(Path(path), what="IMAGES"), size, channels))
    return ImageData(np.stack(images), name="files", names=tuple(paths))


def _learnt_from(
    model: EnergyModel, run: Path, data: str | None, config: TrainConfig | None, notes: list[str]
) -> tuple[ImageData | None, ImageData | None]:
    """The training images and those held out of them; (None, None) with a note where nobody says where they are, or
    the run's are not there any more."""
    if data is None and config is None:
        notes.append(f"no percentiles: {run} does not say what it was trained on (--data NAME|PATH)")
        return None, None
    try:
        images = images_of(run, model, config, data)
        return images(split="train", most=TRAINING_IMAGES), images(split="held_out")
    except (DataError, OSError, ImportError) as error:
        if data is not None:
            raise
        notes.append(f"no percentiles: the training images cannot be read ({error}); --data says where they are")
        return None, None
