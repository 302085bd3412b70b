"""MALA and HMC have the laws they are made for: known ones, and by joint simulation and ranks where none is known.

Statistical tests compare thousands of independent chains with a law known in closed form: Kolmogorov–Smirnov and χ² at
p > 1e-4 and z-scores at |z| < 5, about 50 figures in all, so correct chains fail the file with probability below 0.6 %.
Seeds are fixed, so that a pass stays a pass. Chains that start in the law and are wrong leave it: the unadjusted chain
at the same step is shown to fail the same tests.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers.mcmc_cases import CHAINS, P_VALUE, agrees, normals
from scipy import stats

import mgebm_fast as mg
from mgebm_fast.nets import ConvSpec, EnergyNet

LIMIT = 5.0


@pytest.mark.parametrize("name", CHAINS)
def test_a_correlated_gaussian_stays_and_is_found(name):
    covariance = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.5, -0.4], [0.0, -0.4, 0.7]], dtype=torch.float64)
    mean, precision = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), torch.linalg.inv(covariance)
    root = torch.linalg.cholesky(covariance)

    def energy(x):
        away = x.double() - mean
        return ((away @ precision) * away).sum(1) / 2

    n = 4000
    exact = (mean + normals(n, 3) @ root.T).float()
    for start, rounds in ((exact, 1), (torch.full((n, 3), 3.0), 5)):  # stays; is found from far away
        x = start
        for i in range(rounds):
            result = CHAINS[name](energy, x, seed=1, first_step=100 * i)
            x = result.x
        assert 0.3 < float(result.acceptance.mean()) < 0.95
        white = torch.linalg.solve_triangular(root, (x.double() - mean).T, upper=False).T
        for column in white.T:
            assert agrees(column, stats.norm.cdf) > P_VALUE
        z_mean = white.mean(0) * math.sqrt(n)
        z_square = (white.T @ white / n - torch.eye(3)) * math.sqrt(n) / (1 + torch.eye(3)).sqrt()
        assert z_mean.abs().max() < LIMIT and z_square.abs().max() < LIMIT


def mixture_law(x):
    return 0.3 * stats.norm.cdf(x, -1.5, 0.6) + 0.7 * stats.norm.cdf(x, 1.5, 0.6)


def mixture_energy(x):
    flat = x.double().flatten(1)
    modes = torch.stack([math.log(w) - (flat - m).square() / (2 * 0.6**2) for w, m in ((0.3, -1.5), (0.7, 1.5))])
    return -torch.logsumexp(modes, 0).sum(1)


@pytest.mark.parametrize("chain", [mg.MALA(steps=1000, step_size=0.8), mg.HMC(120, 5, 0.5, jitter=0.3)], ids=repr)
def test_a_mixture_gets_its_weights_from_one_mode(chain):
    x = chain(mixture_energy, torch.full((1500, 1), -1.5), seed=2).x
    assert agrees(x, mixture_law) > P_VALUE
    share = float((x > 0).double().mean())
    expected = 1.0 - mixture_law(0.0)
    assert abs(share - expected) < LIMIT * math.sqrt(expected * (1 - expected) / 1500)


def test_the_unadjusted_chain_fails_where_the_corrected_one_passes():
    x = normals(6000, 1).float()

    def energy(x):
        return x.double().square().sum(1) / 2

    langevin = mg.Langevin(steps=20, step_size=0.9)
    assert agrees(mg.MALA.correcting(langevin)(energy, x, seed=4).x, stats.norm.cdf) > P_VALUE
    assert agrees(langevin(energy, x, seed=4), stats.norm.cdf) < P_VALUE


@pytest.mark.parametrize("chain", [mg.MALA(60, 0.4, box=(0.0, 1.0)), mg.HMC(20, 4, 0.25, box=(0.0, 1.0))], ids=repr)
def test_a_box_holds_its_law(chain):
    """exp(−2x) on [0, 1], from a start on the wall."""
    x = chain(lambda x: 2.0 * x.double().sum(1), torch.ones(3000, 2), seed=6).x
    assert x.min() >= 0 and x.max() <= 1
    for column in x.T:
        assert agrees(column, lambda v: np.expm1(-2.0 * np.clip(v, 0, 1)) / math.expm1(-2.0)) > P_VALUE


def test_held_pixels_keep_their_bits_and_the_others_get_their_conditional_law():
    rho, n = 0.8, 4000

    def energy(x):
        a, b = x.double().T
        return (a**2 - 2 * rho * a * b + b**2) / (2 * (1 - rho**2))

    x = torch.stack([torch.full((n,), 1.3), torch.zeros(n)], 1)
    mask = torch.tensor([False, True])
    result = mg.HMC(20, 5, 0.3)(energy, x, mask=mask, seed=8)
    assert torch.equal(result.x[:, 0], x[:, 0])
    assert agrees(result.x[:, 1], stats.norm(rho * 1.3, math.sqrt(1 - rho**2)).cdf) > P_VALUE


def bent(theta):
    return theta + 0.4 * torch.sin(2 * theta)  # monotone: one mode, whose chains forget within the steps between draws


def posterior_energy(y):
    """−log p(y | θ), y | θ ~ N(θ + 0.4 sin 2θ, 0.5²); the prior N(0, 1) is the chain's reference."""
    return lambda theta: ((y - bent(theta.double())).square() / (2 * 0.5**2)).sum(1)


