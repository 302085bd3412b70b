"""Training of class-conditional models: labels reach the nets, and classes are told apart."""

import numpy as np
import pytest
import torch

import mgebm_fast as mg
from mgebm_fast.data import ImageData
from mgebm_fast.errors import ConfigError
from mgebm_fast.learning import MultiGridTrainer
from mgebm_fast.learning.config.values import from_dict


def sides(n=64):
    """2×2 images of one mean colour: bright on the left, class 0, or on the right, class 1, with some noise."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, n)
    images = np.full((n, 1, 2, 2), 60.0)
    images[np.arange(n), :, :, labels] = 195
    images = np.clip(images + draw.normal(0, 8, images.shape), 0, 255).astype(np.uint8)
    return ImageData(images, labels.astype(np.int64), ("left", "right"))


def config(**more):
    return from_dict({
        "sizes": [1, 2], "batch_size": 16, "steps": 120, "seed": 1,
        "langevin": {"steps": 10, "drift": 1.0, "noise_std": 0.05, "grad_clamp": 0.1},
        "optimiser": {"lr": 2e-3, "betas": [0.0, 0.99]},
        "stabilise": {"data_noise": 0.07, "data_noise_clamp": True, "energy_l2": 0.02},
        "multigrid": {"conditional": True}, **more,
    })  # fmt: skip


def test_samples_and_energies_are_of_their_class():
    data = sides()
    trainer = MultiGridTrainer(None, data, config(), quiet=True)
    trainer.fit()
    model = trainer.model
    assert model.classes == ("left", "right") and trainer.config.classes == ("left", "right")
    for label in (0, 1):
        x = model.sample(32, seed=0, labels=label)
        lean = x[:, 0, :, 0].mean(1) - x[:, 0, :, 1].mean(1)
        assert ((lean > 0) if label == 0 else (lean < 0)).float().mean() > 0.9
    guesses = model.class_energies(torch.from_numpy(data.images))[2].argmin(1)
    assert (guesses == torch.from_numpy(data.labels)).float().mean() > 0.9


def test_a_run_goes_on_to_the_bit_and_its_model_knows_its_classes(tmp_path):
    whole = MultiGridTrainer(None, sides(), config(steps=4), out=tmp_path / "whole", quiet=True)
    whole.fit()
    MultiGridTrainer(None, sides(), config(steps=4), out=tmp_path / "cut", quiet=True).fit(2)
    cut = MultiGridTrainer(None, sides(), config(steps=4), out=tmp_path / "cut", quiet=True)
    assert cut.resume() == 2
    cut.fit()
    states = whole.model.state_dict(), cut.model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True))
    assert mg.load(tmp_path / "cut").classes == ("left", "right")


def test_batches_hold_label_planes_and_data_noise_leaves_them(monkeypatch):
    trainer = MultiGridTrainer(None, sides(), config(), quiet=True)
    rule, seen = trainer.rule, []
    learn = rule._with_noise
    monkeypatch.setattr(rule, "_with_noise", lambda *a, **k: seen.append(learn(*a, **k)) or seen[-1])
    batches = trainer._loop.batches
    batch = batches.batch(0)
    labels = torch.from_numpy(trainer.data.labels)[batches.indices(0)]
    own = torch.stack([labels == 0, labels == 1], 1)[:, :, None, None].expand(-1, -1, 2, 2) / 4
    assert batch.shape == (16, 3, 2, 2) and torch.equal(batch[:, 1:], own)
    rule.update(batch, 0)
    assert torch.equal(seen[0][:, 1:], own) and not torch.equal(seen[0][:, :1], batch[:, :1])


def test_steps_of_batches_of_the_caller_s_take_labels():
    trainer = MultiGridTrainer(None, sides(), config(), quiet=True)
    batch, labels = torch.from_numpy(sides().images[:8]), torch.from_numpy(sides().labels[:8])
    assert np.isfinite(trainer.step(batch, labels)["size_2/gap"])
    with pytest.raises(ValueError, match="step: labels must be given for a class-conditional model"):
        trainer.step(batch)
    plain = MultiGridTrainer(None, sides(), config(multigrid={"conditional": False}), quiet=True)
    with pytest.raises(ValueError, match="step: labels must be None"):
        plain.step(batch, labels)


def test_data_without_classes_are_refused():
    bare = ImageData(sides().images)
    with pytest.raises(ConfigError, match="multigrid.conditional: data must have labels of two classes or more"):
        MultiGridTrainer(None, bare, config(), quiet=True)
    with pytest.raises(ConfigError, match="data must be of the classes up, down, got left, right"):
        MultiGridTrainer(None, sides(), config(classes=["up", "down"]), quiet=True)


def given(*classes):
    return mg.models.MultiGrid(
        (1, 2), channels=1, classes=classes, norm="none", variant="compact", value_range=(-1.0, 1.0),
        langevin=mg.Langevin(2, drift=1.0, noise_std=0.05),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("classes", "conditional", "words"),
    [
        (("right", "left"), True, "the model's classes must be those of the data in their order, left, right, got ri"),
        (("left", "right"), False, "multigrid.conditional must be true for a model with the classes left, right, got"),
        ((), True, "multigrid.conditional must be false for a model with the classes none, got true"),
    ],
)
def test_a_given_model_and_a_configuration_must_have_the_classes_of_the_data(classes, conditional, words):
    chosen = config(multigrid={"conditional": conditional})
    for data in (sides(), ImageData(sides().images))[: 1 if conditional else 2]:
        with pytest.raises(ValueError, match=words):
            MultiGridTrainer(given(*classes), data, chosen, quiet=True)


def test_a_given_model_settles_the_classes():
    model = given("left", "right")
    MultiGridTrainer(model, sides(), config(), quiet=True)  # beside a configuration that says the same, no error
    trainer = MultiGridTrainer(model, sides(), steps=1, quiet=True)
    trainer.fit()
    assert trainer.config.options.conditional and set(model.labels.tolist()) == {0, 1}
