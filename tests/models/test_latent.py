"""Inference of latent variables: the law of the chain on a linear generator, hidden pixels, noise, interpolation."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast import noise
from mgebm_fast.errors import DivergenceError
from mgebm_fast.models import CoopNets, GeneratorModel, Model
from mgebm_fast.models.latent import Inference, between, draw_latents
from mgebm_fast.nets import DeconvSpec, Generator, generator_layers
from mgebm_fast.sampling import Langevin

STD, DELTA, CHAINS = 0.8, 0.5, 20_000


def linear(seed=2):
    """g(z) = Wz + b from 2 numbers to 2×2 pixels, and W (4, 2), b (4,) in float64."""
    net = Generator(2, [DeconvSpec(1, 2, 2)], output="none", seed=seed)
    with torch.no_grad():
        net.layers[0].weight.copy_(torch.tensor([[1.0, 0.4, -0.3, 0.2], [0.1, -0.8, 0.5, 0.9]]).reshape(2, 1, 2, 2))
        net.layers[0].bias.fill_(0.25)
    weight = net.layers[0].weight.detach().double().flatten(1).T
    return net, weight, torch.full((4,), 0.25, dtype=torch.float64)


def law(weight, rest, steps):
    """Mean and covariance of z after K steps from N(0, I): the posterior has precision Λ = I + WᵀW/s² and mean
    μ = Λ⁻¹Wᵀ(x − b)/s²; a step is z ← μ + A(z − μ) + δε, A = I − δ²Λ/2."""
    eye = torch.eye(2, dtype=torch.float64)
    precision = eye + weight.T @ weight / STD**2
    mean = torch.linalg.solve(precision, weight.T @ rest / STD**2)
    step = eye - DELTA**2 / 2 * precision
    power = torch.linalg.matrix_power(step, steps)
    noise_part = sum(DELTA**2 * torch.linalg.matrix_power(step, 2 * k) for k in range(steps))
    return mean - power @ mean, power @ power + noise_part


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize("hide", [False, True])
def test_posterior_of_a_linear_generator(steps, hide):
    """Mean and covariance over chains within 5 standard errors: 20 numbers, false alarms below 1 in 10⁵."""
    net, weight, bias = linear()
    x = torch.tensor([1.0, -0.5, 0.75, 2.0], dtype=torch.float64)
    hidden = torch.tensor([[[False, True], [False, False]]]) if hide else None
    seen = slice(None) if hidden is None else [0, 2, 3]
    mean, covariance = law(weight[seen], (x - bias)[seen], steps)
    z = draw_latents(net, CHAINS, seed=1)
    images = x.float().reshape(1, 1, 2, 2).expand(CHAINS, -1, -1, -1)
    z = Inference(steps, DELTA, STD)(net, images, z, hidden=hidden, seed=1, stream=7).double()
    error = (covariance.diag() / CHAINS).sqrt()
    assert bool(((z.mean(0) - mean).abs() < 5 * error).all())
    found, spread = torch.cov(z.T), covariance.diag()
    error = ((torch.outer(spread, spread) + covariance**2) / CHAINS).sqrt()
    assert bool(((found - covariance).abs() < 5 * error).all())


def test_stationary_law_tends_to_the_posterior():
    """What the law above tends to: Λ⁻¹(I − δ²Λ/4)⁻¹, which is the posterior's Λ⁻¹ for a small step."""
    _, weight, _ = linear()
    precision = torch.eye(2, dtype=torch.float64) + weight.T @ weight / STD**2
    _, covariance = law(weight, torch.zeros(4, dtype=torch.float64), 200)
    step_part = torch.eye(2, dtype=torch.float64) - DELTA**2 / 4 * precision
    torch.testing.assert_close(covariance, torch.linalg.inv(precision @ step_part))


def test_noise_free_chain_ends_at_the_mode_and_ignores_what_is_hidden():
    net, weight, bias = linear()
    x = torch.tensor([[1.0, -0.5, 0.75, 2.0]])
    hidden = torch.tensor([[[False, True], [False, False]]])
    climb = Inference(400, DELTA, STD, noise_scale=0.0)
    z = climb(net, x.reshape(1, 1, 2, 2), torch.zeros(1, 2), hidden=hidden)
    seen, rest = weight[[0, 2, 3]], (x[0].double() - bias)[[0, 2, 3]]
    mode = torch.linalg.solve(STD**2 * torch.eye(2, dtype=torch.float64) + seen.T @ seen, seen.T @ rest)
    torch.testing.assert_close(z[0].double(), mode, atol=1e-5, rtol=0)
    x[0, 1] = 1e6
    assert torch.equal(climb(net, x.reshape(1, 1, 2, 2), torch.zeros(1, 2), hidden=hidden), z)


def test_chains_are_functions_of_ids_and_split_in_batch_and_time():
    net = Generator(3, generator_layers(8, 1, width=2), seed=0)
    x, z = torch.randn(6, 1, 8, 8), draw_latents(net, 6, seed=4)
    whole = Inference(6, 0.1, 0.5)(net, x, z, seed=9, first_sample=10, stream=3)
    half = Inference(6, 0.1, 0.5)(net, x[3:], z[3:], seed=9, first_sample=13, stream=3)
    torch.testing.assert_close(half, whole[3:], atol=1e-5, rtol=0)
    ids = torch.tensor([15, 10])
    picked = Inference(6, 0.1, 0.5)(net, x[[5, 0]], z[[5, 0]], seed=9, first_sample=ids, stream=3)
    torch.testing.assert_close(picked, whole[[5, 0]], atol=1e-5, rtol=0)
    first = Inference(2, 0.1, 0.5)(net, x, z, seed=9, first_sample=10, stream=3)
    rest = Inference(4, 0.1, 0.5)(net, x, first, seed=9, first_sample=10, first_step=2, stream=3)
    assert torch.equal(rest, whole)


