"""A run small enough to train in milliseconds: grey 4×4 images, three grids, nets of four channels."""

from __future__ import annotations

import numpy as np

from mgebm_fast.data import ImageData
from mgebm_fast.learning import TrainConfig, merge

TINY = {
    "sizes": [1, 2, 4],
    "width": 0.125,
    "steps": 6,
    "batch_size": 8,
    "checkpoint_every": 2,
    "sample_every": 3,
    "log_every": 1,
    "langevin": {"steps": 3, "drift": 1.0, "noise_std": 0.03},
    "rollback": {"attempts": 0},
}


def tiny_data(n: int = 20, size: int = 4, channels: int = 1) -> ImageData:
    images = np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    return ImageData(images)


def tiny_config(**changes) -> TrainConfig:
    return merge(merge(TrainConfig(), TINY), changes)
