"""In-painting: a model fills what an occlusion hides, and is measured against what was there."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sampling import Model

HIDDEN = (92, 124, 178)  # the colour of occluded pixels in pictures: one that neither ink nor paper has


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

    def figures(self) -> dict[str, Any]:
        """Means over the images in plain JSON types; null for a mean that is not finite."""
        occluded = self.mask.double().mean()
        found = {
            "num": len(self.error),
            "occluded_share": float(occluded),
            "error": float(self.error.mean()),
            "error_std": float(self.error.std()) if len(self.error) > 1 else None,
            "psnr": float(self.psnr.mean()),
            "error_mean_fill": float(self.error_mean_fill.mean()),
            "psnr_mean_fill": float(self.psnr_mean_fill.mean()),
        }
        return {key: value if value is None or math.isfinite(value) else None for key, value in found.items()}

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
    seed: int = 0,
    first_sample: int = 0,
    precision: str = "auto",
) -> Inpainted:
    """Fill the occluded pixels of every image by the model's own chains, with the known pixels held.

    Known pixels are never touched by an update; at coarser sizes of a cascade a cell is held, at the mean of its
    block's known pixels, where it has any. Image i is completed with the noise of sample first_sample + i.

        error = mean over occluded pixels and channels of |x − x̂| / (hi − lo)
        PSNR = 10 log₁₀( (hi − lo)² / mean over all pixels of (x − x̂)² )

    Raises ValueError: shapes that do not fit the model, or an image with nothing occluded; DivergenceError.
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
    known = model.from_uint8(images.to(device))
    filled = model.sample(
        shape[0], seed=seed, first_sample=first_sample, mask=mask.to(device), known=known, precision=precision
    )
    assert isinstance(filled, Tensor)
    low, high = model.value_range
    completed = model.to_uint8(filled).cpu()
    x = images.double() / 255.0
    fill = ((filled.double() - low) / (high - low)).clamp(0.0, 1.0).cpu()
    rest = (~mask).double()
    count = rest.sum((2, 3), keepdim=True)
    grey = torch.where(count > 0, (x * rest).sum((2, 3), keepdim=True) / count.clamp(min=1), 0.5)
    twin = torch.where(mask, grey, x)
    return Inpainted(images.cpu(), mask, completed, *_measure(x, fill, mask), *_measure(x, twin, mask))


def _measure(x: Tensor, fill: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(error, PSNR) of each image, values in [0, 1]."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    hidden = mask.double()
    error = ((x - fill).abs() * hidden).sum((1, 2, 3)) / (hidden.sum((1, 2, 3)) * x.shape[1])
    psnr = [peak_signal_noise_ratio(b[None], a[None], data_range=1.0) for a, b in zip(x, fill, strict=True)]
    return error, torch.stack(psnr)


def _as_rgb(images: Tensor) -> Tensor:
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
