"""Cooperative learning: a linear factor model's closed form, one update against float64, and what a run keeps."""

from __future__ import annotations

import pytest
import torch
from helpers.factors import FACTORS, Linear, angles, factor_data, likeliest, matrix
from helpers.runs import same_run
from helpers.training import tiny_config, tiny_data
from torch import nn

from mgebm_fast import noise
from mgebm_fast.errors import ConfigError, DivergenceError
from mgebm_fast.learning import CooperativeRule, build_model, load_preset
from mgebm_fast.models import CoopNets
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import DeconvSpec, Generator

STEPS, DELTA, SEED = 10, 0.1, 7


class Quadratic(nn.Module):
    """E(x) = ½ x'Px + ⟨v, x⟩, from P = 0."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(16, 16))
        self.vector = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        x = x.flatten(1)
        return ((x @ self.matrix) * x).sum(1) / 2 + x @ self.vector


def linear_rule(net, images, **changes):
    """A rule whose generator is a matrix and whose descriptor is `net`; chains of the coupled form, no clamp."""
    config = tiny_config(
        **{
            "method": "cooperative", "batch_size": images, "steps": 300, "seed": SEED, "sizes": [1, 4],
            "precision": "fp32", "langevin": {"steps": STEPS, "step_size": DELTA, "clamp": False}, **changes,
        }
    )  # fmt: skip
    generator = Generator(FACTORS, [DeconvSpec(1, 4, 4)], output="none", seed=3)
    inference = Inference(1, 0.1, 0.3)
    chain, kept = config.dynamics(), {"nets": [net], "value_range": (-1, 1)}
    model = CoopNets(4, generator, inference, channels=1, langevin=chain, **kept)
    return CooperativeRule(model, config, images=images)


def test_a_linear_factor_model_is_recovered():
    """A quadratic descriptor and a linear generator on factor data whose noise variance is below Kδ².

    The generator stands still where the chain leaves the mean of ỹ given z alone, so the descriptor is flat along it;
    there K free steps add Kδ² to the variance of Wz, and both together are the data's: W = U(Λ − Kδ²)^½ with U and Λ
    the leading principal axes. Angles within 2 degrees, lengths within 3 %.
    """
    x = factor_data() - 0.3
    options = {"name": "adam", "lr": 0.2, "betas": [0.0, 0.9], "schedule": "cosine"}
    taught = {"latent": FACTORS, "std": 0.3, "lr": 0.02}
    rule = linear_rule(Quadratic(), len(x), optimiser=options, cooperative=taught)
    for t in range(300):
        rule.update(x, t)
    values = torch.linalg.eigvalsh(torch.cov(x.double().flatten(1).T, correction=0))[-FACTORS:].flip(0)
    found = matrix(rule.model)
    assert float(angles(found, likeliest(x)).max()) < 2, angles(found, likeliest(x))
    lengths = torch.linalg.svdvals(found) / (values - STEPS * DELTA**2).sqrt()
    assert bool(((lengths - 1).abs() < 0.03).all()), lengths


def reference_noise(n, elements, step, purpose, grid):
    words, _ = noise.words(n, elements, seed=SEED, step=step, stream=noise.stream(purpose, grid))
    return noise.normal(words).flatten(1)[:, :elements]


@pytest.mark.parametrize("infer", [0, 3])
def test_two_updates_are_the_closed_form(infer):
    """On E(x) = −⟨w, x⟩: ỹ = Wz + b + Kδ²/2 w + δΣε; w gains the mean difference; z takes `infer` Langevin steps on
    its posterior given ỹ; then W gains lr · mean((ỹ − Wz − b)z')/s². All by the weights before the update, float64."""
    n, lr, teach, std, step = 6, 0.125, 1e-3, 0.4, 0.15
    table = {"latent": FACTORS, "std": std, "lr": teach, "infer_steps": infer, "infer_step_size": step}
    net = Linear()
    rule = linear_rule(net, n, optimiser={"name": "sgd", "lr": lr}, cooperative=table)
    x = factor_data(n)
    weight, bias, pull = matrix(rule.model), 0.0, net.weight.detach().double().flatten()
    for t in range(2):
        rule.update(x, t)
        z = reference_noise(n, FACTORS, t, noise.Purpose.INITIAL_STATE, 1)
        y = z @ weight.T + bias
        for k in range(STEPS):
            y = y + DELTA**2 / 2 * pull
            y = y + DELTA * reference_noise(n, 16, t * STEPS + k, noise.Purpose.TRAINING_CHAIN, 1)
        for k in range(infer):
            force = (y - z @ weight.T - bias) @ weight / std**2 - z
            z = z + step**2 / 2 * force + step * reference_noise(n, 2, t * infer + k, noise.Purpose.LATENT, 0)
        rest = (y - z @ weight.T - bias) / std**2
        weight, bias = weight + teach * rest.T @ z / n, bias + teach * rest.sum() / n
        pull = pull + lr * (x.double().flatten(1).mean(0) - y.mean(0))
        torch.testing.assert_close(matrix(rule.model), weight, atol=2e-5, rtol=0)
        torch.testing.assert_close(net.weight.detach().double().flatten(), pull, atol=2e-5, rtol=0)
        assert rule.model.generator.layers[0].bias.item() == pytest.approx(float(bias), abs=2e-5)


TABLE = {"latent": 3, "generator_width": 4}


@pytest.mark.parametrize("infer", [0, 2])
def test_resumed_run_equals_the_uninterrupted(trainer, tmp_path, infer):
    changes = {
        "method": "cooperative",
        "cooperative": {**TABLE, "infer_steps": infer},
        "stabilise": {"ema": 0.9, "noise_anneal": 0.5, "data_noise": 0.03},
        "optimiser": {"schedule": "cosine"},
        "flips": True,
    }
    trainer(out=tmp_path / "a", **changes).fit()
    trainer(out=tmp_path / "b", **changes).fit(4)
    went_on = trainer(out=tmp_path / "b", **changes)
    assert went_on.resume() == 4
    went_on.fit()
    same_run(tmp_path / "a", tmp_path / "b")


def test_the_average_covers_both_nets(trainer):
    ours = trainer(method="cooperative", cooperative=TABLE, stabilise={"ema": 0.9})
    ours.fit(3)
    names = set(ours.rule.average.state())
    assert {name.partition(".")[0] for name in names} == {"nets", "generator"}
    live = ours.model.generator.layers[0].weight.detach().clone()
    with ours.rule.averaged_weights():
        assert not torch.equal(ours.model.generator.layers[0].weight, live)
    assert torch.equal(ours.model.generator.layers[0].weight, live)


def test_an_update_that_diverges_changes_nothing(trainer):
    """Even where only the generator does: the descriptor's step is not made either."""
    ours = trainer(method="cooperative", cooperative={**TABLE, "std": 1e-30})
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    with pytest.raises(DivergenceError, match="the generator's loss became non-finite at update 1"):
        ours.step(tiny_data().batch(slice(8)))
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())


def test_the_descriptor_is_the_finest_net_of_its_twin():
    config = load_preset("digits-cooperative")
    model, twin = build_model(config), build_model(load_preset("digits"))
    assert model.nets[0].config() == twin.nets[-1].config() and model.sizes == (1, 8)
    assert model.generator.config()["latent"] == config.options.latent and model.kind == "CoopNets"


def test_what_does_not_fit(trainer):
    with pytest.raises(ConfigError, match="batch_parts must be 1, on one rank, for the method 'cooperative'"):
        trainer(method="cooperative", batch_parts=2)
    with pytest.raises(ConfigError, match="abp holds keys of the method 'abp'"):
        trainer(method="cooperative", abp={"latent": 3})
