"""Starting from what was trained before: which weights are taken, what is new, and what is refused by name."""

from __future__ import annotations

import shutil

import pytest
import torch

import mgebm_fast as mg
from mgebm_fast.errors import CheckpointError, ConfigError
from mgebm_fast.learning import build_model, load_config, merge, start, train
from mgebm_fast.learning.run import checkpoint
from mgebm_fast.learning.start import match
from mgebm_fast.models import CoopNets, GenerativeConvNet
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import ConvSpec, DeconvSpec, Generator

TINY = {
    "steps": 2, "width": 0.1, "batch_size": 4, "checkpoint_every": 1, "sample_every": 0, "sizes": [1, 2, 4],
    "langevin": {"steps": 1, "noise_std": 0.03}, "stabilise": {"data_noise": 0.03, "noise_anneal_share": 1.0},
}  # fmt: skip


def images(size, seed=0):
    pixels = torch.rand(8, 1, size, size, generator=torch.Generator().manual_seed(seed))
    return mg.data.load(pixels, size=size, channels=1)


def config(**more):
    return merge(merge(load_config("digits"), TINY), more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "small"
    train(config(), out=out, data=images(4), quiet=True)
    return out


def started(trained, **more):
    """A trainer just before its first update, and what it said."""
    chosen = config(**{"sizes": [1, 2, 4, 8], "start_from": str(trained), "seed": 5, **more})
    trainer = mg.MultiGridTrainer(None, images(chosen.sizes[-1]), chosen, quiet=True)
    said: list[str] = []
    trainer._loop.voice.say = said.append
    trainer._begin()
    return trainer, said


def same(a, b):
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finer_size_is_added_on_top_of_a_trained_ladder(trained):
    trainer, said = started(trained)
    source, fresh = mg.load(trained), build_model(trainer.config)
    assert same(trainer.model.nets[0], source.nets[0]) and same(trainer.model.nets[1], source.nets[1])
    assert same(trainer.model.nets[2], fresh.nets[2]) and not same(fresh.nets[0], source.nets[0])
    assert said == [f"weights of {trained}: taken: size 2, 4; new: size 8"]
    averages = trainer.rule.average.state()
    assert all(torch.equal(averages[name], p) for name, p in trainer.model.named_parameters())
    assert trainer.fit(1).iteration == 1 and not same(trainer.model.nets[0], source.nets[0])


def test_fewer_sizes_and_another_method_take_what_they_have_a_place_for(trained):
    trainer, said = started(trained, sizes=[1, 2])
    assert same(trainer.model.nets[0], mg.load(trained).nets[0]) and said[0].endswith("size 2; left out: size 4")
    chosen = merge(load_config("digits-pcd"), {**TINY, "start_from": str(trained), "sizes": [1, 4]})
    trainer = mg.MultiGridTrainer(None, images(4), chosen, quiet=True)
    trainer._begin()
    assert same(trainer.model.nets[0], mg.load(trained).nets[1])


def test_the_optimisers_state_comes_with_the_weights_that_it_belongs_to(trained):
    trainer, said = started(trained, start_optimiser=True)
    folder = trained / "checkpoints" / "step_000002"
    source = mg.load(folder, ema=False)
    assert same(trainer.model.nets[1], source.nets[1]) and not same(source.nets[1], mg.load(trained).nets[1])
    stored = checkpoint.read_tensors(folder / "optimiser.safetensors")
    own = trainer.rule._optimiser_tensors()
    assert stored.keys() == own.keys() and all(torch.equal(own[key], stored[key]) for key in stored)
    assert said[0].startswith("weights and optimiser state of")
    trainer.fit(1)
    assert any(key.startswith("3.") for key in trainer.rule._optimiser_tensors())


def test_what_does_not_fit_is_refused_by_name_and_nothing_is_written(trained, tmp_path):
    file = shutil.copy(trained / "model.safetensors", tmp_path / "alone.safetensors")
    cases = [
        (trained, {"width": 0.2}, r"from: layers of size 2 must be .*, as in .*small, got"),
        (trained, {"variant": "residual"}, "from: class of size 2 must be EnergyNet, as in .*small, got ResidualNet"),
        (trained, {"activation": "silu"}, "from: activation of size 2 must be leaky_relu, as in .*, got silu"),
        (trained, {"value_range": [0.0, 1.0]}, r"from: value_range must be \(-1.0, 1.0\), as in .*, got \(0.0, 1.0\)"),
        (trained, {"sizes": [1, 8]}, "from: must have a net of size 8, got .*, which has size 2, size 4"),
        (trained, {"optimiser": {"name": "sgd"}, "start_optimiser": True}, "from: optimiser.name must be adam, as in"),
        (file, {"start_optimiser": True}, "from: must have a whole checkpoint, to take the optimiser's state, got"),
        (tmp_path / "none", {}, "none does not exist"),
    ]
    for source, more, words in cases:
        chosen = config(**{"sizes": [1, 2, 4, 8], "start_from": str(source), **more})
        with pytest.raises(CheckpointError, match=words):
            train(chosen, out=tmp_path / "out", data=images(8), quiet=True)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="start_from: must be none where a model is given"):
        mg.MultiGridTrainer(mg.load(trained), images(4), start_from=str(trained))


