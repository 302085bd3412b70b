"""What a data source becomes: uint8 images of one size, and labels where the source has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import fingerprint
from .policy import POLICY_VERSION

CHUNK_BYTES = 32 << 20  # what one step over a large set touches at a time


@dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Images in memory, or memory-mapped where they are large; `batch` is the way in for training."""

    images: np.ndarray  # (N, C, S, S) uint8; may be an np.memmap
    labels: np.ndarray | None = None  # (N,) int64, an index into class_names
    class_names: tuple[str, ...] = ()
    name: str = "data"
    skipped: tuple[tuple[str, str], ...] = ()  # (path, reason) of every image left out
    names: tuple[str, ...] = ()  # (N,) the path of each in its folder or archive, or its place in an array
    held_out: tuple[str, ...] = ()  # names of what its source holds out, whichever part this is

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[2] != shape[3]:
            raise ValueError(f"ImageData: images must be uint8 (N, C, S, S), got {self.images.dtype} {tuple(shape)}")
        if self.labels is not None and self.labels.shape != shape[:1]:
            raise ValueError(f"ImageData: labels must be ({shape[0]},), one an image, got {self.labels.shape}")
        if len(self.names) not in (0, shape[0]):
            raise ValueError(f"ImageData: names must be {shape[0]}, one an image, or none, got {len(self.names)}")

    def __repr__(self) -> str:
        labelled = f", {len(self.class_names)} classes" if self.labels is not None else ""
        skipped = f", {len(self.skipped)} skipped" if self.skipped else ""
        shape = " × ".join(map(str, self.images.shape[1:]))
        return f"ImageData({self.name}: {len(self)} images {shape}{labelled}{skipped})"

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def size(self) -> int:
        return self.images.shape[2]

    @property
    def channels(self) -> int:
        return self.images.shape[1]

    def batch(self, indices: Tensor | np.ndarray | Sequence[int] | slice) -> Tensor:
        """A copy of some images, (n, C, S, S) uint8 on the CPU. IndexError for an index outside [-N, N)."""
        return torch.from_numpy(np.array(self.images[_as_index(indices)], order="C"))

    def colours(self) -> Tensor:
        """Mean colour of each image on the 0 … 255 scale, (N, C) float32: its block mean at size 1."""
        out = torch.empty(len(self), self.channels, dtype=torch.float32)
        pixels = self.size**2
        step = max(1, CHUNK_BYTES // (self.channels * pixels))
        for i in range(0, len(self), step):
            sums = self.images[i : i + step].sum(axis=(2, 3), dtype=np.int64)
            out[i : i + step] = torch.from_numpy(sums / pixels)
        return out

    def subset(self, indices: Tensor | np.ndarray | Sequence[int] | slice) -> ImageData:
        """Some of the images with their labels, in the order given; a slice shares memory, other indices copy."""
        index = _as_index(indices)
        labels = None if self.labels is None else self.labels[index]
        names = tuple(np.array(self.names, object)[index]) if self.names else ()
        return replace(self, images=self.images[index], labels=labels, names=names)

    def fingerprint(self) -> dict[str, Any]:
        """What tells these images from others, for a JSON file: `data.fingerprint` has its keys. Reads all pixels."""
        return fingerprint.of_images(self.images, self.names, self.held_out, POLICY_VERSION)


def _as_index(indices: Tensor | np.ndarray | Sequence[int] | slice) -> np.ndarray | slice:
    if isinstance(indices, slice):
        return indices
    if isinstance(indices, Tensor):
        indices = indices.detach().cpu().numpy()
    index = np.asarray(indices)
    if index.size == 0:
        return index.reshape(-1).astype(np.int64)
    if index.ndim != 1 or index.dtype.kind not in "iub":
        raise TypeError(f"ImageData: indices must be one-dimensional integers, got {index.dtype} {index.shape}")
    return index
