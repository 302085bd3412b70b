"""Multi-grid with persistent chains: closed forms on an affine energy, what starts anew where, and longer samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from helpers.factors import Linear
from helpers.training import tiny_config, tiny_data
from torch.nn.functional import avg_pool2d, interpolate

import mgebm_fast as mg
from mgebm_fast import noise, ops
from mgebm_fast.data import ImageData
from mgebm_fast.errors import CheckpointError, ConfigError, DivergenceError, Refused
from mgebm_fast.learning import MultiGridTrainer, build_model, merge
from mgebm_fast.learning.methods.multigrid import MultiGridRule
from mgebm_fast.learning.methods.synthesis import Synthesis

STEPS, DRIFT, FIRST, LAST, SEED, LR = 3, 0.3, 0.4, 0.1, 5, 0.125
BANK = {"bank_size": 12, "bank_share": 0.75, "bank_renewal": 0.5}  # of 8 chains 2 start anew, and one is stored
AFFINE = {
    "seed": SEED, "sizes": [1, 4], "precision": "fp32", "multigrid": BANK, "optimiser": {"name": "sgd", "lr": LR},
    "langevin": {"steps": STEPS, "drift": DRIFT, "clamp": False,
                 "noise_std": {"start": FIRST, "end": LAST, "shape": "first"}},
}  # fmt: skip
STILL = {"langevin": {"steps": 1, "drift": 1e-9, "noise_std": 0.0}}  # chains that stay where they start


def draw(ids, step):
    where = noise.stream(noise.Purpose.TRAINING_CHAIN, 1)
    words, _ = noise.words(len(ids), 16, seed=SEED, step=step, first_sample=ids, stream=where)
    return noise.normal(words).reshape(-1, 1, 4, 4).double()


def first_rows(model, seed):
    return noise.integers(len(model.colours), 12, seed=seed, step=0, stream=noise.stream(noise.Purpose.INITIAL_STATE))


def first_bank(model, seed, size):
    return ops.upsample(model.colours[first_rows(model, seed)][:, :, None, None], size)


def test_gradient_on_a_linear_energy_is_the_closed_form():
    """E = −⟨w, x⟩: x_K = x_0 + K δ w + Σ s_k ε_k, s_0 that of the schedule's start in chains that start anew alone."""
    config, net = tiny_config(**AFFINE), Linear()
    model = mg.MultiGrid((1, 4), channels=1, langevin=config.dynamics(), nets=[net], value_range=(-1, 1))
    trainer = MultiGridTrainer(model, tiny_data(), config, quiet=True)
    weight = net.weight.detach().double()
    bank = first_bank(model, SEED, 4).double()
    batch = tiny_data().batch(slice(8))
    observed = batch.double() / 127.5 - 1
    for iteration in range(4):
        ids = trainer.rule.slots.at(iteration, 0, 8)
        x = bank[ids]
        x[:2] = observed.mean((2, 3), keepdim=True).expand_as(observed)[:2]
        for k in range(STEPS):
            std = torch.full((8, 1, 1, 1), LAST, dtype=torch.float64)
            std[:2] = FIRST if k == 0 else LAST
            x = x + DRIFT * weight + std * draw(ids, iteration * STEPS + k)
        bank[ids[[0, *range(2, 8)]]] = x[[0, *range(2, 8)]]
        trainer.step(batch)
        weight = weight - LR * (x.mean(0) - observed.mean(0))
        torch.testing.assert_close(net.weight.detach().double(), weight, atol=3e-6, rtol=0)
    torch.testing.assert_close(trainer.rule.bank[0].double(), bank, atol=3e-6, rtol=0)


