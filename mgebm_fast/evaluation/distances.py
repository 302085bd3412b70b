"""Distances between sets: FID and KID of feature vectors, and pixel distance to the nearest image."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

KID_SUBSETS = 100
KID_SUBSET_SIZE = 250


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
    reference, other = reference.double(), other.double()
    apart = (reference.mean(0) - other.mean(0)).square().sum()
    first, second = torch.cov(reference.T, correction=1), torch.cov(other.T, correction=1)
    if first.dim() == 0:  # of one feature
        first, second = first.reshape(1, 1), second.reshape(1, 1)
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        return _finite("fid", math.inf)
    # tr (ΣΣ')^½ by the symmetric Σ^½ Σ' Σ^½, whose eigenvalues are real; rounding makes some of those at 0 negative
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return max(0.0, _finite("fid", float(apart + first.trace() + second.trace() - 2 * product)))


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
    reference, other = reference.double(), other.double()
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(KID_SUBSETS):
        x, y = (part[torch.randperm(len(part), generator=draw)[:subset_size]] for part in (reference, other))
        within = sum(_kernel(part, part).fill_diagonal_(0).sum() for part in (x, y)) / (subset_size * (subset_size - 1))
        found.append(within - 2 * _kernel(x, y).mean())
    return _finite("kid", float(torch.stack(found).mean()))


def _kernel(x: Tensor, y: Tensor) -> Tensor:  # (N, D), (M, D) -> (N, M)
    return (x @ y.T / x.shape[1] + 1).pow(3)


def precision_recall(
    reference: Tensor,  # (M, D) float64
    other: Tensor,  # (N, D) float64
    *,
    neighbours: int = 3,
) -> tuple[float, float]:
    """(precision, recall): the share of `other` that lies in the support of `reference`, and the reverse.

    The support of a set is the union of balls around its points, each out to the point's `neighbours`-th nearest other
    one. Source: Kynkäänniemi et al., NeurIPS 2019. Both depend on the sizes of the sets: compare equal ones. ValueError
    as `fid`, and for sets of no more than `neighbours`.
    """
    _check("precision_recall", reference, other)
    fewest = min(len(reference), len(other))
    if not 1 <= neighbours < fewest:
        raise ValueError(f"precision_recall: neighbours must be in [1, {fewest - 1}], got {neighbours}")
    reference, other = reference.double(), other.double()

    def covered(points: Tensor, by: Tensor) -> float:
        radii = torch.cdist(by, by).kthvalue(neighbours + 1).values  # the nearest of all is the point itself
        return float((torch.cdist(points, by) <= radii).any(1).double().mean())

    return covered(other, reference), covered(reference, other)


def nearest(
    images: np.ndarray,  # (N, C, *spatial) uint8
    train: np.ndarray,  # (M, C, *spatial) uint8
    *,
    chunk_values: int = 2**25,
) -> tuple[np.ndarray, np.ndarray]:  # (N,) float64, (N,) int64
    """Each image's distance to its nearest training image, sqrt(mean over pixels and channels of (x − y)²), 0–255, and
    which one that is.

    |x − y|² = |x|² + |y|² − 2x·y by matrix products in float64, where these whole numbers are exact. Memory is
    bounded by some `chunk_values` float64 values for each of the training block and the table of products.
    ValueError where `train` is empty.
    """
    if len(train) == 0:
        raise ValueError("nearest: train must hold at least one image, got none")
    size = int(np.prod(images.shape[1:]))
    queries = torch.from_numpy(images.reshape(len(images), size).astype(np.float64))
    squares = queries.square().sum(1)
    best = torch.full((len(images),), torch.inf, dtype=torch.float64)
    which = torch.zeros(len(images), dtype=torch.int64)
    step = max(1, chunk_values // max(size, len(images), 1))
    for start in range(0, len(train), step):
        block = torch.from_numpy(train[start : start + step].reshape(-1, size).astype(np.float64))
        distance = torch.addmm(squares[:, None] + block.square().sum(1), queries, block.T, alpha=-2)
        least, place = distance.min(1)
        which = torch.where(least < best, place + start, which)
        best = torch.minimum(best, least)
    return (best.clamp_min(0) / size).sqrt().numpy(), which.numpy()
