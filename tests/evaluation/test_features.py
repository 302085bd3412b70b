from __future__ import annotations

import numpy as np
import pytest
import torch

from mgebm_fast import data
from mgebm_fast.data import ImageData
from mgebm_fast.errors import BackendError
from mgebm_fast.evaluation import features as module
from mgebm_fast.evaluation.distances import fid
from mgebm_fast.evaluation.features import classifier_space, feature_space


def digits(split: str) -> ImageData:
    return data.load("digits", size=8, channels=1, split=split)


def accuracy(name: str) -> float:
    return float(name.split("(accuracy ")[1].split(" ")[0])


def test_labelled_images_train_a_classifier_that_works():
    train, held_out = digits("train"), digits("held_out")
    space = classifier_space(train, held_out, visits=8_000)
    assert space.name.startswith("classifier: 64-d penultimate features of a 3-layer CNN trained on digits")
    assert accuracy(space.name) > 0.93
    drawn = space.extract(held_out.images)
    assert drawn.shape == (360, 64) and drawn.dtype == torch.float64
    reference = space.extract(train.images)
    assert reference.square().mean().item() == pytest.approx(1)
    noise = np.random.default_rng(0).integers(0, 256, (360, 1, 8, 8), dtype=np.uint8)
    assert fid(reference, space.extract(noise)) > 10 * fid(reference, drawn)


def test_unlabelled_images_train_on_rotations():
    train, held_out = (ImageData(part.images, None, (), part.name) for part in (digits("train"), digits("held_out")))
    space = classifier_space(train, held_out, visits=8_000)
    assert space.name.startswith("rotation classifier: ")
    assert accuracy(space.name) > 0.7, "four turns of a digit: chance is 0.25"


def test_features_depend_on_the_seed_alone_and_leave_the_global_state():
    train, held_out = digits("train").subset(slice(0, 200)), digits("held_out")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = classifier_space(train, held_out, seed=3, visits=1000).extract(held_out.images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = classifier_space(train, held_out, seed=3, visits=1000).extract(held_out.images)
    other = classifier_space(train, held_out, seed=4, visits=1000).extract(held_out.images)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 15, 24, 64])
@pytest.mark.parametrize("labelled", [True, False])
def test_any_size_any_channels_labels_with_gaps(size, labelled):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 2, size, size), dtype=np.uint8)
    labels = generator.choice([1, 5], 20).astype(np.int64) if labelled else None
    part = ImageData(images, labels, tuple("abcdef"), "noise")
    found = classifier_space(part, part, visits=128).extract(images)
    assert found.shape == (20, 64) and torch.isfinite(found).all()


def test_an_empty_held_out_set_leaves_the_accuracy_out():
    train = digits("train").subset(slice(0, 50))
    assert "held-out accuracy unknown" in classifier_space(train, train.subset([]), visits=64).name


def test_auto_falls_back_and_says_why(monkeypatch, tmp_path):
    part = digits("held_out")
    monkeypatch.setattr(module, "_torch_fidelity_missing", lambda: "")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = feature_space("auto", part, part, visits=64).name
    assert "not Inception, because its weights" in name and str(tmp_path) not in name
    monkeypatch.setattr(module, "_torch_fidelity_missing", lambda: "torch_fidelity is not installed")
    assert feature_space("auto", part, part, visits=64).name.endswith("because torch_fidelity is not installed")
    with pytest.raises(BackendError, match="torch_fidelity is not installed"):
        feature_space("inception", part, part)
    assert "Inception" not in feature_space("classifier", part, part, visits=64).name


def test_an_unknown_space_is_refused():
    part = digits("held_out")
    with pytest.raises(ValueError, match="features must be 'auto', 'inception' or 'classifier', got 'clip'"):
        feature_space("clip", part, part)
