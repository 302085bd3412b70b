"""FRAME: the filter bank, the gradient of λ, moments that match, Hamiltonian chains, learned filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import tiny_config, tiny_data

from mgebm_fast import noise, ops
from mgebm_fast.data import ImageData
from mgebm_fast.errors import ConfigError
from mgebm_fast.learning import MultiGridTrainer, build_model, merge
from mgebm_fast.models import Frame, GenerativeConvNet, Model
from mgebm_fast.nets import EnergyNet
from mgebm_fast.nets.filters import filter_bank

BANK = {"scales": [2.0, 3.0], "orientations": 4, "sample_steps": 40}
TOLERANCE = 0.03  # of the mean responses, relative


def small(**changes):
    options = {**BANK, **changes.pop("frame", {})}
    return tiny_config(
        method="frame", sizes=[1, changes.pop("size", 4)], precision="fp32", seed=2, value_range=[-4.0, 4.0],
        langevin={"steps": 5, "step_size": 0.3, "reference_std": 1.0}, frame=options, **changes,
    )  # fmt: skip


def test_filters_are_normalised_and_see_no_brightness():
    bank = filter_bank([2.0, 4.5], 6, signs=False).double()
    assert bank.shape == (2 * 6 * 2 + 1 + 2, 1, 11, 11)
    torch.testing.assert_close(bank.abs().sum((1, 2, 3)), torch.ones(len(bank)).double(), rtol=1e-6, atol=0)
    blind = torch.ones(len(bank), dtype=torch.bool)
    blind[24] = False  # the pixel itself
    assert bank.sum((1, 2, 3))[blind].abs().max() < 1e-6 and bank[24, 0, 5, 5] == 1
    signed = filter_bank([2.0, 4.5], 6)
    assert signed[0::2].double().equal(bank) and signed[1::2].equal(-signed[0::2])


@pytest.mark.parametrize("turn", range(4))
def test_a_gabor_filter_answers_its_own_wave_most(turn):
    bank = filter_bank([4.0], 4, signs=False)[: 2 * 4]
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    angle = np.pi * turn / 4
    wave = torch.cos(2 * np.pi / 4 * ((x - 4) * np.cos(angle) + (y - 4) * np.sin(angle)))
    answers = (bank[:, 0] * wave).sum((1, 2)).abs()
    assert int(answers[0::2].argmax()) == turn


def test_colour_filters_see_grey_and_single_channels():
    bank = filter_bank([3.0], 2, channels=3, signs=False)
    assert bank.shape == (2 * 2 + 3 + 3, 3, 7, 7)
    assert bank[:4, 0].equal(bank[:4, 1]) and int((bank[4:].abs().sum((2, 3)) > 0).sum()) == 6


@pytest.mark.parametrize(("scales", "orientations"), [([], 4), ([0.5], 4), ([2.0], 0)])
def test_wrong_banks(scales, orientations):
    with pytest.raises(ValueError, match="filter_bank: (scales|orientations) must"):
        filter_bank(scales, orientations)


def test_the_energy_is_linear_in_the_rectified_responses():
    model = build_model(small(frame={"thresholds": [0.0, 0.2]}))
    weights = torch.randn(len(model.weights), generator=torch.Generator().manual_seed(0))
    model.set_weights(weights)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    bank = filter_bank(BANK["scales"], BANK["orientations"]).double()
    plain = torch.nn.functional.conv2d(x.double(), bank, padding=bank.shape[-1] // 2)
    responses = torch.cat([(plain - b).relu() for b in (0.0, 0.2)], 1)
    torch.testing.assert_close(model.responses(x).double(), responses.mean((2, 3)), rtol=1e-5, atol=1e-6)
    expected = -(responses.sum((2, 3)) * weights.double()).sum(1)
    torch.testing.assert_close(model.net(x).double(), expected, rtol=1e-5, atol=1e-4)
    assert model.weights.equal(weights)


def test_an_update_moves_the_weights_by_the_difference_of_moments():
    config = small(optimiser={"name": "sgd", "lr": 0.5})
    data = tiny_data()
    trainer = MultiGridTrainer(None, data, config, device="cpu", quiet=True)
    frozen = [p.clone() for p in trainer.model.net.layers.parameters()]
    observed = trainer._loop.batches.batch(0)
    trainer.fit(1)
    model = trainer.model
    difference = model.responses(model.from_uint8(observed)).mean(0) - model.responses(model.bank).mean(0)
    torch.testing.assert_close(model.weights, 0.5 * difference, rtol=1e-4, atol=1e-6)
    trainer.fit(3)
    assert all(a.equal(b) for a, b in zip(frozen, model.net.layers.parameters(), strict=True))
    head = model.net.head.weight.view(len(model.weights), -1)
    assert head.equal(head[:, :1].expand_as(head))


def waves(n=24, size=8):
    """Diagonal waves of random phase with a little noise, uint8."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    phase = random.uniform(0, 2 * np.pi, (n, 1, 1))
    images = 128 + 40 * np.sin(2 * np.pi * (x + y) / (3 * 2**0.5) + phase) + random.normal(0, 12, (n, size, size))
    return ImageData(images.clip(0, 255).round().astype(np.uint8)[:, None])