def test_draws_are_the_reference_noise():
    net = Generator(3, generator_layers(8, 1, width=2))
    words, _ = noise.words(4, 3, seed=5, step=2, first_sample=7, stream=noise.stream(noise.Purpose.SAMPLING_STATE, 1))
    expected = noise.normal(words).flatten(1)[:, :3]
    torch.testing.assert_close(
        draw_latents(net, 4, seed=5, step=2, first_sample=7).double(), expected, atol=2e-6, rtol=0
    )


def test_points_between_lie_on_arcs():
    a, b = torch.randn(2, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = between(a, b, 7)
    torch.testing.assert_close(path[:, 0], a)
    torch.testing.assert_close(path[:, -1], b)
    norms = path.norm(dim=2)
    torch.testing.assert_close(
        norms, torch.lerp(norms[:, :1], norms[:, -1:], torch.linspace(0, 1, 7, dtype=torch.float64))
    )
    units = path / norms[..., None]
    turns = (units[:, 1:] * units[:, :-1]).sum(2).arccos()
    torch.testing.assert_close(turns, turns[:, :1].expand_as(turns))
    torch.testing.assert_close(between(a, a, 3)[:, 1], a)
    with pytest.raises(ValueError, match="points must be at least 2, got 1"):
        between(a, b, 1)


def models():
    net = Generator(3, generator_layers(4, 1, width=2), seed=1)
    inference = Inference(5, 0.1, 0.3)
    chain = Langevin(3, drift=0.5, noise_std=0.02, clamp=(-1.0, 1.0))
    options = {"norm": "none", "variant": "compact", "width": 0.1}
    coop = CoopNets(4, net, inference, channels=1, langevin=chain, value_range=(-1, 1), seed=2, **options)
    return GeneratorModel(net, inference, complete_steps=20), coop


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_samples_completes_and_is_stored(which, tmp_path):
    model = models()[which]
    x = model.sample(5, seed=3)
    assert x.shape == (5, 1, 4, 4)
    torch.testing.assert_close(model.sample(2, seed=3, first_sample=3), x[3:], atol=1e-5, rtol=0)
    alone = model.generate(5, seed=3)
    assert torch.equal(alone, x) if which == 0 else not torch.equal(alone, x)
    row = model.interpolate(2, 4, seed=3)
    assert row.shape == (2, 4, 1, 4, 4)
    torch.testing.assert_close(row[:, [0, -1]].flatten(0, 1), model.generate(4, seed=3), atol=1e-5, rtol=0)
    model.save(tmp_path / "model.safetensors")
    again = Model.load(tmp_path / "model.safetensors")
    assert type(again) is type(model) and again.config() == model.config()
    assert torch.equal(again.sample(5, seed=3), x)

    known, mask = torch.rand(5, 1, 4, 4) * 2 - 1, torch.zeros(5, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 1:3, 1:3] = True
    filled = model.sample(5, seed=3, mask=mask, known=known)
    assert torch.equal(filled[~mask], known[~mask]) and not torch.equal(filled[mask], known[mask])


def test_completion_finds_what_the_generator_made():
    """Half of g(z) hidden from a linear generator of two numbers: the other half gives them away."""
    net, *_ = linear()
    model = GeneratorModel(net, Inference(1, 0.05, 0.1), complete_steps=400)
    x = model.generate(6, seed=11)
    mask = torch.tensor([[[[False, True], [False, True]]]]).expand(6, -1, -1, -1)
    filled = model.complete(x, mask, seed=12)
    assert float((filled - x).abs()[mask].mean()) < 0.1 * float((x - x.mean(0)).abs()[mask].mean())


def test_frozen_statistics_keep_the_generator():
    coop = models()[1]
    assert torch.equal(coop.freeze_norm().generate(3), coop.generate(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Inference(0, 0.1, 0.3), "steps must be a positive int"),
        (lambda: models()[0].infer(torch.zeros(2, 1, 4, 4), steps=-3), "infer: steps must be a positive int.*, got -3"),
        (lambda: models()[0].infer(torch.zeros(2, 1, 4, 4), steps=0), "infer: steps must be a positive int.*, got 0"),
        (lambda: models()[1].infer(torch.zeros(2, 1, 4, 4), steps=2.0), "infer: steps must be a positive .*, got 2.0"),
        (lambda: Inference(1, 0.1, 0.0), "std must be a finite number > 0, got 0.0"),
        (lambda: Inference(1, 0.1, 1.0)(linear()[0], torch.zeros(3, 1, 2, 2), torch.zeros(2, 2)), "3 images, got 2"),
        (lambda: Inference(1, 0.1, 1.0)(linear()[0], torch.zeros(3, 2, 2, 2), torch.zeros(3, 2)), "x must be images"),
        (lambda: CoopNets(8, linear()[0], Inference(1, 0.1, 1.0), channels=1), "images of 1 x 8 x 8, got 1 x 2 x 2"),
    ],
)  # fmt: skip
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_step_too_large_diverges_in_words():
    with pytest.raises(DivergenceError, match="infer: the chain became non-finite at step"):
        Inference(200, 3.0, 0.01)(linear()[0], torch.ones(1, 1, 2, 2), torch.ones(1, 2))
