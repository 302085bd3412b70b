"""In-painting: a model fills what an occlusion hides, and is measured against what was there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import ImageData
from ..errors import DivergenceError
from ..models import Model
from ..models.occlusions import occlusion

HIDDEN = (92, 124, 178)  # the colour of occluded pixels in pictures: one that neither ink nor paper has
# Lengths of the chains, relative to a sample's. Factors of two suffice, as the error is flat around its minimum: with
# known pixels beside them chains mostly need fewer steps than a sample, and below a quarter they hardly leave the mean.
LENGTHS = (0.25, 0.5, 1.0, 2.0)
LENGTH_IMAGES = 64  # training images that the length is picked on, at most
_TRAINING = (
    3 << 30
)  # first sample id of images filled to pick the length: no noise is shared with those that are measured


@dataclasses.dataclass(frozen=True)
class Inpainted:
    """Images, what was hidden of them, and how a model filled it."""

    original: Tensor  # (N, C, S, S) uint8
    mask: Tensor  # (N, 1, S, S) bool, True = occluded
    completed: Tensor  # (N, C, S, S) uint8; equal to the original where it is known
    error: Tensor  # (N,) float64, mean |difference| on the occluded pixels, as a share of the range of values
    psnr: Tensor  # (N,) float64, dB, of the whole image; inf where nothing differs
    error_mean_fill: Tensor  # the same of images filled with the mean of their known pixels, channel by channel
    psnr_mean_fill: Tensor
    length: float = 1.0  # of the chains, relative to a sample's

    def figures(self) -> dict[str, Any]:
        """Means over the images in plain JSON types; null for a mean that is not finite."""
        occluded = self.mask.double().mean()
        figures = {
            "num": len(self.error),
            "occluded_share": float(occluded),
            "length": self.length,
            "error": float(self.error.mean()),
            "error_std": float(self.error.std()) if len(self.error) > 1 else None,
            "psnr": float(self.psnr.mean()),
            "error_mean_fill": float(self.error_mean_fill.mean()),
            "psnr_mean_fill": float(self.psnr_mean_fill.mean()),
        }
        return {key: value if value is None or math.isfinite(value) else None for key, value in figures.items()}

    def picture(self, most: int = 16) -> np.ndarray:  # (H, W, 3) uint8
        """The first `most` images in three rows: original, occluded, completed."""
        from ..pictures import labelled_panel

        original, completed = (_as_rgb(images[:most]) for images in (self.original, self.completed))
        colour = torch.tensor(HIDDEN, dtype=torch.uint8).reshape(3, 1, 1)
        occluded = torch.where(self.mask[:most], colour, original)
        rows = [("original", original), ("occluded", occluded), ("completed", completed)]
        return labelled_panel(rows, across=1, columns=most, margin=6)


def inpaint(
    model: Model,
    images: Tensor,  # (N, C, S, S) uint8
    mask: Tensor,  # bool, broadcastable to (N, 1, S, S), True = occluded
    *,
    labels: Tensor | None = None,  # (N,) int64, the class of each, of a class-conditional model
    seed: int = 0,
    first_sample: int = 0,
    length: float = 1.0,
    precision: str = "auto",
) -> Inpainted:
    """Fill the occluded pixels of every image by the model's own chains, with the known pixels held.

    Known pixels are never touched by an update; at coarser sizes of a cascade a cell is held, at the mean of its
    block's known pixels, where it has any. Image i is completed with the noise of sample first_sample + i. The chain of
    a grid takes max(1, round(length · K)) steps, where that of a sample takes K. A class-conditional model without
    `labels` draws classes as for samples, whatever the images show: `labels.labels_of` has those of a data set.

        error = mean over occluded pixels and channels of |x − x̂| / (hi − lo)
        PSNR = 10 log₁₀( (hi − lo)² / mean over all pixels of (x − x̂)² )

    Raises ValueError: shapes that do not fit the model, labels that are not of its classes, an image with nothing
    occluded, or a length other than 1 for a model whose images go through no chain; DivergenceError.
    """
    shape = (len(images), model.channels, model.sizes[-1], model.sizes[-1])
    if images.dtype != torch.uint8 or tuple(images.shape) != shape or not len(images):
        raise ValueError(
            f"inpaint: images must be uint8 (N, {shape[1]}, {shape[2]}, {shape[3]}), got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"inpaint: mask must be bool, True = occluded, got {mask.dtype}")
    flat = (shape[0], 1, *shape[2:])
    try:
        mask = mask.cpu().broadcast_to(flat)
    except RuntimeError:
        raise ValueError(f"inpaint: mask must broadcast to {flat}, got {tuple(mask.shape)}") from None
    empty = (~mask.flatten(1).any(1)).nonzero()
    if len(empty):
        raise ValueError(f"inpaint: mask must occlude a pixel of every image, got none in image {int(empty[0])}")
    device = model.colours.device
    labels = None if labels is None else model._check_labels(labels, shape[0], "inpaint")
    known = model.from_uint8(images.to(device))
    filled = model.sample(
        shape[0], seed=seed, first_sample=first_sample, mask=mask.to(device), known=known, labels=labels,
        length=length, precision=precision,
    )  # fmt: skip
    assert isinstance(filled, Tensor)
    low, high = model.value_range
    completed = model.to_uint8(filled).cpu()
    x = images.double() / 255.0
    fill = ((filled.double() - low) / (high - low)).clamp(0.0, 1.0).cpu()
    rest = (~mask).double()
    count = rest.sum((2, 3), keepdim=True)
    grey = torch.where(count > 0, (x * rest).sum((2, 3), keepdim=True) / count.clamp(min=1), 0.5)
    grey_fill = torch.where(mask, grey, x)
    figures = (*_measure(x, fill, mask), *_measure(x, grey_fill, mask))
    return Inpainted(images.cpu(), mask, completed, *figures, length=float(length))


@dataclasses.dataclass(frozen=True)
class PickedLength:
    """The length of in-painting chains, and the errors that it was picked by."""

    length: float = 1.0
    errors: dict[float, float | None] = dataclasses.field(default_factory=dict)  # length -> error; None: it diverged
    num: int = 0  # images that were filled; 0 where there was nothing to pick

    def figures(self) -> dict[str, Any]:
        """In plain JSON types."""
        errors = {f"{length:g}": error for length, error in self.errors.items()}
        return {"length": self.length, "length_errors": errors, "length_images": self.num}


def length_images(training: ImageData, seed: int = 0) -> Tensor:  # (n, C, S, S) uint8
    """The training images that `pick_length` is given: up to 64, by a permutation that is a function of the seed."""
    return training.batch(length_rows(training, seed))


def length_rows(training: ImageData, seed: int = 0) -> np.ndarray:
    """Which images `length_images` takes."""
    return np.random.default_rng(seed).permutation(len(training))[:LENGTH_IMAGES]


def pick_length(
    model: Model,
    images: Tensor,  # (N, C, S, S) uint8, of the training images
    mask: str | Tensor,  # a kind of `occlusion`, or bool (1 or M, 1, S, S), used in turn
    *,
    labels: Tensor | None = None,  # as of `inpaint`
    seed: int = 0,
    precision: str = "auto",
    report: Callable[[str], None] = lambda text: None,
) -> PickedLength:
    """The length among `LENGTHS` that fills occlusions of training images with the least error; a sample's length, 1,
    unless that is better by more than twice the standard error of the mean difference over the images.

    A chain that starts beside known pixels begins nearer to the data than a sample's, and a short-run chain goes past
    the data where it runs on, so a sample's length is seldom the best. Never pass held-out images: the figures
    measured on them would then be chosen by them.

    All lengths fill the same masks from the same noise, that of sample ids of their own; the result is a function of
    the arguments. A model whose images go through no chain has length 1.

    Raises ValueError as `inpaint`; DivergenceError where every length diverges.
    """
    if not model.sampling:
        return PickedLength()
    if isinstance(mask, str):
        hidden = occlusion(mask, len(images), model.sizes[-1], seed=seed, first_sample=_TRAINING)
    else:
        hidden = mask.reshape(*(1,) * (4 - mask.dim()), *mask.shape)
        hidden = hidden[torch.arange(len(images)) % len(hidden)]
    errors: dict[float, Tensor] = {}  # length -> error of each image, for lengths that do not diverge
    failure = None
    for number, length in enumerate(LENGTHS, start=1):
        report(f"picking the length of the chains: {length:g} of a sample's ({number} of {len(LENGTHS)})")
        try:
            filled = inpaint(
                model, images, hidden, labels=labels, seed=seed, first_sample=_TRAINING, length=length,
                precision=precision,
            )  # fmt: skip
            errors[length] = filled.error
        except DivergenceError as error:
            failure = error
    if failure is not None and not errors:
        raise failure
    best = min(errors, key=lambda length: float(errors[length].mean()))
    if best != 1 and 1.0 in errors:
        # A few memorised training images must not decide: the gain must exceed two standard errors.
        gain = errors[1.0] - errors[best]
        doubt = 2 * float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
        best = best if float(gain.mean()) > doubt else 1.0
    means = {length: float(errors[length].mean()) if length in errors else None for length in LENGTHS}
    return PickedLength(best, means, len(images))


def _measure(x: Tensor, fill: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(error, PSNR) of each image, values in [0, 1]."""
    hidden = mask.double()
    error = ((x - fill).abs() * hidden).sum((1, 2, 3)) / (hidden.sum((1, 2, 3)) * x.shape[1])
    return error, -10 * (x - fill).square().mean((1, 2, 3)).log10()


def _as_rgb(images: Tensor) -> Tensor:
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