@pytest.mark.parametrize("upsampling", ["nearest", "linear"])
def test_new_chains_start_where_coarser_ones_ended_that_went_on(trainer, upsampling):
    rule = trainer(multigrid={**BANK, "upsampling": upsampling}, **STILL).rule
    means = torch.linspace(-0.9, 0.9, 8).reshape(8, 1, 1, 1)
    made = rule.synthesise([means, *(means.expand(-1, -1, s, s) for s in rule.model.sizes[1:])], 0, 0)
    coarse, finer = made.images[0], made.images[1:]
    torch.testing.assert_close(coarse[:2], ops.upsample(means, 2)[:2], atol=1e-6, rtol=0)
    for images in finer:
        expected = interpolate(coarse[2:4], scale_factor=2)
        if upsampling == "linear":
            smooth = interpolate(coarse[2:4], scale_factor=2, mode="bilinear")
            expected = smooth + interpolate(coarse[2:4] - avg_pool2d(smooth, 2), scale_factor=2)
        torch.testing.assert_close(images[:2], expected, atol=1e-6, rtol=0)
        coarse = images
    assert not torch.equal(made.images[0][2:4], made.images[0][:2])


@pytest.mark.parametrize("share", [0, 1])
def test_all_chains_may_go_on_or_start_anew(trainer, share):
    ours = trainer(multigrid={"bank_size": 12, "bank_share": share, "bank_renewal": 1}, **STILL)
    batch = tiny_data(8).batch(slice(None))
    flat = first_bank(ours.model, ours.config.seed, 2)
    ours.step(batch)
    ids = ours.rule.slots.at(0, 0, 8)
    means = ops.upsample(ours.rule.observed(batch)[0], 2)
    torch.testing.assert_close(ours.rule.bank[0][ids], flat[ids] if share else means, atol=1e-6, rtol=0)


