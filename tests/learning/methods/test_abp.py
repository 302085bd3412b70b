"""Alternating back-propagation: a linear factor model's closed forms, hidden pixels, and what a run keeps."""

from __future__ import annotations

import pytest
import torch
from helpers.factors import FACTORS, S, angles, factor_data, likeliest, matrix
from helpers.runs import same_run
from helpers.training import tiny_config, tiny_data

from mgebm_fast import noise
from mgebm_fast.data import ImageData
from mgebm_fast.errors import ConfigError, DivergenceError
from mgebm_fast.learning import MultiGridTrainer, build_model
from mgebm_fast.learning.methods.abp import ABPRule
from mgebm_fast.models import GeneratorModel
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import DeconvSpec, Generator

UPDATES = 100


def linear_model(std=S, seed=3, **inference):
    net = Generator(FACTORS, [DeconvSpec(1, 4, 4)], output="none", seed=seed)
    return GeneratorModel(net, Inference(**{"steps": 10, "step_size": 0.12, "std": std, **inference}))


def linear_rule(images, *, batch_size=120, occlude="none", expand=True, ema=0.0, **optimiser):
    optimiser = {"name": "adam", "lr": 0.05, "betas": [0.9, 0.999], "schedule": "cosine", **optimiser}
    table = {
        "latent": FACTORS,
        "std": S,
        "infer_steps": 10,
        "infer_step_size": 0.12,
        "occlude": occlude,
        "expand": expand,
    }
    config = tiny_config(
        method="abp", batch_size=batch_size, steps=UPDATES, seed=7, sizes=[1, 4], optimiser=optimiser, abp=table,
        stabilise={"ema": ema},
    )  # fmt: skip
    return ABPRule(linear_model(), config, images=images)


def likeliest_of_the_rest(x, hidden):
    """W of the maximum likelihood of the pixels that are not hidden, by expectation-maximisation in float64: z of an
    image has the precision P = I + Σ ww'/s² over its seen pixels, and a pixel's w solves Σ E[zz'] w = Σ (x − b) E[z]
    over the images that show it. b is one number, as the generator's bias is."""
    x, seen = x.double().flatten(1), (~hidden).double().flatten(1)
    eye = torch.eye(FACTORS, dtype=torch.float64)
    weight, bias = likeliest(torch.where(seen > 0, x, x.mean())), x.mean()
    for _ in range(300):
        precision = eye + torch.einsum("np,pd,pe->nde", seen, weight, weight) / S**2
        covariance = torch.linalg.inv(precision)
        z = torch.einsum("nde,np,pe->nd", covariance, seen * (x - bias), weight) / S**2
        second = covariance + z[:, :, None] * z[:, None]
        sums = torch.einsum("np,nd->pd", seen * (x - bias), z)
        weight = torch.linalg.solve(torch.einsum("np,nde->pde", seen, second), sums)
        bias = (seen * (x - z @ weight.T)).sum() / seen.sum()
    return weight


def test_a_linear_factor_model_is_recovered():
    """The subspace, within 2 degrees, and the lengths, within 4 %, of the maximum-likelihood W of the same data."""
    x = factor_data()
    rule = linear_rule(len(x))
    for t in range(UPDATES):
        metrics = rule.update(x[rule.order.indices(t)], t)
    best, found = likeliest(x), matrix(rule.model)
    assert float(angles(found, best).max()) < 2, angles(found, best)
    lengths = torch.linalg.svdvals(found) / torch.linalg.svdvals(best)
    assert bool(((lengths - 1).abs() < 0.04).all()), lengths
    assert metrics["generator/residual"] == pytest.approx(S, rel=0.05)
    bias = rule.model.generator.layers[0].bias
    assert bias.shape == (1,)  # one channel: the mean of all pixels


def test_hidden_pixels_are_learnt_from_the_rest():
    """With 60 % of every image hidden W of the maximum likelihood of the rest is found, its subspace within 5 degrees
    and its lengths within 8 %, and the hidden pixels with two thirds of the error of their mean."""
    x = factor_data()
    rule = linear_rule(len(x), occlude="pepper")
    for t in range(UPDATES):
        metrics = rule.update(x[rule.order.indices(t)], t, detail=t == UPDATES - 1)
    assert rule.hidden is not None
    best, found = likeliest_of_the_rest(x, rule.hidden), matrix(rule.model)
    assert float(angles(found, best).max()) < 5, angles(found, best)
    lengths = torch.linalg.svdvals(found) / torch.linalg.svdvals(best)
    assert bool(((lengths - 1).abs() < 0.08).all()), lengths
    low, high = rule.model.value_range
    blind = float((x - x.mean(0)).abs().mean()) / (high - low)
    assert metrics["hidden/error"] < 0.65 * blind


def test_hidden_pixels_take_no_part():
    """Whatever stands where an image is hidden, the update is the same, bit for bit."""
    x = factor_data(20)
    rules = [linear_rule(20, batch_size=20, occlude="square") for _ in range(2)]
    hidden = rules[0].hidden
    assert hidden.shape == (20, 1, 4, 4) and bool((hidden.sum((1, 2, 3)) == 4).all())
    assert torch.equal(hidden, rules[1].hidden)
    for t in range(2):
        ids = rules[0].order.indices(t)
        rules[0].update(x[ids], t)
        rules[1].update(torch.where(hidden[ids], 9.0, x[ids]), t)
    assert torch.equal(matrix(rules[0].model), matrix(rules[1].model))
    assert torch.equal(rules[0].model.latents, rules[1].model.latents)


