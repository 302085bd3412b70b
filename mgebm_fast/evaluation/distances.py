"""Distances between sets: FID and KID of feature vectors (torchmetrics), and pixel distance to the nearest image."""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

KID_SUBSETS = 100
KID_SUBSET_SIZE = 250


@functools.cache
def _metrics() -> tuple[Any, Any]:
    """torchmetrics' FID and KID classes.

    torchmetrics imports torchvision wherever its metadata says that it is installed, and fails with it where
    torchvision was built for another torch (a CPU torch beside the default torchvision wheel). Neither metric
    needs it, so a torchvision that does not import is hidden while torchmetrics loads.
    """
    from lightning_utilities.core.imports import RequirementCache

    installed = RequirementCache.__bool__

    def without_torchvision(self: Any) -> bool:
        return not str(self.requirement).startswith(("torchvision", "torch_fidelity")) and installed(self)

    try:
        importlib.import_module("torchvision")
        usable = installed
    except Exception:  # absent, or its operators fail to register: RuntimeError, OSError, AttributeError, ...
        usable = without_torchvision
    with mock.patch.object(RequirementCache, "__bool__", usable):
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
    return FrechetInceptionDistance, KernelInceptionDistance


class _Identity(nn.Module):
    """A feature extractor for torchmetrics that passes features through: they are computed once, outside."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def alike(features: Tensor) -> bool:  # (N, D)
    """Whether all rows are the same but for rounding: no distance of distributions can be measured in such features."""
    spread = (features - features.mean(0)).abs().amax()
    return bool(spread <= 1e-9 * features.abs().amax())


def _check(op: str, reference: Tensor, other: Tensor) -> None:
    for name, features in (("reference", reference), ("other", other)):
        if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] != reference.shape[-1]:
            raise ValueError(
                f"{op}: {name} must be (N, D) features of at least two images, with the D of reference, "
                f"got {tuple(features.shape)}"
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError(f"{op}: {name} must be finite, got inf or NaN in its features")
    if alike(reference):
        raise ValueError(f"{op}: reference must hold features that differ, got {len(reference)} rows that are the same")


def fid(
    reference: Tensor,  # (M, D) float64
    other: Tensor,  # (N, D) float64
) -> float:
    """Fréchet distance of the two Gaussians fitted to the features: |μ−μ'|² + tr(Σ + Σ' − 2(ΣΣ')^½).

    ValueError for fewer than two rows, features of different lengths, inf or NaN, or a reference whose rows are all
    the same. A collapsed `other`, all of whose rows are the same, has a distance: its Σ' is 0.
    """
    _check("fid", reference, other)
    metric = _metrics()[0](feature=_Identity(reference.shape[1]))
    metric.update(reference, real=True)
    metric.update(other, real=False)
    # the product of two covariances has rounding-size negative eigenvalues, which can pull a zero below zero
    return max(0.0, _finite("fid", float(metric.compute())))


def _finite(op: str, value: float) -> float:
    if not math.isfinite(value):  # max(0, NaN) is 0, the best value there is
        raise ValueError(f"{op}: features must be small enough for float64, got a distance of {value}")
    return value


def kid(
    reference: Tensor,  # (M, D) float64
    other: Tensor,  # (N, D) float64
    *,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> float:
    """Unbiased squared MMD under k(x, y) = (x·y/D + 1)³, the mean over 100 random subsets of `subset_size`.

    The subsets depend on `seed` alone; torch's global random state is left as it was. ValueError as `fid`, and for
    subsets of fewer than two images or of more than there are.
    """
    _check("kid", reference, other)
    fewest = min(len(reference), len(other))
    if not 2 <= subset_size <= fewest:
        raise ValueError(f"kid: subset_size must be in [2, {fewest}], the images of the smaller set, got {subset_size}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance` will save")
        metric = _metrics()[1](feature=_Identity(reference.shape[1]), subsets=KID_SUBSETS, subset_size=subset_size)
    metric.update(reference, real=True)
    metric.update(other, real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _finite("kid", float(metric.compute()[0]))


def nearest_distance(
    images: np.ndarray,  # (N, C, *spatial) uint8
    train: np.ndarray,  # (M, C, *spatial) uint8
    *,
    chunk_values: int = 2**25,
) -> np.ndarray:  # (N,) float64
    """Each image's distance to its nearest training image: sqrt(mean over pixels and channels of (x − y)²), 0–255.

    |x − y|² = |x|² + |y|² − 2x·y by matrix products in float64, where these whole numbers are exact. Memory is
    bounded by some `chunk_values` float64 values for each of the training block and the table of products.
    ValueError where `train` is empty.
    """
    if len(train) == 0:
        raise ValueError("nearest_distance: train must hold at least one image, got none")
    size = int(np.prod(images.shape[1:]))
    queries = torch.from_numpy(images.reshape(len(images), size).astype(np.float64))
    squares = queries.square().sum(1)
    best = torch.full((len(images),), torch.inf, dtype=torch.float64)
    step = max(1, chunk_values // max(size, len(images), 1))
    for start in range(0, len(train), step):
        block = torch.from_numpy(train[start : start + step].reshape(-1, size).astype(np.float64))
        distance = torch.addmm(squares[:, None] + block.square().sum(1), queries, block.T, alpha=-2)
        best = torch.minimum(best, distance.amin(1))
    return (best.clamp_min(0) / size).sqrt().numpy()
