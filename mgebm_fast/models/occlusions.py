"""Which pixels in-painting has to fill: squares, doodles, pepper, or a mask from a file.

Masks are bool (N, 1, S, S), True where a pixel is occluded, the same for all channels. Those that are drawn are a
function of (seed, sample id) and the kind, from the noise stream OCCLUSION; always made on the CPU.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import noise, ops
from ..checks import one_of
from ..data.arrays import read_npy
from ..data.foreign import MAX_FILE_BYTES, bounded_bytes, check_regular, reading
from ..data.policy import read_grey
from ..errors import DataError, suggest

KINDS = ("square", "doodle", "pepper")
DOODLE_SHARE, PEPPER_SHARE = 0.25, 0.6
_PACE = 0.5  # pixels between two stamps of the brush
_CHUNK = 64  # doodles drawn at a time


def occlusion(kind: str, n: int, size: int, *, seed: int = 0, first_sample: int = 0) -> Tensor:
    """n masks (n, 1, S, S) of one kind.

    "square":  side S // 2, anywhere in the image with equal probability
    "doodle":  strokes of a round brush, S/14 pixels wide and at least 1.2, that wander and turn back at the borders,
               up to a quarter of the pixels and not a stamp further
    "pepper":  60 % of the pixels, every choice of them equally probable

    Source: the three occlusions of Gao, Lu, Zhou, Zhu, Wu (CVPR 2018), §4.5; the drawing is our own.
    """
    one_of(kind, KINDS, "kind", "occlusion")
    if n < 1 or size < 2:
        raise ValueError(f"occlusion: n must be at least 1 and size at least 2, got {n} and {size}")
    draw = {"square": _squares, "doodle": _doodles, "pepper": _pepper}[kind]
    return draw(n, size, seed, first_sample)[:, None]


def _uniforms(kind: str, shape: tuple[int, int], seed: int, first_sample: int, distribution: str = "uniform") -> Tensor:
    """Draws for one kind of mask; the step counter keeps kinds and distributions apart."""
    step = 2 * KINDS.index(kind) + (distribution == "normal")
    return ops.noise(
        shape, seed=seed, step=step, first_sample=first_sample, stream=noise.stream(noise.Purpose.OCCLUSION),
        distribution=distribution,
    )  # fmt: skip


def _squares(n: int, size: int, seed: int, first_sample: int) -> Tensor:
    side = size // 2
    places = size - side + 1
    corner = (_uniforms("square", (n, 2), seed, first_sample) * places).long().clamp(max=places - 1)
    inside = torch.arange(size) - corner[:, :, None]  # (n, 2, S), from the square's first row and column
    rows, columns = ((inside >= 0) & (inside < side)).unbind(1)
    return rows[:, :, None] & columns[:, None, :]


def _pepper(n: int, size: int, seed: int, first_sample: int) -> Tensor:
    bits = _uniforms("pepper", (n, size**2), seed, first_sample, "bits")
    chosen = torch.argsort(bits, dim=1, stable=True)[:, : max(1, round(PEPPER_SHARE * size**2))]
    return torch.zeros(n, size**2, dtype=torch.bool).scatter_(1, chosen, True).reshape(n, size, size)


def _doodles(n: int, size: int, seed: int, first_sample: int) -> Tensor:
    return torch.cat([_doodle(min(_CHUNK, n - i), size, seed, first_sample + i) for i in range(0, n, _CHUNK)])


def _doodle(n: int, size: int, seed: int, first_sample: int) -> Tensor:
    radius = max(0.6, size / 28)
    stroke = math.ceil(0.75 * size / _PACE)  # stamps to a stroke
    strokes = math.ceil(4 * DOODLE_SHARE * size**2 / (2 * radius * stroke * _PACE))  # with room for what overlaps
    start = _uniforms("doodle", (n, 3 * strokes), seed, first_sample).double().reshape(n, strokes, 3, 1)
    turns = _uniforms("doodle", (n, strokes * stroke), seed, first_sample, "normal").double()
    # A heading wanders by about one radian over a quarter of the side.
    heading = 2 * math.pi * start[:, :, 2] + math.sqrt(4 * _PACE / size) * turns.reshape(n, strokes, stroke).cumsum(2)
    along = torch.stack([heading.sin(), heading.cos()], 2).cumsum(3) * _PACE
    path = (size * start[:, :, :2] + along).transpose(2, 3).reshape(n, -1, 2)
    path = size - (path.remainder(2 * size) - size).abs()  # turned back at the borders

    # The stamp that covers a pixel first, by scattering the few pixels around each stamp.
    reach = math.ceil(radius)
    offsets = torch.cartesian_prod(torch.arange(-reach, reach + 1), torch.arange(-reach, reach + 1))
    pixels = path.floor().long()[:, :, None] + offsets  # (n, stamps, offsets, 2)
    near = (pixels + 0.5 - path[:, :, None]).square().sum(3) <= radius**2
    near &= ((pixels >= 0) & (pixels < size)).all(3)
    stamps = path.shape[1]
    when = torch.where(near, torch.arange(stamps)[:, None], stamps).reshape(n, -1)
    index = (pixels[..., 0] * size + pixels[..., 1]).clamp(0, size**2 - 1).reshape(n, -1)
    first = torch.full((n, size**2), stamps).scatter_reduce_(1, index, when, "amin")
    enough = first.sort(1).values[:, round(DOODLE_SHARE * size**2) - 1].clamp(max=stamps - 1)
    return (first <= enough[:, None]).reshape(n, size, size)


def _hidden(values: np.ndarray) -> np.ndarray:
    """Where numbers are not 0; ValueError for what is neither true, false nor a number."""
    if values.dtype.kind not in "biuf":
        raise ValueError(f"it must hold bools or numbers, got {values.dtype}")
    if values.dtype.kind == "f" and np.isnan(values).any():
        raise ValueError("it must hold bools or numbers, got NaN")
    return values != 0


def read_mask(path: str | os.PathLike[str], size: int) -> Tensor:
    """A mask (1 or N, 1, S, S) from an .npy file or a picture: occluded where it is True, non-zero or bright (≥ 128).

    An .npy file holds (S, S) or (N, S, S), bool or numbers; a picture is read in grey. DataError where there is none,
    or of another size.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"must be one of {', '.join(KINDS)} or a file, got {path}{suggest(str(path), KINDS)}", "mask")
    check_regular(path, MAX_FILE_BYTES, what="mask")
    with reading(path, "a picture or an .npy array", what="mask"):
        if path.suffix.lower() == ".npy":
            values = _hidden(read_npy(path, "mask"))
        else:
            values = read_grey(bounded_bytes(path, what="mask")) >= 128
    masks = values[None] if values.ndim == 2 else values
    if masks.ndim != 3 or masks.shape[1:] != (size, size) or not len(masks):
        raise DataError(f"{path} must be {size} × {size}, as the model's images are, got {tuple(values.shape)}", "mask")
    return torch.from_numpy(masks)[:, None]
