"""Learning itself: training moves the statistics of samples to those of the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mgebm_fast.data import ImageData
from mgebm_fast.learning import MultiGridTrainer, TrainConfig, merge


def stripes(n: int = 256) -> ImageData:
    """2×2 images of one bright and one dark column, either side bright: what no 1×1 image and no one mean shows."""
    rng = np.random.default_rng(1)
    bright = rng.integers(160, 221, (n, 1, 1))
    dark = rng.integers(40, 101, (n, 1, 1))
    images = np.concatenate([np.broadcast_to(bright, (n, 2, 1)), np.broadcast_to(dark, (n, 2, 1))], axis=2)
    left = rng.random((n, 1, 1)) < 0.5
    return ImageData(np.where(left, images, images[:, :, ::-1]).astype(np.uint8)[:, None])


def statistics(x: torch.Tensor) -> dict[str, float]:
    across = (x[..., 0] - x[..., 1]).flatten(1)  # (N, 2): one difference a row
    return {
        "contrast": float(across.abs().mean()),
        "disagreement of rows": float((across[:, 0] - across[:, 1]).abs().mean()),
        "share bright on the left": float((across.mean(1) > 0).float().mean()),
        "mean": float(x.mean()),
    }


@pytest.mark.parametrize(
    ("variant", "changes", "apart", "rows"),
    [
        ("compact", {}, 0.1, 0.25),
        ("residual", {"steps": 100, "langevin": {"steps": 16}, "optimiser": {"lr": 6e-3}}, 0.25, 0.35),
    ],
)
def test_samples_take_on_the_statistics_of_the_data(variant, changes, apart, rows):
    config = merge(
        TrainConfig(),
        {
            "sizes": [1, 2],
            "width": 0.25,
            "variant": variant,
            "steps": 200,
            "batch_size": 64,
            "langevin": {"steps": 15, "drift": 1.0, "noise_std": 0.05},
            "optimiser": {"lr": 3e-3, "betas": [0.5, 0.999], "schedule": "cosine"},
            "stabilise": {"data_noise": 0.05, "energy_l2": 0.01, "ema": 0.9},
        },
    )
    config = merge(config, changes)
    trainer = MultiGridTrainer(None, stripes(), config, device="cpu", quiet=True)
    data = statistics(trainer.model.from_uint8(stripes().batch(slice(None))))
    before = statistics(trainer.model.sample(512, seed=1))
    trainer.fit()
    after = statistics(trainer.model.sample(512, seed=1))
    # An untrained compact model: 0.73 of contrast, rows that disagree by 1.4, none bright on the left.
    assert before["disagreement of rows"] > 1 and not 0.3 < before["share bright on the left"] < 0.7
    assert abs(before["contrast"] - data["contrast"]) > 0.2 * data["contrast"]
    assert abs(after["contrast"] - data["contrast"]) < apart * data["contrast"]
    assert after["disagreement of rows"] < rows
    assert 0.3 < after["share bright on the left"] < 0.7
    assert abs(after["mean"] - data["mean"]) < 0.05
