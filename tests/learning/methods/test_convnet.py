"""Generative ConvNet: growth layer by layer, persistent chains from zero images, samples of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import tiny_config, tiny_data
from typer.testing import CliRunner

from mgebm_fast import noise
from mgebm_fast.cli import app
from mgebm_fast.data import load
from mgebm_fast.errors import ConfigError, DataError
from mgebm_fast.learning import MultiGridTrainer, build_model, load_preset, merge, train
from mgebm_fast.models import GenerativeConvNet, Model
from mgebm_fast.nets import EnergyNet
from mgebm_fast.sampling import langevin_sample

STEPS, DELTA, SEED = 3, 0.3, 4
OWN = {"layers": [[3, 3, 2], [4, 3, 1], [2, 3, 1]], "init_std": 0.3, "sample_steps": 5, "grow": 2 / 3}


def small(**options):
    """Six updates of a net of three layers, two updates a layer."""
    return tiny_config(
        method="generative-convnet", sizes=[1, 4], seed=SEED, precision="fp32",
        langevin={"steps": STEPS, "step_size": DELTA, "reference_std": 1.0}, optimiser={"lr": 0.01},
        **{"generative-convnet": {**OWN, **options}},
    )  # fmt: skip


def trained(updates, config, out=None):
    trainer = MultiGridTrainer(None, tiny_data(), config, out=out, device="cpu", quiet=True)
    trainer.fit(updates)
    return trainer


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


OPTIMISERS = [
    {"name": "adam", "weight_decay": 0.1},
    {"name": "adamw", "weight_decay": 0.1},
    {"name": "sgd", "momentum": 0.9, "weight_decay": 0.1},
]


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda optimiser: optimiser["name"])
def test_layers_join_one_by_one_while_those_beneath_keep_learning(optimiser):
    config, seen = merge(small(), {"optimiser": optimiser}), [state(build_model(small()))]
    for update in range(6):
        trainer = trained(update + 1, config)
        seen.append(state(trainer.model))
        assert trainer.model.depth == update // 2 + 1
    for update, (before, after) in enumerate(zip(seen, seen[1:], strict=False)):
        moved = {int(name.split(".")[3]) for name in before if "layers" in name and not before[name].equal(after[name])}
        assert moved == set(range(update // 2 + 1))


def test_the_first_step_of_a_layer_that_joins_late_is_adam_s_first():
    """lr · g/|g|, whatever other layers learnt before."""
    config = merge(small(), {"optimiser": {"betas": [0.0, 0.999]}})
    trainer = trained(2, config)
    for joining in (1, 2):
        layer = trainer.model.nets[0].layers[joining]
        before = [p.detach().clone() for p in layer.parameters()]
        trainer.fit(2 * joining + 1)
        step = max(float((p - q).detach().abs().max()) for p, q in zip(layer.parameters(), before, strict=True))
        assert step == pytest.approx(0.01, rel=1e-3)
        trainer.fit(2 * joining + 2)


def test_the_average_of_a_layer_begins_when_it_joins():
    """Its initial weights count for as little as those of a layer that is there from the start."""
    config = merge(small(), {"stabilise": {"ema": 0.999}})
    trainer = trained(2, config)
    (net,) = trainer.model.nets
    names = dict((parameter, name) for name, parameter in trainer.model.named_parameters())
    weights, start = [layer.weight for layer in net.layers], net.layers[1].weight.detach().clone()
    assert trainer.rule.average.firsts == [0, 2, 4]
    trainer.fit(3)
    mean = trainer.rule.average.state()
    torch.testing.assert_close(mean[names[weights[1]]], start + 0.9 * (weights[1].detach() - start))
    assert torch.equal(mean[names[weights[2]]], weights[2].detach())
    assert trained(1, merge(config, {"generative-convnet": {"head": "linear"}})).rule.average.firsts == [0, 2, 4]


def test_without_growth_all_layers_learn_from_the_first_update():
    before, after = state(build_model(small(grow=0.0))), state(trained(1, small(grow=0.0)).model)
    assert not any(before[name].equal(after[name]) for name in before if name.endswith("weight"))


def test_a_linear_head_comes_with_the_last_layer():
    early, late = (trained(updates, small(head="linear")).model for updates in (4, 5))
    assert early.depth == 2 and early.net.head is None
    assert late.depth == 3 and late.net is late.nets[0] and late.net.head is not None


def test_chains_begin_at_zero_and_go_on_from_where_they_were():
    """The first two updates' chains, from a net that was given the weights of the time."""
    config, model = small(grow=0.0), build_model(small(grow=0.0))
    one, two = trained(1, config), trained(2, config)
    x = torch.zeros(8, 1, 4, 4)
    for update, (net, reached) in enumerate(((model, one), (one.model, two))):
        ids = noise.permutation(8, seed=SEED, step=update, stream=noise.stream(noise.Purpose.BANK_DRAW, 1))
        x[ids] = langevin_sample(
            net.net, x[ids], steps=STEPS, step_size=DELTA, reference_std=1.0, clamp=(-1.0, 1.0), seed=SEED,
            first_sample=ids, first_step=update * STEPS, precision="fp32",
            stream=noise.stream(noise.Purpose.TRAINING_CHAIN, 1),
        )  # fmt: skip
        assert reached.model.bank.equal(x)