def observe(theta, seed):
    return bent(theta.double()) + 0.5 * normals(len(theta), 1, seed=seed)


@pytest.mark.parametrize("name", CHAINS)
def test_geweke_joint_distribution(name):
    """Alternating y | θ and a chain on θ | y must keep the joint law, and so the prior of θ (Geweke, 2004)."""
    chain = dataclasses.replace(CHAINS[name], steps=8, step_size=0.4, reference_std=1.0)
    theta = normals(3000, 1, seed=3).float()
    for i in range(6):
        theta = chain(posterior_energy(observe(theta, 100 + i)), theta, seed=9, first_step=100 * i).x
    assert agrees(theta, stats.norm.cdf) > P_VALUE


def ranks_are_uniform(draws, truth):
    """χ² of the ranks of `truth` (n, 1) among its draws (L, n, 1) against the uniform law on 0 … L."""
    ranks = (draws < truth).sum(0).flatten()
    return stats.chisquare(torch.bincount(ranks, minlength=len(draws) + 1).numpy()).pvalue


def trajectory_after(chain, energy, theta, burn_in, every, **place):
    kept = [x.clone() for step, x in chain.trajectory(energy, theta, every=every, **place) if step >= burn_in]
    return torch.stack(kept)


@pytest.mark.parametrize("name", CHAINS)
def test_simulation_based_calibration(name):
    """θ from the prior, y | θ, a chain on θ | y from elsewhere: every rank of θ among its draws is as likely.

    Source: Talts, Betancourt, Simpson, Vehtari, Gelman (2018, arXiv 1804.06788).
    """
    burn_in, every, draws = 48, 12, 19
    chain = dataclasses.replace(CHAINS[name], steps=burn_in + every * draws, step_size=0.4, reference_std=1.0)
    truth = normals(3000, 1, seed=5)
    start = normals(3000, 1, seed=6).float()
    found = trajectory_after(chain, posterior_energy(observe(truth, 7)), start, burn_in, every, seed=8)
    assert found.shape == (draws, 3000, 1)
    assert ranks_are_uniform(found.double(), truth) > P_VALUE


def test_calibration_finds_the_bias_of_an_unadjusted_chain():
    burn_in, every, draws = 48, 12, 19
    chain = mg.Langevin(steps=burn_in + every * draws, step_size=0.55, reference_std=1.0)
    truth, start = normals(3000, 1, seed=5), normals(3000, 1, seed=6).float()
    energy = posterior_energy(observe(truth, 7))
    assert ranks_are_uniform(trajectory_after(chain, energy, start, burn_in, every, seed=8).double(), truth) < P_VALUE
    exact = mg.MALA.correcting(chain)
    assert ranks_are_uniform(trajectory_after(exact, energy, start, burn_in, every, seed=8).double(), truth) > P_VALUE


def test_the_law_through_a_convolution():
    """A net of slope 1 is affine, E = −w·x − c, so with the reference N(m, σ²) the law is N(m + σ²w, σ²)."""
    net = EnergyNet(
        4, 2, [ConvSpec(6, 3), ConvSpec(4, 3, 2)], norm="none", activation="leaky_relu", negative_slope=1.0, seed=3
    )
    with torch.no_grad():
        net.head.weight.mul_(5.0)
    units = torch.eye(32).reshape(32, 2, 4, 4)
    with torch.no_grad():
        w = (net.score(units) - net.score(torch.zeros_like(units[:1]))).double()
    n, std, mean = 3000, 0.7, 0.4
    law = mean + std**2 * w
    assert w.abs().max() > 0.5
    x = (mean + std * normals(n, 32)).float().reshape(n, 2, 4, 4)
    result = mg.HMC(12, 5, 0.25, reference_std=std, reference_mean=mean)(net, x, seed=1)
    assert 0.7 < float(result.acceptance.mean()) < 1
    white = (result.x.double().flatten(1) - law) / std
    assert white.mean(0).abs().max() * math.sqrt(n) < LIMIT
    assert (white.square().mean(0) - 1).abs().max() * math.sqrt(n / 2) < LIMIT
    assert agrees(white[:, 0], stats.norm.cdf) > P_VALUE