def test_two_updates_are_the_closed_form():
    """z ← z + δ²/2 (Wᵀ(x − Wz − b)/s² − z) + δε, ten times from the z of each image with its own noise; then
    W ← W + lr · mean((x − Wz − b)zᵀ)/s². Float64, noise by its reference."""
    x, lr, delta, steps = factor_data(10), 1e-3, 0.12, 10
    rule = linear_rule(10, batch_size=4, expand=False, name="sgd", lr=lr, schedule="constant")

    def reference(ids, step, purpose, grid):
        words, _ = noise.words(len(ids), 2, seed=7, step=step, first_sample=ids, stream=noise.stream(purpose, grid))
        return noise.normal(words).flatten(1)[:, :2]

    weight, bias = matrix(rule.model), 0.0
    latents = reference(torch.arange(10), 0, noise.Purpose.INITIAL_STATE, 1)
    torch.testing.assert_close(rule.model.latents.double(), latents, atol=2e-6, rtol=0)
    for t in range(4):  # 10 images by 4: the third batch goes on with images of the first
        ids = rule.order.indices(t)
        rule.update(x[ids], t)
        images, z = x[ids].double().flatten(1), latents[ids]
        for k in range(steps):
            pull = (images - z @ weight.T - bias) @ weight / S**2 - z
            z = z + delta**2 / 2 * pull + delta * reference(ids, t * steps + k, noise.Purpose.LATENT, 0)
        latents[ids] = z
        rest = (images - z @ weight.T - bias) / S**2
        weight, bias = weight + lr * rest.T @ z / 4, bias + lr * rest.sum() / 4
        torch.testing.assert_close(rule.model.latents.double(), latents, atol=2e-5, rtol=0)
        torch.testing.assert_close(matrix(rule.model), weight, atol=2e-5, rtol=0)


def test_expansion_moves_scale_from_latents_to_weights():
    """Every g(z) of the data stays as it is, by the averaged weights too, and their z get the second moment I."""
    rule = linear_rule(50, ema=0.9)
    net = rule.model.generator

    def images():
        live = net(rule.model.latents)
        with rule.averaged_weights():
            return live, net(rule.model.latents)

    with torch.no_grad():
        rule.model.latents.copy_(rule.model.latents @ torch.tensor([[2.0, 0.5], [0.0, 0.3]]))
        net.layers[0].weight.mul_(1.5)  # so that the average is another
        before = images()
        rule.expand()
        after = images()
    assert not torch.equal(*before)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    second = rule.model.latents.T @ rule.model.latents / 50
    torch.testing.assert_close(second, torch.eye(2), atol=1e-4, rtol=0)


TABLE = {"latent": 3, "generator_width": 4, "infer_steps": 3}


@pytest.mark.parametrize("table", [{}, {"occlude": "pepper", "latent_map": 2, "expand": True}])
def test_resumed_run_equals_the_uninterrupted(trainer, tmp_path, table):
    changes = {
        "method": "abp",
        "abp": {**TABLE, **table},
        "stabilise": {"ema": 0.9, "noise_anneal": 0.5},
        "optimiser": {"schedule": "cosine"},
    }
    trainer(out=tmp_path / "a", **changes).fit()
    trainer(out=tmp_path / "b", **changes).fit(4)
    went_on = trainer(out=tmp_path / "b", **changes)
    assert went_on.resume() == 4
    went_on.fit()
    same_run(tmp_path / "a", tmp_path / "b")


def test_chains_go_on_where_they_were(trainer):
    """20 images by 8: after one update the z of its images moved, and no others."""
    ours = trainer(method="abp", abp=TABLE)
    before = ours.model.latents.clone()
    ids = ours.rule.order.indices(0)
    ours.step(ours.data.batch(ids))
    moved = (ours.model.latents != before).any(1)
    assert set(moved.nonzero().flatten().tolist()) == set(ids.tolist())


def test_an_update_that_diverges_changes_nothing(trainer):
    ours = trainer(method="abp", abp={**TABLE, "std": 1e-30})
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    with pytest.raises(DivergenceError, match="training: inference of z: the chain became non-finite"):
        ours.step(ours.data.batch(ours.rule.order.indices(0)))
    assert all(torch.equal(value, before[name]) for name, value in ours.model.state_dict().items())
    ours = trainer(method="abp", abp=TABLE)
    with torch.no_grad():
        ours.model.generator.layers[-1].bias.fill_(float("nan"))
    with pytest.raises(DivergenceError):
        ours.step(ours.data.batch(ours.rule.order.indices(0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flips": True}, "flips must be false for the method 'abp', where an image keeps its z"),
        ({"shifts": 2}, "shifts must be 0 for the method 'abp', where an image keeps its z, got 2"),
        ({"batch_parts": 2}, "batch_parts must be 1, on one rank, for the method 'abp'"),
        ({"abp": {"latent_map": 3}}, r"sizes\[-1\] must be abp.latent_map, 3, times a power of 2, got 4"),
        ({"abp": {"occlude": "peper"}}, r"abp.occlude must be one of none, square, doodle, pepper.*'peper'"),
    ],
)
def test_what_does_not_fit(trainer, changes, message):
    with pytest.raises(ConfigError, match=message):
        trainer(method="abp", **changes)


def test_a_batch_of_other_images_is_refused(trainer):
    ours = trainer(method="abp", abp=TABLE)
    with pytest.raises(ValueError, match="a batch must hold the 8 images of its update, got 3"):
        ours.step(ours.data.batch(slice(3)))


def test_colour_and_given_models():
    data = tiny_data(9, channels=3)
    assert isinstance(data, ImageData)
    config = tiny_config(method="abp", channels=3, value_range=[0.0, 1.0], abp=TABLE)
    model = build_model(config)
    trainer = MultiGridTrainer(model, data, config, quiet=True)
    trainer.fit(2)
    x = model.sample(2)
    assert x.shape == (2, 3, 4, 4) and float(x.min()) >= 0 and float(x.max()) <= 1