@pytest.mark.parametrize("leapfrog", [None, 3])
def test_moments_match(leapfrog):
    """After training, mean responses under the model are those of the data, to `TOLERANCE` of their mean: over the
    chains of 20 further updates at a rate that has fallen to nothing. Before training they are far off."""
    config = small(
        size=8, steps=60, batch_size=24, optimiser={"lr": 0.15, "betas": [0.5, 0.99], "schedule": "cosine"},
        frame={"leapfrog_steps": leapfrog},
    )  # fmt: skip
    data = waves()
    trainer = MultiGridTrainer(None, data, config, device="cpu", quiet=True)
    model = trainer.model
    observed = model.responses(model.from_uint8(data.batch(list(range(len(data)))))).double().mean(0)

    def error(responses):
        return float((responses - observed).abs().mean() / observed.mean())

    trainer.fit(1)
    assert error(model.responses(model.bank).double().mean(0)) > 0.2
    trainer.fit(40)
    moments = []
    for update in range(41, 61):
        trainer.fit(update)
        moments.append(model.responses(model.bank).double().mean(0))

    assert error(torch.stack(moments).mean(0)) < TOLERANCE


def test_hamiltonian_chains_resume_and_sample_apart_from_training(tmp_path):
    config = small(frame={"leapfrog_steps": 2, "restart": 0.2})
    whole = MultiGridTrainer(None, tiny_data(), config, device="cpu", quiet=True)
    whole.fit()
    first = MultiGridTrainer(None, tiny_data(), config, out=tmp_path / "run", device="cpu", quiet=True)
    first.fit(3)
    second = MultiGridTrainer(None, tiny_data(), config, out=tmp_path / "run", device="cpu", quiet=True)
    second.resume()
    second.fit()
    assert whole.model.bank.equal(second.model.bank) and whole.model.weights.equal(second.model.weights)
    loaded = Model.load(tmp_path / "run")
    assert type(loaded) is Frame and loaded.leapfrog_steps == 2
    assert loaded.sample(3, seed=5).equal(whole.model.sample(3, seed=5))
    large = loaded.at_size(9)
    assert large.weights.equal(loaded.weights) and large.sample(2).shape == (2, 1, 9, 9)
    with pytest.raises(ValueError, match="must have noise for Hamiltonian chains"):
        build_model(merge(config, {"langevin": {"noise_scale": 0.0}}))


def test_hamiltonian_chains_use_no_counter_twice(monkeypatch):
    """Over updates, and between training and samples, every (stream, step, sample id) is drawn once."""
    trainer = MultiGridTrainer(
        None, tiny_data(), small(frame={"leapfrog_steps": 2, "sample_steps": 6}), device="cpu", quiet=True
    )
    used: list[tuple[int, int, int]] = []
    draw = ops.noise

    def noted(shape, *, step, stream, first_sample=0, **rest):
        tensor = isinstance(first_sample, torch.Tensor) and first_sample.dim() > 0
        ids = first_sample.tolist() if tensor else range(int(first_sample), int(first_sample) + shape[0])
        if stream != noise.stream(noise.Purpose.PROBE):  # what energies are measured by is always the same
            used.extend((stream, step, i) for i in ids)
        return draw(shape, step=step, stream=stream, first_sample=first_sample, **rest)

    monkeypatch.setattr(ops, "noise", noted)
    trainer.fit(2)
    training = len(used)
    trainer.model.sample(4, seed=trainer.config.seed)
    assert training >= 2 * 2 * 5 * 8 and len(used) > training and len(used) == len(set(used))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stabilise": {"energy_l2": 0.01}}, "stabilise.energy_l2 must be 0 for the method 'frame'.*, got 0.01"),
        (
            {"stabilise": {"noise_anneal": 0.0}, "frame": {"leapfrog_steps": 2}},
            "stabilise.noise_anneal must be > 0 with frame.leapfrog_steps, got 0",
        ),
    ],
)
def test_keys_that_do_not_fit_are_refused_at_the_start(changes, message):
    with pytest.raises(ConfigError, match=message):
        MultiGridTrainer(None, tiny_data(), small(**changes), quiet=True)


def test_langevin_chains_may_end_without_noise():
    trainer = MultiGridTrainer(None, tiny_data(), small(stabilise={"noise_anneal": 0.0}), quiet=True)
    assert trainer.fit().finished and trainer.model.langevin[0].update().noise_std == 0


def test_filters_of_a_trained_run(tmp_path):
    """The deep version: two lower layers of a trained net, frozen, under λ."""
    net = EnergyNet.from_config(
        {"size": [4, 4], "channels": 1, "layers": [[3, 3, 1], [5, 3, 2], [2, 3, 1]], "norm": "none",
         "activation": "relu", "negative_slope": 0.2, "spectral_norm": False, "head": "sum", "ndim": 2}
    )  # fmt: skip
    GenerativeConvNet(4, channels=1, value_range=(-4.0, 4.0), nets=[net]).save(tmp_path / "model.safetensors")
    options = {"filters": str(tmp_path / "model.safetensors"), "layers": 2}
    model = build_model(small(frame=options))
    assert len(model.weights) == 5
    for source, target in zip(net.convolutions[:2], model.net.convolutions, strict=True):
        assert source.weight.equal(target.weight) and not target.weight.requires_grad
    trainer = MultiGridTrainer(None, tiny_data(), small(frame=options), device="cpu", quiet=True)
    trainer.fit(2)
    assert trainer.model.weights.abs().max() > 0
    for changes, message in (
        ({"layers": 4}, "frame.layers must be at most the 3"),
        ({"filters": str(tmp_path / "none")}, "frame.filters must be gabor or the folder of a run"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_model(small(frame={**options, **changes}))
    with pytest.raises(ConfigError, match="must be learned from images of 3 channels"):
        build_model(small(channels=3, frame=options))
