from __future__ import annotations

import warnings

import numpy as np
import pytest

from mgebm_fast import data
from mgebm_fast.data import ImageData
from mgebm_fast.evaluation import recogniser as module
from mgebm_fast.evaluation.platt import PlattSVC
from mgebm_fast.evaluation.recogniser import fit_recogniser

# (A, B) of the pairs 0-1 and 0-2 of the training digits, by SVC(probability=True) of scikit-learn 1.9.1
RECORDED = [(-4.254654185997669, 0.02322136978583299), (-4.115729781669489, -0.00612340138158414)]


@pytest.fixture(scope="module")
def held_out() -> ImageData:
    return data.load("digits", size=8, channels=1, split="held_out")


@pytest.fixture(scope="module")
def recogniser():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fit_recogniser(data.load("digits", size=8, channels=1, split="train"))


def share(recogniser, images) -> float:
    return sum(recogniser.shares(images).values())


def test_real_digits_are_recognised_and_every_class_among_them(recogniser, held_out):
    shares = recogniser.shares(held_out.images)
    assert list(shares) == [str(k) for k in range(10)]
    assert 0.78 <= sum(shares.values()) <= 0.90
    assert min(shares.values()) >= 0.05


@pytest.mark.parametrize("seed", range(5))
def test_uniform_noise_is_not(recogniser, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (1000, 1, 8, 8), dtype=np.uint8)
    assert share(recogniser, noise) <= 0.02


def test_nor_are_pixels_of_digits_in_another_order(recogniser, held_out):
    flat = held_out.images.reshape(len(held_out), 64)
    shuffled = np.random.default_rng(0).permuted(flat, axis=1).reshape(held_out.images.shape)
    assert share(recogniser, shuffled) <= 0.02


def test_recognised_pictures_count_for_their_own_class(recogniser, held_out):
    for k in (0, 4, 7):
        shares = recogniser.shares(held_out.images[held_out.labels == k])
        assert shares[str(k)] > 0.5
        assert shares[str(k)] >= 0.97 * sum(shares.values())


@pytest.mark.parametrize("classes", [2, 10])
def test_probabilities_are_those_of_libsvm(classes, held_out):
    """Equal to `SVC(probability=True)`, one class of a single image included, where scikit-learn still has it."""
    from sklearn.svm import SVC

    if "probability" not in SVC().get_params():
        pytest.skip("this scikit-learn has no probability=True")
    train = data.load("digits", size=8, channels=1, split="train")
    chosen = np.flatnonzero(train.labels < classes)[:200]
    pixels, labels = train.images[chosen].reshape(200, -1).astype(float), train.labels[chosen].copy()
    if classes > 2:
        labels[0] = 99
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = SVC(C=10, gamma="scale", probability=True, random_state=0).fit(pixels, labels)
    ours = PlattSVC(C=10, random_state=0).fit(pixels, labels)
    others = held_out.images.reshape(len(held_out), -1).astype(float)
    np.testing.assert_allclose(ours.predict_proba(others), theirs.predict_proba(others), rtol=0, atol=1e-12)


def test_the_share_of_real_digits_is_that_on_record(recogniser, held_out):
    assert share(recogniser, held_out.images) == pytest.approx(306 / 360, abs=1e-12)
    np.testing.assert_allclose(recogniser.classifier.sigmoids[:2], RECORDED, rtol=1e-6)


def coloured(n: int, size: int, classes: int = 3) -> ImageData:
    """Noise around one colour a class, with class names of their own and a label never seen."""
    generator = np.random.default_rng(0)
    labels = np.sort(generator.integers(0, classes, n)).astype(np.int64)
    base = np.eye(3)[labels % 3] * 120 + 60
    pixels = base[:, :, None, None] + generator.normal(0, 20, (n, 3, size, size))
    names = (*(f"class {k}" for k in range(classes)), "absent")
    return ImageData(pixels.clip(0, 255).astype(np.uint8), labels, names, "coloured")


def test_large_images_are_averaged_and_large_sets_cut_by_class(monkeypatch):
    monkeypatch.setattr(module, "MAX_IMAGES", 90)
    train = coloured(400, 40)
    recogniser = fit_recogniser(train)
    assert "averaged to 16×16" in recogniser.name and "90 of 400" in recogniser.name
    assert recogniser.labels == ("class 0", "class 1", "class 2")
    assert share(recogniser, train.images) > 0.9
    chosen = module._stratified(train.labels, 90, 0)
    assert len(set(chosen.tolist())) == 90
    wanted = np.bincount(train.labels) * 90 / 400
    assert (np.abs(np.bincount(train.labels[chosen]) - wanted) <= 1).all()


def test_no_class_is_lost_in_the_cut():
    labels = np.array([0] * 500 + [1] * 2 + [2] * 498)
    assert set(labels[module._stratified(labels, 10, 0)]) == {0, 1, 2}


@pytest.mark.parametrize("labels", [None, np.zeros(20, np.int64)])
def test_a_single_class_is_refused(labels):
    train = ImageData(np.zeros((20, 1, 8, 8), np.uint8), labels, ("a",))
    with pytest.raises(ValueError, match="labels of at least two classes"):
        fit_recogniser(train)