def test_a_restarted_chain_begins_at_zero():
    bank = trained(3, small(grow=0.0, restart=1.0)).model
    before = trained(2, small(grow=0.0, restart=1.0)).model
    ids = noise.permutation(8, seed=SEED, step=2, stream=noise.stream(noise.Purpose.BANK_DRAW, 1))
    x = torch.zeros(8, 1, 4, 4)
    x[ids] = langevin_sample(
        before.net, x, steps=STEPS, step_size=DELTA, reference_std=1.0, clamp=(-1.0, 1.0), seed=SEED,
        first_sample=ids, first_step=2 * STEPS, precision="fp32", stream=noise.stream(noise.Purpose.TRAINING_CHAIN, 1),
    )  # fmt: skip
    assert bank.bank.equal(x)


@pytest.mark.parametrize("optimiser", OPTIMISERS, ids=lambda optimiser: optimiser["name"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path, optimiser):
    """Stopped while one layer is still to join."""
    config = merge(small(restart=0.3, bank_size=12), {"optimiser": optimiser})
    whole = trained(6, config)
    trained(3, config, tmp_path / "run")
    resumed = MultiGridTrainer(None, tiny_data(), config, out=tmp_path / "run", quiet=True)
    assert resumed.resume() == 3
    resumed.fit()
    for name, tensor in state(whole.model).items():
        assert tensor.equal(resumed.model.state_dict()[name]), name
    for name, tensor in whole.rule.snapshot()["optimiser"].items():
        assert tensor.equal(resumed.rule.snapshot()["optimiser"][name]), name


def test_a_run_resumed_in_growth_has_the_depth_of_its_last_update(tmp_path):
    config, run = small(), tmp_path / "run"
    whole = trained(3, config, run)
    stored = (run / "checkpoints/step_000003/model.safetensors").read_bytes()
    final = (run / "model.safetensors").read_bytes()
    again = MultiGridTrainer(None, tiny_data(), config, out=run, quiet=True)
    assert again.resume() == 3 and again.model.depth == whole.model.depth == 2
    assert again.model.sample(3, seed=1).equal(whole.model.sample(3, seed=1))
    again.fit(3)  # nothing left to do
    assert (run / "model.safetensors").read_bytes() == final
    assert (again.save(tmp_path / "more") / "model.safetensors").read_bytes() == stored


def test_a_stored_model_samples_alike_and_keeps_its_depth(tmp_path):
    model = trained(4, small()).model
    model.save(tmp_path / "model.safetensors")
    loaded = Model.load(tmp_path / "model.safetensors")
    assert type(loaded) is GenerativeConvNet and loaded.depth == model.depth == 2
    assert loaded.sample(3, seed=1).equal(model.sample(3, seed=1))
    loaded.depth = None
    assert not loaded.sample(3, seed=1).equal(model.sample(3, seed=1))


def test_a_sample_is_the_chain_from_the_zero_image():
    model = trained(6, small()).model
    chain = langevin_sample(
        model.nets[0], torch.zeros(3, 1, 4, 4), steps=5, step_size=DELTA, reference_std=1.0, clamp=(-1.0, 1.0), seed=9,
        first_sample=2, stream=noise.stream(noise.Purpose.SAMPLING, 1),
    )  # fmt: skip
    assert model.sample(3, seed=9, first_sample=2).equal(chain)


def test_a_texture_is_sampled_at_another_size():
    model = trained(6, small()).model
    large = model.at_size(10)
    assert large.sizes == (1, 10) and large.sample(2).shape == (2, 1, 10, 10)
    assert type(large.net) is EnergyNet
    x = torch.randn(2, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    assert large.net(x).equal(model.nets[0](x))  # fully convolutional: the net itself takes any size
    with pytest.raises(ValueError, match="size: must be 4, the size that this model was trained at"):
        trained(6, small(head="linear")).model.at_size(10)
    with pytest.raises(ValueError, match="depth must be an int in"):
        model.depth = 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generative-convnet": {"layers": []}}, r"layers must be a list of 1 or more, each a list of 3.*got \[\]"),
        ({"generative-convnet": {"bank_size": 4}}, r"generative-convnet.bank_size must be at least batch_size \(8\)"),
        ({"batch_parts": 2}, "batch_parts must be 1"),
    ],
)
def test_keys_that_do_not_fit(changes, message):
    with pytest.raises(ConfigError, match=message):
        MultiGridTrainer(None, tiny_data(), merge(small(), changes), quiet=True)