def test_a_resumed_run_does_not_need_its_source_and_one_without_a_checkpoint_does(trained, tmp_path):
    source = shutil.copytree(trained, tmp_path / "source")
    chosen = config(start_from=str(source), steps=3)
    train(chosen, out=tmp_path / "whole", data=images(4), quiet=True)
    parts = mg.MultiGridTrainer(None, images(4), chosen, out=tmp_path / "parts", quiet=True)
    parts.fit(1)
    (tmp_path / "killed").mkdir()
    shutil.copy(tmp_path / "parts" / "config.toml", tmp_path / "killed" / "config.toml")
    train(chosen, out=tmp_path / "killed", data=images(4), resume=True, quiet=True)
    mg.MultiGridTrainer(None, images(4), chosen, out=tmp_path / "fit", quiet=True).fit(0)
    mg.MultiGridTrainer(None, images(4), chosen, quiet=True).save(tmp_path / "saved")
    shutil.rmtree(source)
    for folder, at in ((tmp_path / "fit", None), (tmp_path / "again", tmp_path / "saved")):  # before the first update
        trainer = mg.MultiGridTrainer(None, images(4), chosen, out=folder, quiet=True)
        assert trainer.resume(at) == 0 and trainer.fit().finished
    train(chosen, out=tmp_path / "parts", data=images(4), resume=True, quiet=True)
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == whole
    for name in ("killed", "fit", "again"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == whole, name


def test_fully_convolutional_nets_and_generators_fit_other_models():
    layers = [ConvSpec(3, 3), ConvSpec(4, 3, 2)]
    small, large = (GenerativeConvNet(size, layers, channels=1, value_range=(-1.0, 1.0)) for size in (6, 12))
    assert match(large, small, "run").parts == {"size 12": "size 6"}
    heads = [GenerativeConvNet(size, layers, head="linear", channels=1) for size in (6, 12)]
    with pytest.raises(CheckpointError, match="must have a net of size 12"):
        match(heads[1], heads[0], "run")

    def coop(width):
        generator = Generator(2, [DeconvSpec(width, 2, 2), DeconvSpec(1, 4, 2)])
        return CoopNets(4, generator, Inference(2, 0.1, 0.3), channels=1, norm="none", variant="compact", width=0.1)

    assert match(coop(3), coop(3), "run").parts == {"size 4": "size 4", "generator": "generator"}
    with pytest.raises(CheckpointError, match="from: layers of generator must be"):
        match(coop(3), coop(4), "run")
    assert start.Taken({"size 4": "size 4", "generator": "generator"}, [], []).words() == "taken: size 4, generator"
