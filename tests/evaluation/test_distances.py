from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from mgebm_fast.evaluation.distances import fid, kid, nearest, precision_recall


def features(n: int, d: int = 12, *, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Correlated, so that a covariance taken for its diagonal shows."""
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return torch.from_numpy(generator.normal(size=(n, d)) @ mix + shift)


def fid_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # the symmetric form of the root, by another routine than the code's
    half = scipy.linalg.sqrtm(cov_a).real
    root = scipy.linalg.sqrtm(half @ cov_b @ half).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root))


def kid_by_hand(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased estimator over whole sets, by plain loops over pairs."""
    d = a.shape[1]

    def kernel(x, y):
        return (x @ y / d + 1) ** 3

    def within(x):
        return np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])

    return float(within(a) + within(b) - 2 * np.mean([kernel(x, y) for x in a for y in b]))


@pytest.mark.parametrize("n, m, shift", [(200, 150, 0.0), (40, 300, 0.7), (60, 60, -2.0)])
def test_fid_is_the_frechet_distance(n, m, shift):
    a, b = features(n, seed=1), features(m, shift=shift, seed=2)
    assert fid(a, b) == pytest.approx(fid_by_hand(a.numpy(), b.numpy()), rel=1e-7)


def test_fid_of_equal_sets_is_zero_even_where_covariances_are_singular():
    assert fid(features(200), features(200)) == pytest.approx(0, abs=1e-6)
    few = features(8, d=12)
    assert 0 <= fid(few, few.clone()) < 1e-5


def test_kid_of_whole_sets_is_the_unbiased_mmd():
    a, b = features(30, seed=1), features(30, shift=0.4, seed=2)
    # with subsets as large as the sets, every subset is the whole set
    assert kid(a, b, subset_size=30) == pytest.approx(kid_by_hand(a.numpy(), b.numpy()), rel=1e-9)


def test_kid_of_subsets_estimates_the_same_number():
    a, b = features(120, seed=1), features(120, shift=0.4, seed=2)
    whole = kid(a, b, subset_size=120)
    assert kid(a, b, subset_size=40) == pytest.approx(whole, rel=0.2)


def test_kid_depends_on_its_seed_alone_and_leaves_the_global_state():
    a, b = features(100, seed=1), features(80, seed=2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = kid(a, b, subset_size=30, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert kid(a, b, subset_size=30, seed=3) == first
    assert kid(a, b, subset_size=30, seed=4) != first


@pytest.mark.parametrize("distance", [fid, kid])
@pytest.mark.parametrize(
    "reference, other, message",
    [
        (torch.ones(20, 3), features(20, 3), "reference must hold features that differ, got 20 rows"),
        (features(20, 3), features(20, 3).index_fill(0, torch.tensor([4]), torch.nan), "other must be finite"),
        (features(20, 3) * torch.inf, features(20, 3), "reference must be finite"),
        (features(20, 3), features(1, 3), "other must be .* at least two images.*got \\(1, 3\\)"),
        (features(0, 3), features(20, 3), "reference must be .*got \\(0, 3\\)"),
        (features(20, 3), features(20, 4), "other must be .*got \\(20, 4\\)"),
        (features(20, 3), features(20, 3) * 1e160, "features must be small enough for float64"),
    ],
)
def test_features_without_a_distance_are_refused(distance, reference, other, message):
    """NaN came out as FID 0, the best there is, and equal features as 1e22."""
    with pytest.raises(ValueError, match=message):
        distance(reference, other, **({"subset_size": 10} if distance is kid else {}))


def test_subsets_must_be_those_of_the_smaller_set():
    with pytest.raises(ValueError, match=r"subset_size must be in \[2, 20\], .*got 21"):
        kid(features(30), features(20), subset_size=21)


def test_a_collapsed_set_has_a_distance():
    a, b = features(50), torch.ones(30, 12, dtype=torch.float64)
    expected = float((a.mean(0) - 1).square().sum() + a.var(0).sum())
    assert fid(a, b) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("chunk_values", [1, 900, 2**25])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 5)])
def test_nearest_distance_is_exact_whatever_the_chunks(shape, chunk_values):
    generator = np.random.default_rng(0)
    images, train = (generator.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (9, 31))
    train[17] = images[4]
    expected = [min(np.sqrt(((x.astype(float) - y) ** 2).mean()) for y in train.astype(float)) for x in images]
    found, which = nearest(images, train, chunk_values=chunk_values)
    assert found[4] == 0 and which[4] == 17
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=0)
    theirs = [np.sqrt(((x.astype(float) - train[k]) ** 2).mean()) for x, k in zip(images, which, strict=True)]
    np.testing.assert_allclose(theirs, expected, rtol=1e-14, atol=0)


def test_nearest_distance_is_in_grey_levels():
    black = np.zeros((1, 3, 4, 4), np.uint8)
    assert nearest(black + np.uint8(7), black)[0] == pytest.approx([7.0])


def test_figures_are_those_of_torchmetrics_on_record():
    """torchmetrics 1.9 on these features and the subsets of seed 3: figures of earlier runs stay comparable."""
    a, b = features(80, seed=1), features(60, shift=0.4, seed=2)
    assert fid(a, b) == pytest.approx(2.795921908834355, rel=1e-9)
    assert kid(a, b, subset_size=40, seed=3) == pytest.approx(0.6708529611447852, rel=1e-9)


def test_precision_and_recall_by_hand():
    real, samples = features(30, 3), features(25, 3, shift=0.8, seed=1)

    def covered(points, by):
        hits = 0
        for p in points:
            for i, centre in enumerate(by):
                others = sorted(float((centre - other).norm()) for j, other in enumerate(by) if j != i)
                if float((p - centre).norm()) <= others[2]:
                    hits += 1
                    break
        return hits / len(points)

    assert precision_recall(real, samples) == (covered(samples, real), covered(real, samples))
    precision, recall = precision_recall(real, real[:5].repeat(5, 1) + 1e-9 * samples)  # faithful, and of few kinds
    assert precision == 1 and recall < 0.5
    assert precision_recall(real, real + 100) == (0, 0)
    with pytest.raises(ValueError, match=r"neighbours must be in \[1, 2\], got 3"):
        precision_recall(real, real[:3])