def test_the_finest_grids_alone_may_store_chains(trainer, tmp_path):
    """Chains of the others all start anew, and the stored ones of the first that does begin where these ended."""
    sizes, means = [1, 2, 4, 8], torch.linspace(-0.9, 0.9, 8).reshape(8, 1, 1, 1)
    data = ImageData(np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    changes = {"sizes": sizes, "multigrid": {**BANK, "bank_grids": 2}, "data": data, **STILL}
    rule = trainer(**changes).rule
    made = rule.synthesise([means, *(means.expand(-1, -1, s, s) for s in sizes[1:])], 0, 0)
    two, four, eight = made.images
    torch.testing.assert_close(two, ops.upsample(means, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(four[:2], ops.upsample(means[:2], 4), atol=1e-6, rtol=0)
    ids = rule.slots.at(0, 0, 8)
    flat = first_bank(rule.model, rule.config.seed, 4)
    torch.testing.assert_close(four[2:], flat[ids[2:]], atol=1e-6, rtol=0)
    torch.testing.assert_close(eight[:2], ops.upsample(four[2:4].contiguous(), 2), atol=1e-6, rtol=0)
    assert [len(images) for images in rule.bank] == [0, 12, 12]
    rule.keep([made], 0)
    rule.write(tmp_path, 1)
    again = trainer(**changes).rule
    again.read(tmp_path)
    assert all(map(torch.equal, rule.bank, again.bank)) and again.bank[0].shape == (0, 1, 2, 2)
    assert torch.equal(again.bank[2][ids[0]], eight[0]) and not torch.equal(again.bank[2][ids[1]], eight[1])
    whole = trainer(**{**changes, "multigrid": {**BANK, "bank_grids": 9}}).rule  # as many as there are
    with pytest.raises(CheckpointError, match="must hold a bank of 12 chains of every grid that stores them"):
        whole.read(tmp_path)


def test_a_share_below_one_chain_is_renewed_every_few_updates(trainer):
    """Of 8 chains 2 start anew, and a fifth of these, two in five updates, are stored; the other six always are."""
    rule = trainer(multigrid={**BANK, "bank_renewal": 0.2}, **STILL).rule
    rule._fill_bank(rule.slots)
    renewed = []
    for iteration in range(10):
        for spoilt in (torch.ones(()), None):
            before = rule.bank[0].clone()
            ids = rule.slots.at(iteration, 0, 8)
            ends = [torch.full((8, 1, size, size), 2.0 + iteration) for size in rule.model.sizes[1:]]
            rule.store(Synthesis(ends, ids), iteration, spoilt)
            changed = (rule.bank[0] != before).flatten(1).any(1)
            assert not changed.any() or spoilt is None
        assert changed[ids[2:]].all() and changed.sum() == changed[ids].sum() and not changed[ids[1]]
        renewed.append(int(changed[ids[0]]))
    assert renewed == [0, 0, 1, 0, 1] * 2


def test_each_grid_may_have_its_own_steps_in_samples(tmp_path):
    law = mg.Langevin(4, drift=0.5, noise_std=0.1)
    shape = {"channels": 1, "variant": "compact", "norm": "none", "langevin": law, "value_range": (-1, 1)}
    model = mg.MultiGrid((1, 2, 4), sample_steps=[4, 9], denoise=1, **shape)
    model.set_colours(torch.tensor([[0.5], [-0.5]]))
    assert [chain.steps for chain in model.sampling] == [4, 9]
    model.save(tmp_path / "model.safetensors")
    again = mg.MultiGrid.load(tmp_path / "model.safetensors")
    assert again.sample_steps == (4, 9) and torch.equal(again.sample(3, seed=1), model.sample(3, seed=1))
    options = MultiGridTrainer(model, tiny_data(), steps=1, quiet=True).config.options
    assert options.sample_steps == (4, 9)
    with pytest.raises(Refused, match=r"sample_steps must be a positive int or 2 of them, .* got \[4\]"):
        mg.MultiGrid((1, 2, 4), sample_steps=[4], **shape)
    with pytest.raises(ConfigError, match=r"multigrid.sample_steps must be one value, or a list of 2 for the nets"):
        tiny_config(multigrid={"sample_steps": [4, 9, 9]})
    config = tiny_config(sizes=[1, 2, 4, 8], multigrid={"sample_steps": [4, 5, 50]})
    assert merge(config, {"sizes": [1, 4]}).options.sample_steps == (50,)  # the finest keeps the finest's
    assert merge(config, {"sizes": [1, 2, 4, 8, 16]}).options.sample_steps == (4, 4, 5, 50)
    assert merge(config, {"sizes": [1, 4, 8]}).options.sample_steps == (5, 50)
    assert "multigrid" not in merge(config, {"method": "cd"}).to_dict()
    config = tiny_config(sizes=[1, 2, 4, 8], multigrid={"cycles": [2, 4]})
    assert (config.options.cycles, build_model(config).cycles) == ((2, 4), (2, 4))
    assert merge(config, {"sizes": [1, 4, 8]}).options.cycles == (4,)
    with pytest.raises(ConfigError, match=r"multigrid.cycles must hold sizes among \[2, 4\], .*, got 8"):
        merge(config, {"multigrid": {"cycles": [2, 8]}})


def test_an_update_that_is_not_applied_leaves_the_bank(trainer):
    ours = trainer(multigrid=BANK)
    batch = tiny_data(8).batch(slice(None))
    ours.step(batch)
    before = [images.clone() for images in ours.rule.bank]
    with torch.no_grad():
        ours.model.nets[0].head.bias.fill_(torch.inf)
    with pytest.raises(DivergenceError):
        ours.step(batch)
    assert all(map(torch.equal, ours.rule.bank, before))


def test_label_planes_stay_those_of_the_stored_chains():
    config = tiny_config(multigrid={**BANK, "conditional": True}, classes=["a", "b"])
    model = build_model(config)
    model.set_colours(torch.rand(6, 1), torch.tensor([0, 1, 1, 0, 1, 0]))
    rule = MultiGridRule(model, config, images=20)
    images = torch.rand(8, 1, 4, 4) * 2 - 1
    batch = model.with_planes(images, torch.arange(8) % 2)
    for iteration in range(3):
        rule.update(batch, iteration)
    labels = model.labels[first_rows(model, config.seed)]
    for images in rule.bank:
        own = images[:, 1:, 0, 0] != 0
        assert torch.equal(own.sum(1), torch.ones(12, dtype=torch.int64))
        assert torch.equal(images[:, 1:], images[:, 1:, :1, :1].expand_as(images[:, 1:]))
    untouched = [i for i in range(12) if all(i not in rule.slots.at(k, 0, 8)[:2] for k in range(3))]
    assert untouched and torch.equal(own.int().argmax(1)[untouched], labels[untouched])


def test_samples_have_their_own_steps_and_end_without_noise(tmp_path):
    law = mg.Langevin(4, drift=0.5, noise_std=mg.Schedule(0.3, 0.1, "first"))
    model = mg.MultiGrid(
        (1, 2, 4), channels=1, variant="compact", norm="none", langevin=law, sample_steps=7, denoise=2,
        value_range=(-1, 1),
    )  # fmt: skip
    model.set_colours(torch.tensor([[0.5], [-0.5]]))
    coarse = dataclasses.replace(law, steps=7)
    fine = dataclasses.replace(law, steps=7, noise_std=(0.3, 0.1, 0.1, 0.1, 0.1, 0.0, 0.0))
    assert model.sampling == (coarse, fine) and model.langevin == (law, law)
    x = model.sample(5, seed=3)
    torch.testing.assert_close(x, model.cascade(model.draw_colours(5, seed=3), seed=3, langevin=(coarse, fine))[-1])
    model.save(tmp_path / "model.safetensors")
    again = mg.MultiGrid.load(tmp_path / "model.safetensors")
    assert (again.sample_steps, again.denoise) == (7, 2) and torch.equal(again.sample(5, seed=3), x)
    for bad, words in (({"denoise": -1}, "denoise must be a whole number"), ({"sample_steps": 0}, "sample_steps must")):
        with pytest.raises(Refused, match=words):
            mg.MultiGrid((1, 2), **bad)


def test_a_given_model_settles_how_its_samples_are_drawn():
    model = mg.MultiGrid(
        (1, 2, 4), channels=1, variant="compact", norm="none", langevin=mg.Langevin(2, drift=1.0, noise_std=0.1),
        sample_steps=5, denoise=1, upsampling="linear", cycles=2, value_range=(-1, 1),
    )  # fmt: skip
    options = MultiGridTrainer(model, tiny_data(), steps=1, quiet=True).config.options
    assert (options.sample_steps, options.denoise, options.upsampling) == (5, 1, "linear")
    assert (options.bank_size, options.cycles) == (None, (2,))


def test_a_chain_without_noise_at_its_end_in_both_forms():
    assert mg.Langevin(3, drift=1.0, noise_std=0.2).denoised(1).noise_std == (0.2, 0.2, 0.0)
    assert mg.Langevin(3, step_size=0.3, noise_scale=0.5).denoised(2).noise_scale == (0.5, 0.0, 0.0)
    assert mg.Langevin(2, drift=1.0, noise_std=(0.2, 0.1)).denoised(5).noise_std == (0.0, 0.0)


def test_a_settled_chain_has_the_numbers_of_the_last_step():
    law = mg.Langevin(3, drift=(3.0, 2.0, 1.0), noise_std=mg.Schedule(0.4, 0.1), reference_std=2.0)
    assert law.settled() == mg.Langevin(3, drift=1.0, noise_std=0.1, reference_std=2.0)


def test_what_a_bank_cannot_be(trainer, tmp_path):
    with pytest.raises(ConfigError, match=r"multigrid.bank_size must be at least batch_size \(8\), got 7"):
        trainer(multigrid={"bank_size": 7})
    with pytest.raises(ConfigError, match="batch_parts must be left at its default, 1, with multigrid.bank_size"):
        trainer(multigrid=BANK, batch_parts=2)
    ours = trainer(multigrid=BANK)
    ours.step(tiny_data(8).batch(slice(None)))
    ours.rule.bank[1] = ours.rule.bank[1][:3]
    ours.rule.write(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"bank.safetensors: must hold a bank of 12 chains"):
        ours.rule.read(tmp_path)
