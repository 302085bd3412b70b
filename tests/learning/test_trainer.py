"""What a trainer makes of model, configuration and data that are given together."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.training import tiny_config, tiny_data

import mgebm_fast as mg
from mgebm_fast.data import ImageData
from mgebm_fast.learning import MultiGridTrainer, Run, build_model, train
from mgebm_fast.models import GenerativeConvNet
from mgebm_fast.nets import ConvSpec


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.npy"
    np.save(path, tiny_data(40).images)
    return path


def said(out) -> str:
    return Run(out).config.data


def test_a_run_says_where_the_data_are_that_were_given_beside_a_configuration(tmp_path, mine):
    config = tiny_config(steps=1, data="digits")
    trainer = MultiGridTrainer(None, mine, config, out=tmp_path / "path", quiet=True)
    trainer.fit()
    assert said(tmp_path / "path") == str(mine)
    train(config, out=tmp_path / "train", data=str(mine), quiet=True)
    assert said(tmp_path / "train") == str(mine)
    # What the run says is what it learnt from: it goes on from its own folder alone, and has images held out.
    again = MultiGridTrainer(None, None, Run(tmp_path / "path").config, out=tmp_path / "path", quiet=True, steps=2)
    assert again.resume() == 1 and again.fit().finished
    held_out = mg.data.load(mine, size=4, channels=1, split="held_out", like=trainer.data.fingerprint())
    assert len(held_out) == 4 and len(trainer.data) == 36


def test_a_run_says_the_name_of_arrays_and_images_unless_it_is_told_their_place(tmp_path, mine):
    config, images = tiny_config(steps=0, data="digits"), tiny_data().images
    for name, data, expected in (("array", images, "ndarray"), ("images", ImageData(images, name="mine"), "mine")):
        MultiGridTrainer(None, data, config, out=tmp_path / name, quiet=True).fit()
        assert said(tmp_path / name) == expected
    loaded = mg.data.load(mine, size=4, channels=1)
    for options in ({"config": tiny_config(data=str(mine))}, {"config": config, "source": str(mine)}):
        assert MultiGridTrainer(None, loaded, **options, quiet=True).config.data == str(mine)
    # Of images that it is given, `train` takes the configuration's word.
    train(config, out=tmp_path / "train", data=loaded, quiet=True)
    assert said(tmp_path / "train") == "digits"


def test_a_given_model_may_have_a_mean_that_its_chains_begin_at_alone():
    chain = mg.Langevin(2, drift=0.1, noise_std=0.1, reference_mean=0.5)
    model = GenerativeConvNet(4, [ConvSpec(3, 3)], channels=1, value_range=(-1.0, 1.0), langevin=chain)
    trainer = MultiGridTrainer(model, tiny_data(), method="generative-convnet", batch_size=4, quiet=True)
    assert trainer.config.langevin.reference_mean == 0.5 and bool((model.bank == 0.5).all())


@pytest.mark.parametrize("norm, group", [("none", 32), ("batch", 4)])
def test_samples_come_in_larger_groups_than_batches_where_they_are_not_coupled(norm, group):
    config = tiny_config(norm=norm, batch_size=4)
    assert MultiGridTrainer(build_model(config), tiny_data(), config, quiet=True).model.batch_size == group
