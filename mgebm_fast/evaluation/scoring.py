"""Energies of images as scores: where they lie among those of the training images, and whether they tell sets apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import ImageData
from ..errors import Refused
from ..models import EnergyModel
from ..tables import console_table, note, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

SUM = "sum"
CAVEAT = (
    "low energy is not quality: a blank or smooth image may lie below every training image; far below is as untypical "
    'as far above, which is what "typical" measures (docs/scoring.md)'
)
_CHUNK = 1024  # images whose pixels are on the device at a time
_ROWS = 20  # images that are listed on the console
_SHORT = 14  # characters that a name has at least, where tables are narrow


@dataclasses.dataclass(frozen=True)
class Scores:
    """The energies of a set of images."""

    name: str
    names: tuple[str, ...]  # (N,) of the images in their source
    energies: dict[str, np.ndarray]  # (N,) float64 by size, "2", "4", …, and their "sum"

    def __len__(self) -> int:
        return len(self.energies[SUM])


def score(model: EnergyModel, images: ImageData, *, reference: bool = False) -> Scores:
    """The energies of images at every size of a model and their sum, as `model.energies` has them.

    A model with batch statistics is read under its running ones (`freeze_norm`), so that an image's energy is its own.
    ValueError for images of another shape than the model's, or none.
    """
    shape = (model.channels, model.sizes[-1], model.sizes[-1])
    if images.images.shape[1:] != shape or not len(images):
        raise Refused("images", f"be at least one of shape {shape}, as the model's", images.images.shape, "score")
    model = model.freeze_norm() if model.coupled else model
    parts = [
        model.energies(images.batch(slice(i, i + _CHUNK)), reference=reference) for i in range(0, len(images), _CHUNK)
    ]
    found = {str(size): torch.cat([part[size] for part in parts]).double().cpu().numpy() for size in parts[0]}
    names = images.names or tuple(map(str, range(len(images))))
    return Scores(images.name, names, {**found, SUM: sum(found.values(), np.zeros(len(images)))})


def percentile(energies: np.ndarray, among: np.ndarray) -> np.ndarray:
    """(N,) in [0, 100]: the share of `among` (M,) below each energy, those equal to it counted by half."""
    ordered = np.sort(among)
    below, upto = (np.searchsorted(ordered, energies, side=side) for side in ("left", "right"))
    return (below + upto) * (50.0 / len(ordered))


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    """P(a value of `outside` > one of `inside`) + P(equal)/2: 1 where `outside` lies above throughout, 0.5 by chance.

    The area under the curve of true over false positives of the rule "above a threshold is outside".
    """
    return float(percentile(outside, inside).mean() / 100)


def compare(scored: Scores, training: Scores | None, against: Scores | None) -> dict[str, Any]:
    """The figures of a set in plain JSON types.

    name, num
    mean             of the energies, by size and "sum"
    percentile       median over the images of their place among the training images' sums; null without them
    auroc            of this set against `against`, by size and "sum": high energy means outside; null without it
    auroc["typical"] the same of |sum − median of the training images' sums|: far on either side means outside
    images           name, energies, percentile of each
    """
    ranks = None if training is None else percentile(scored.energies[SUM], training.energies[SUM])
    areas: dict[str, float] | None = None
    if against is not None:
        areas = {key: auroc(against.energies[key], values) for key, values in scored.energies.items()}
        if training is not None:
            middle = np.median(training.energies[SUM])
            areas["typical"] = auroc(abs(against.energies[SUM] - middle), abs(scored.energies[SUM] - middle))
    images = [
        {
            "name": name,
            "energies": {key: float(values[i]) for key, values in scored.energies.items()},
            "percentile": None if ranks is None else float(ranks[i]),
        }
        for i, name in enumerate(scored.names)
    ]
    return {
        "name": scored.name,
        "num": len(scored),
        "mean": {key: float(values.mean()) for key, values in scored.energies.items()},
        "percentile": None if ranks is None else float(np.median(ranks)),
        "auroc": areas,
        "images": images,
    }


def in_order(images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The images of `compare` by their sums, lowest first."""
    return sorted(images, key=lambda image: float(image["energies"][SUM]))


def rows_of(sets: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row an image for a CSV file: set, name, energy_<size> …, sum, percentile."""
    return [
        {
            "set": one["name"],
            "name": image["name"],
            **{key if key == SUM else f"energy_{key}": value for key, value in image["energies"].items()},
            "percentile": image["percentile"],
        }
        for one in sets
        for image in one["images"]
    ]


def format_scores(result: dict[str, Any], width: int | None = None) -> RenderableType:
    """Tables of `mgebm score`'s result, for a rich console's `print`: the images, the sets, and the sets' AUROCs.

    A table that would not fit into `width` characters with names folded has the sum alone, and a note says so.
    """
    from rich.console import Console, Group

    every, tables, notes = [*map(str, result["sizes"]), SUM], [], list(result["notes"])
    for build in (_images, _sets, _areas):
        keys = every
        if width is not None and Console(width=10_000).measure(build(result, every, _SHORT)).maximum > width:
            keys = [SUM]
        tables.append(build(result, keys, None))
        if keys != every and len(notes) == len(result["notes"]):
            notes.append(f"figures of each size take more than {width} characters a line: --csv and --json have them")
    return Group(*tables, *(note("note", words) for words in notes))


def _images(result: dict[str, Any], keys: Sequence[str], most: int | None) -> Table:
    """The first images of each set, with the energies of `keys`; names are cut to `most` characters."""
    sets, letter = result["sets"], "U" if result["reference"] else "E"
    heads = [f"{letter} {key}" if key == SUM else f"{letter} {key}×{key}" for key in keys]
    each = max(3, _ROWS // len(sets))
    rows = [
        [one["name"][:most], image["name"][:most], *(f"{image['energies'][key]:.3f}" for key in keys),
         number(image["percentile"], "{:.1f}")]
        for one in sets for image in one["images"][:each]
    ]  # fmt: skip
    count = sum(one["num"] for one in sets)
    title = f"{count} image{'s' * (count != 1)}"
    if count > len(rows):
        title += f", the first {each} of a set (--csv and --json have all)"
    headings = ["set", "image", *heads, "percentile"]
    return console_table(title, headings, rows, left=(0, 1), no_wrap=range(2, len(headings)))


def _sets(result: dict[str, Any], keys: Sequence[str], most: int | None) -> Table:
    rows = [
        [one["name"][:most], str(one["num"]), f"{one['mean'][SUM]:.3f}", number(one["percentile"], "{:.1f}")]
        for one in result["sets"]
    ]
    headings = ["set", "images", f"mean {'U' if result['reference'] else 'E'}", "percentile"]
    return console_table("sets", headings, rows, no_wrap=range(1, 4))


def _areas(result: dict[str, Any], keys: Sequence[str], most: int | None) -> Table | str:
    against = result["against"]
    if against is None:
        return ""
    shown = [key for key in result["sets"][0]["auroc"] if key in (*keys, "typical")]
    rows = [[one["name"][:most], *(f"{one['auroc'][key]:.3f}" for key in shown)] for one in result["sets"]]
    headings = ["set", *(f"{key}×{key}" if key.isdigit() else key for key in shown)]
    title = f"AUROC against {against['num']} image{'s' * (against['num'] != 1)} of {against['name']}"
    return console_table(title, headings, rows, no_wrap=range(1, len(headings)))
