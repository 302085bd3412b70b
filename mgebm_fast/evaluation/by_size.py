"""Which net of a multi-grid model is to blame: KID at every size, of chains that begin at held-out images of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..data import ImageData
from ..errors import Refused
from ..models import Model, MultiGrid
from ..sampling.cascade import cascade
from ..tables import console_table, note, number
from .distances import KID_SUBSET_SIZE, alike, kid
from .evaluate import check_varied, chosen_of, stage
from .features import check_kind, feature_space
from .labels import labels_of, names_of

if TYPE_CHECKING:
    from rich.console import RenderableType

SMALLEST = 4  # the smallest size whose images are judged


def evaluate_by_size(
    model: Model,  # a `MultiGrid`
    train: ImageData,
    held_out: ImageData,
    *,
    num: int = 1000,
    seed: int = 0,
    features: str = "auto",
    precision: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """KID of a model's chains at every size from 4×4 on, by where the cascade begins.

    It begins at the model's own colours, as samples do, and at the block means of `num` held-out images at each size
    but the finest. Chains above are those of a sample, without V-cycles. KID at a size, of chains begun at the size
    below, is the error of that size's own net; what samples have beyond it comes from coarser ones.

    Returns a dict that JSON can hold: num, feature_space, sizes (those that are judged), kid: {where it begins: {size:
    KID}}, kid_real: {size: KID of the held-out images themselves}; sizes and beginnings are keys like "8", the model's
    own colours "1". Judges are those of `evaluate`, fitted at each size. KID is null where a size's features
    do not tell the training images apart, and a note says so.

    Raises Refused for a model that is no MultiGrid or has no size from 4 on, and where a class-conditional one is given
    held-out images without labels of its classes; ValueError as `evaluate` does.
    """
    where = "evaluate_by_size"
    if not isinstance(model, MultiGrid) or model.sizes[-1] < SMALLEST:
        raise Refused("model", f"be a MultiGrid with a size of at least {SMALLEST}", repr(type(model).__name__), where)
    check_kind(features)
    check_varied(where, train)
    if len(held_out) < 2:
        raise Refused("held_out", "hold at least two images", len(held_out), where)
    chosen = chosen_of(held_out, num, seed)
    labels = _labels(model, held_out, chosen, where) if model.classes else None
    judged = [size for size in model.sizes[1:] if size >= SMALLEST]
    real = dict(zip(model.sizes[1:], _means(held_out.images[chosen], model.sizes[1:]), strict=True))
    seconds: dict[str, float] = {}
    options: dict[str, Any] = {"seed": seed, "precision": precision}
    drawn: dict[int, dict[int, Tensor]] = {}
    for begin in model.sizes[:-1]:
        with stage(f"chains begun at {begin}×{begin}", f"from {begin}", seconds, progress):
            if begin == 1:
                with model.without_cycles():
                    grids = list(model.sample(len(chosen), return_grids=True, **options))
            else:
                grids = _continued(model, model.from_uint8(real[begin]), labels, **options)
            sizes = model.sizes[-len(grids) :]
            drawn[begin] = {size: model.to_uint8(x) for size, x in zip(sizes, grids, strict=True)}
    result: dict[str, Any] = {
        "num": len(chosen),
        "sizes": judged,
        "kid": {str(b): {} for b in drawn},
        "kid_real": {},
        "notes": [],
    }
    for size in judged:
        (images,) = _means(train.images, [size])
        own = ImageData(images.numpy(), train.labels, train.class_names, train.name)
        its_labels = None if held_out.labels is None else held_out.labels[chosen]
        held = ImageData(real[size].numpy(), its_labels, held_out.class_names, held_out.name)
        with stage(f"KID at {size}×{size}", f"KID {size}", seconds, progress):
            space = feature_space(features, own, held, model.colours.device, seed=seed)
            reference = space.extract(own.images[space.chosen(len(own), seed)])
            options = {"subset_size": min(KID_SUBSET_SIZE, len(reference), len(chosen)), "seed": seed}
            result["feature_space"] = space.name
            if alike(reference):
                result["notes"].append(
                    f"KID at {size}×{size} left out: the feature space does not tell the training images apart"
                )
                for by_size in (result["kid_real"], *(result["kid"][str(b)] for b in drawn if b < size)):
                    by_size[str(size)] = None
                continue
            result["kid_real"][str(size)] = kid(reference, space.extract(held.images), **options)
            for begin, by_size in drawn.items():
                if size > begin:
                    found = space.extract(by_size[size].cpu().numpy())
                    result["kid"][str(begin)][str(size)] = kid(reference, found, **options)
    return result | {"seconds": {key: round(value, 2) for key, value in seconds.items()}}


def _means(images: np.ndarray, sizes: Any) -> list[Tensor]:
    """Block means of images at each size, rounded to uint8."""
    parts = [
        ops.pyramid(torch.from_numpy(np.array(images[i : i + 1000])), list(sizes)) for i in range(0, len(images), 1000)
    ]
    return [torch.cat(part).round().to(torch.uint8) for part in zip(*parts, strict=True)]


def _labels(model: MultiGrid, held_out: ImageData, chosen: np.ndarray, where: str) -> Tensor:
    if (labels := labels_of(model, held_out, chosen)) is None:
        wanted = f"have labels among the model's classes, {', '.join(model.classes)}"
        raise Refused("held_out", wanted, ", ".join(sorted(set(names_of(held_out, chosen)))) or "none", where)
    return labels


def _continued(model: MultiGrid, x: Tensor, labels: Tensor | None, *, seed: int, precision: str) -> list[Tensor]:
    """The results at the sizes from that of x on, of chains of samples that begin at x, in groups as of samples."""
    first = model.sizes.index(x.shape[-1])
    groups = []
    for i in range(0, len(x), model.batch_size):
        start = x[i : i + model.batch_size].contiguous()
        held: dict[str, Any] = {}
        if labels is not None:
            start = model.with_planes(start, labels[i : i + model.batch_size])
            known, mask = model.held_planes(start)
            held = {"known": known, "mask": mask.expand_as(known)}
        groups.append(
            cascade(
                list(model.nets[first:]), model.sizes[first:], model.sampling[first:], start, seed=seed,
                first_sample=i, upsampling=model.upsampling, precision=precision, **held,
            )
        )  # fmt: skip
    return [torch.cat(parts)[:, : model.channels] for parts in zip(*groups, strict=True)]


def format_by_size(result: Mapping[str, Any]) -> RenderableType:
    """The figures of `evaluate_by_size` as a table, for a rich console's `print`."""
    from rich.console import Group

    keys = [str(size) for size in result["sizes"]]
    rows = [
        (
            "the model's colours" if begin == "1" else f"held-out {begin}×{begin}",
            *(number(by_size.get(key), "{:.3f}") for key in keys),
        )
        for begin, by_size in result["kid"].items()
    ]
    rows.append(("held-out images", *(number(result["kid_real"][key], "{:.3f}") for key in keys), "dim"))
    title = f"KID of {result['num']} chains at each size"
    table = console_table(title, ("begun at", *(f"{key}×{key}" for key in keys)), rows, styles=("bold",))
    seconds = ", ".join(f"{key} {value:g}" for key, value in result["seconds"].items())
    notes = [
        ("features", result["feature_space"]),
        *(("note", words) for words in result["notes"]),
        ("seconds", seconds),
    ]
    return Group(table, *(note(*line) for line in notes))