def test_the_command_samples_a_texture_of_the_size_asked_for(tmp_path):
    trained(6, small(), tmp_path / "run")
    command = ["sample", str(tmp_path / "run"), "--num", "2", "--seed", "3", "--out", str(tmp_path / "wall.npy")]
    result = CliRunner().invoke(app, [*command, "--size", "11"])
    assert result.exit_code == 0, result.output
    model = Model.load(tmp_path / "run").at_size(11)
    np.testing.assert_array_equal(np.load(tmp_path / "wall.npy"), model.to_uint8(model.sample(2, seed=3)).numpy())
    trained(2, tiny_config(), tmp_path / "grids")
    result = CliRunner().invoke(
        app, ["sample", str(tmp_path / "grids"), "--size", "11", "--out", str(tmp_path / "x.png")]
    )
    assert result.exit_code == 2 and "--size: is for a generative ConvNet or FRAME" in result.output


def test_layers_are_checked_by_name():
    with pytest.raises(ConfigError, match="generative-convnet.layers must be a list of 1 or more, each a list of 3"):
        merge(small(), {"generative-convnet": {"layers": [[3, 3]]}})


@pytest.mark.parametrize("name", ["fire.avi", "chimes.wav"])
def test_videos_and_sounds_are_refused(name, tmp_path):
    (tmp_path / name).write_bytes(b"RIFF" + bytes(64))
    with pytest.raises(DataError, match=name.split(".")[0]):
        train(merge(small(), {"data": str(tmp_path / name)}), out=tmp_path / "run", quiet=True)
    with pytest.raises(DataError):
        train(small(), data=np.zeros((4, 2, 8, 8, 8), np.uint8), out=tmp_path / "other", quiet=True)


def test_presets_are_a_texture_and_an_object():
    texture, faces = (build_model(load_preset(name)) for name in ("texture", "object"))
    assert texture.net.head is None and texture.at_size(50).sizes == (1, 50)
    assert faces.net.head is not None and faces.net.size == (24, 24)
    wall = texture.from_uint8(torch.from_numpy(np.asarray(load("texture:brick/4", size=48, channels=1).images)))
    assert texture.langevin[0].reference_mean == pytest.approx(wall.mean().item(), abs=0.05)  # where chains begin
