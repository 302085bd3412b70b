"""Clips: windows of one recording, a video or a sound, in the place of a set of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from . import fingerprint


@dataclass(frozen=True, eq=False, repr=False)
class Clips:
    """Clip i is `length` frames, or samples, of the recording, from i·hop on; none is copied before it is asked for.

    A clip is (C, T, H, W) of a video and (C, L) of a sound: time is the first of the spatial dimensions.
    """

    recording: np.ndarray  # (C, total, H, W) uint8, or (C, total) float32 in [-1, 1]
    length: int
    hop: int = 1
    rate: float = 1.0  # frames or samples a second
    name: str = "recording"
    skipped: tuple[tuple[str, str], ...] = ()  # as of `ImageData`: a recording is read whole or not at all

    def __post_init__(self) -> None:
        kind = (self.recording.dtype, self.recording.ndim)
        if kind not in ((np.dtype(np.uint8), 4), (np.dtype(np.float32), 2)):
            raise ValueError(f"Clips: recording must be uint8 (C, T, H, W) or float32 (C, L), got {kind}")
        for name, value in (("length", self.length), ("hop", self.hop)):
            if value < 1:
                raise ValueError(f"Clips: {name} must be at least 1, got {value}")
        total = self.recording.shape[1]
        if total < self.length:
            unit = "frames" if self.is_video else "samples"
            raise DataError(f"{self.name} must have at least {self.length} {unit}, got {total}")

    def __repr__(self) -> str:
        unit = "frames" if self.is_video else "samples"
        clip = " × ".join(map(str, (self.channels, *self.shape)))
        return f"Clips({self.name}: {len(self)} of {self.recording.shape[1]} {unit}, {clip} each)"

    @property
    def is_video(self) -> bool:
        return self.recording.ndim == 4

    def __len__(self) -> int:
        return (self.recording.shape[1] - self.length) // self.hop + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(T, H, W) or (L,) of a clip."""
        return (self.length, *self.recording.shape[2:])

    @property
    def size(self) -> int:
        return self.shape[-1]

    @property
    def channels(self) -> int:
        return self.recording.shape[0]

    def batch(self, indices: Tensor | np.ndarray | Sequence[int]) -> Tensor:
        """A copy of some clips, (n, C, T, H, W) uint8 or (n, C, L) float32. IndexError for one outside [0, N)."""
        starts = [int(i) for i in indices]
        if any(not 0 <= i < len(self) for i in starts):
            raise IndexError(f"Clips: indices must be in [0, {len(self)}), got {starts}")
        parts = [self.recording[:, i * self.hop : i * self.hop + self.length] for i in starts]
        return torch.from_numpy(
            np.stack(parts) if parts else np.empty((0, self.channels, *self.shape), self.recording.dtype)
        )

    def colours(self) -> Tensor:
        """The mean of each channel over the recording on the 0 … 255 scale, (1, C) float32; 127.5 is a sound's zero."""
        if not self.is_video:
            return torch.full((1, self.channels), 127.5)
        return torch.from_numpy(self.recording.mean(axis=(1, 2, 3), dtype=np.float64)[None]).float()

    def fingerprint(self) -> dict[str, Any]:
        """What tells this recording from others, for a JSON file: `data.fingerprint` has its keys."""
        return fingerprint.of_recording(self.recording, self.shape, self.rate)
