"""MALA and HMC: the leapfrog, the acceptance against float64, and what a chain is a function of.

That the chains have the laws they are made for: test_mcmc_laws.py.
"""

import dataclasses
import math

import pytest
import torch
from helpers.mcmc_cases import CHAINS, P_VALUE, agrees, normals
from scipy import stats

import mgebm_fast as mg
from mgebm_fast import noise, ops
from mgebm_fast.nets import ConvSpec, EnergyNet
from mgebm_fast.sampling import metropolis
from mgebm_fast.sampling.metropolis import leapfrog


def quartic(x):
    """A smooth energy that is not quadratic, in the precision of x."""
    flat = x.flatten(1)
    return (flat**4 / 4 + flat.cos()).sum(1) + 0.3 * flat[:, 0] * flat[:, 1]


def quartic_force(x):
    flat = x.flatten(1)
    force = flat**3 - flat.sin()
    force[:, 0] += 0.3 * flat[:, 1]
    force[:, 1] += 0.3 * flat[:, 0]
    return force.reshape(x.shape)


# the leapfrog


@pytest.mark.parametrize("box", [None, (-0.8, 0.5)])
def test_leapfrog_runs_backwards(box):
    x, p = (normals(20, 3) * 0.4).clamp(-0.7, 0.4), normals(20, 3, seed=1)
    place = {"step_size": 0.2, "steps": 9, "box": box}
    there, momentum, force = leapfrog(x, p, quartic_force(x), quartic_force, **place)
    assert (there - x).abs().max() > 0.3
    back, end, _ = leapfrog(there, -momentum, force, quartic_force, **place)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(end, -p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("box", [None, (-0.8, 0.5)])
def test_leapfrog_keeps_volume(box):
    def flow(z):
        x, p = z[None, :3], z[None, 3:]
        x, p, _ = leapfrog(x, p, quartic_force(x), quartic_force, step_size=0.3, steps=4, box=box)
        return torch.cat([x, p], 1)[0]

    for seed in range(5):
        z = torch.cat([normals(3, seed=seed).mul(0.3).clamp(-0.7, 0.4), normals(3, seed=seed + 50)])
        determinant = torch.linalg.det(torch.autograd.functional.jacobian(flow, z))
        assert abs(float(determinant)) == pytest.approx(1.0, abs=1e-10)


def test_energy_error_falls_as_the_square_of_the_step():
    x, p = normals(50, 3) * 0.7, normals(50, 3, seed=1)

    def error(step_size, steps):
        end, momentum, _ = leapfrog(x, p, quartic_force(x), quartic_force, step_size=step_size, steps=steps)
        change = quartic(end) - quartic(x) + (momentum.square() - p.square()).sum(1) / 2
        return float(change.square().mean().sqrt())

    errors = [error(0.08 / 2**k, 10 * 2**k) for k in range(4)]
    ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert ratios == pytest.approx([4.0] * 3, rel=0.05)


def test_walls_are_mirrors():
    x, p = torch.tensor([[0.9], [0.2], [0.5]]).double(), torch.tensor([[0.4], [-3.5], [0.1]]).double()
    there, momentum, _ = leapfrog(x, p, torch.zeros_like(x), torch.zeros_like, step_size=1.0, steps=1, box=(0.0, 1.0))
    # 1.3 → 0.7 turned; −3.3 → 3.3 → −1.3 → 1.3 → 0.7, four turns; 0.6 stays
    torch.testing.assert_close(there, torch.tensor([[0.7], [0.7], [0.6]]).double())
    torch.testing.assert_close(momentum, torch.tensor([[-0.4], [-3.5], [0.1]]).double())


# one step


def test_mala_accepts_by_the_ratio_of_densities():
    """log π(x′)q(x|x′) − log π(x)q(x′|x) in float64, from the noise that the step is defined to have."""
    delta, temperature, std, mean = 0.6, 1.7, 0.8, 0.2
    chain = mg.MALA(steps=1, step_size=delta, reference_std=std, reference_mean=mean, temperature=temperature)
    x = normals(64, 5).float()
    place = {"seed": 5, "first_sample": 11, "step": 7}
    result = chain(quartic, x, seed=5, first_sample=11, first_step=7, grid=2)

    def potential(x):
        return (quartic(x) + (x - mean).square().sum(1) / (2 * std**2)) / temperature

    def force(x):
        return (quartic_force(x) + (x - mean) / std**2) / temperature

    def log_q(end, begin):
        return -(end - begin + delta**2 / 2 * force(begin)).square().sum(1) / (2 * delta**2)

    begin = x.double()
    draw = ops.noise((64, 5), stream=noise.stream(noise.Purpose.MOMENTUM, 2), **place).double()
    end = begin - delta**2 / 2 * force(begin) + delta * draw
    ratio = potential(begin) - potential(end) + log_q(begin, end) - log_q(end, begin)
    assert ratio.min() < -0.3
    torch.testing.assert_close(result.log_ratio[0], ratio.clamp(max=0.0), rtol=0, atol=2e-5)

    uniform = ops.noise((64, 2), stream=noise.stream(noise.Purpose.ACCEPTANCE, 2), distribution="uniform", **place)
    accepted = uniform[:, 0].double().log() <= ratio
    assert 0 < accepted.sum() < 64
    assert torch.equal(result.accepted[0], accepted)
    torch.testing.assert_close(result.x.double(), torch.where(accepted[:, None], end, begin), rtol=0, atol=1e-6)
    torch.testing.assert_close(result.potential, temperature * potential(result.x.double()), rtol=1e-5, atol=1e-5)


def test_hmc_accepts_by_the_hamiltonian():
    epsilon, steps, temperature = 0.3, 6, 0.6
    chain = mg.HMC(steps=1, leapfrog_steps=steps, step_size=epsilon, temperature=temperature)
    x = normals(40, 4).float()
    result = chain(quartic, x, seed=3)
    y = x.double()
    p = start = ops.noise((40, 4), seed=3, step=0, stream=noise.stream(noise.Purpose.MOMENTUM)).double()
    for _ in range(steps):
        p = p - epsilon / 2 * quartic_force(y) / temperature
        y = y + epsilon * p
        p = p - epsilon / 2 * quartic_force(y) / temperature
    ratio = (quartic(x.double()) - quartic(y)) / temperature + (start.square() - p.square()).sum(1) / 2
    assert ratio.min() < -0.3
    torch.testing.assert_close(result.log_ratio[0], ratio.clamp(max=0.0), rtol=1e-5, atol=5e-5)


def test_jitter_moves_each_step_within_its_bounds():
    wide = mg.HMC(steps=1, leapfrog_steps=1, step_size=0.5, jitter=0.4)
    x = torch.zeros(300, 1)
    result = wide(lambda x: 0.0 * x.sum(1), x, seed=1)
    uniform = ops.noise((300, 2), seed=1, step=0, stream=noise.stream(noise.Purpose.ACCEPTANCE), distribution="uniform")
    p = ops.noise((300, 1), seed=1, step=0, stream=noise.stream(noise.Purpose.MOMENTUM))
    steps = 0.5 * (1 + 0.4 * (2 * uniform[:, 1:] - 1))
    assert steps.min() < 0.31 and steps.max() > 0.69
    torch.testing.assert_close(result.x, steps * p)


def test_detailed_balance():
    """π(x)·α(x→x′) = π(x′)·α(x′→x) along a path and the same path backwards, in every mode of the target."""
    x = normals(30, 3).mul(0.3).float()
    for options in ({}, {"box": (-1.5, 1.2)}, {"grad_clamp": 0.4, "reference_std": 0.7}):
        chain = mg.HMC(steps=1, leapfrog_steps=4, step_size=0.35, temperature=0.9, **options)
        target = chain.target(quartic, x)
        state, p = target.state(x), normals(30, 3, seed=4).float()
        there = metropolis.propose(target, state, p, 0.35, 4)
        back = metropolis.propose(target, there.state, -there.momentum, 0.35, 4)
        torch.testing.assert_close(back.state.x, x, rtol=0, atol=1e-5)

        def log_joint(state, p, target=target):
            return -target.potential(state.x) / 0.9 - p.double().square().sum(1) / 2

        assert there.log_ratio.min() < -0.05
        forward = log_joint(state, p) + there.log_ratio
        backward = log_joint(there.state, there.momentum) + back.log_ratio
        torch.testing.assert_close(forward, backward, rtol=0, atol=1e-4)


# what a chain is a function of


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_depends_on_neither_its_batch_nor_its_beginning(name):
    x = normals(8, 3).float()
    chain = CHAINS[name]
    whole = chain(quartic, x, seed=2, first_sample=5)
    parts = [chain(quartic, x[i : i + 4], seed=2, first_sample=5 + i) for i in (0, 4)]
    ids = chain(quartic, x.flip(0), seed=2, first_sample=torch.arange(12, 4, -1))
    assert torch.equal(whole.x, torch.cat([part.x for part in parts]))
    assert torch.equal(whole.accepted, torch.cat([part.accepted for part in parts], 1))
    assert torch.equal(whole.x, ids.x.flip(0))
    half = dataclasses.replace(chain, steps=5)
    rest = dataclasses.replace(chain, steps=chain.steps - 5)
    middle = half(quartic, x, seed=2, first_sample=5)
    assert torch.equal(whole.x, rest(quartic, middle.x, seed=2, first_sample=5, first_step=5).x)
    for other in ({"seed": 3}, {"first_step": 1}, {"grid": 1}):
        assert not torch.equal(whole.x, chain(quartic, x, **{"seed": 2, "first_sample": 5, **other}).x)


def test_trajectories_and_callbacks_are_the_chain():
    x, chain = normals(6, 3).float(), mg.MALA(7, 0.5)
    seen = []
    result = chain(quartic, x, seed=1, first_step=3, callback=lambda step, state: seen.append((step, state.clone())))
    assert [step for step, _ in seen] == list(range(3, 10))
    assert torch.equal(seen[-1][1], result.x)
    some = list(chain.trajectory(quartic, x, seed=1, first_step=3, every=3))
    assert [step for step, _ in some] == [5, 8, 9]
    for step, state in some:
        assert torch.equal(state, seen[step - 3][1])
    moved = torch.stack([a != b for (_, a), (_, b) in zip(seen, [(0, x), *seen], strict=False)]).flatten(2).any(2)
    assert torch.equal(moved, result.accepted)
    assert torch.equal(result.acceptance, result.accepted.double().mean(0))


def test_a_path_that_leaves_the_numbers_is_rejected():
    def cliff(x):
        flat = x.flatten(1).sum(1)
        return torch.where(flat > 1.0, math.nan, 0.5 * flat.square())

    result = mg.MALA(40, 1.0)(cliff, torch.zeros(200, 1), seed=1)
    assert torch.isinf(result.log_ratio).any() and torch.isfinite(result.x).all() and result.x.max() <= 1.0
    # rejected at the cliff, the law is the Gaussian cut off there
    assert agrees(result.x, lambda v: stats.norm.cdf(v) / stats.norm.cdf(1.0)) > P_VALUE


def test_the_energy_is_left_as_it_was():
    net = EnergyNet(4, 1, [ConvSpec(4, 3)], norm="none", seed=0)
    x = normals(3, 1, 4, 4).float()
    before = x.clone()
    mg.HMC(3, 2, 0.1)(net, x)
    assert torch.equal(x, before) and all(p.requires_grad and p.grad is None for p in net.parameters())


def test_batch_statistics_are_refused_and_frozen_ones_are_not():
    net = EnergyNet(4, 1, [ConvSpec(4, 3)], norm="batch", seed=0)
    x = normals(6, 1, 4, 4).float()
    with pytest.raises(ValueError, match="energy must treat samples apart.*statistics of the batch"):
        mg.MALA(2, 0.1)(net, x)
    with net.observing():
        net(x)
    assert mg.MALA(2, 0.1)(net.freeze_norm(), x).accepted.shape == (2, 6)
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Flatten(),
                                 torch.nn.Linear(8, 1), torch.nn.Flatten(0))  # fmt: skip
    with pytest.raises(ValueError, match="a BatchNorm2d normalises by the statistics of the batch"):
        mg.MALA(2, 0.1)(layers, x)
    assert mg.MALA(2, 0.1)(layers.eval(), x).accepted.shape == (2, 6)


def test_correcting_proposes_the_steps_of_the_chain():
    langevin = mg.Langevin(steps=1, drift=0.3, noise_std=0.2, reference_std=2.0, grad_clamp=0.5)
    mala = mg.MALA.correcting(langevin)
    assert mala.temperature == pytest.approx(0.2**2 / 0.6)
    x = normals(10, 4).float()
    here = noise.stream(noise.Purpose.MOMENTUM)
    step = langevin(quartic, x, seed=1, stream=here)
    target = mala.target(quartic, x)
    momentum = target.momentum(x, seed=1, step=0, stream=here)
    proposal = metropolis.propose(target, target.state(x), momentum, mala.step_size, 1)
    torch.testing.assert_close(proposal.state.x, step, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="noise_std > 0"):
        mg.MALA.correcting(mg.Langevin(steps=1, step_size=0.1, noise_scale=0.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "MALA: steps must be a positive int, got 0"),
        ({"step_size": -1.0}, "MALA: step_size must be finite and > 0, got -1.0"),
        ({"reference_std": 0.0}, "reference_std must be finite and > 0"),
        ({"temperature": 0.0}, "temperature must be a number finite and > 0, got 0.0"),
        ({"jitter": 1.0}, r"jitter must be a number in \[0, 1\), got 1.0"),
        ({"box": (1.0, 0.0)}, "MALA: box must be"),
        ({"box": (0.0, math.inf)}, "MALA: box must be finite"),
        ({"grad_clamp": 0.0}, "MALA: grad_clamp must be"),
    ],
)
def test_wrong_descriptions_are_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        mg.MALA(**{"steps": 2, "step_size": 0.1, **arguments})


@pytest.mark.parametrize("shape", [(0, 3), (1,), (5, 0), (2, 1, 3, 1, 2)])
def test_any_shape_is_a_batch(shape):
    x = torch.zeros(shape)
    result = mg.HMC(2, 2, 0.1, reference_std=1.0)(lambda x: x.reshape(len(x), x.shape[1:].numel()).sum(1), x)
    assert result.x.shape == x.shape and result.accepted.shape == (2, len(x))


def test_a_view_is_its_values():
    x = normals(6, 4, 5).float().transpose(1, 2)[::2]
    for chain in CHAINS.values():
        assert torch.equal(chain(quartic, x, seed=1).x, chain(quartic, x.contiguous(), seed=1).x)


def test_wrong_starts_are_told():
    chain = mg.HMC(2, 2, 0.1, box=(0.0, 1.0))
    with pytest.raises(TypeError, match="x must be a float32 tensor"):
        chain(quartic, normals(2, 3))
    with pytest.raises(ValueError, match=r"x must lie in the box \[0, 1\].*got 2"):
        chain(quartic, torch.full((2, 3), 2.0))
    with pytest.raises(ValueError, match="finite energy and gradient, got U = nan at sample 1"):
        chain(quartic, torch.tensor([[0.1, 0.1], [math.nan, 0.1]]))
    with pytest.raises(ValueError, match="of finite energy and gradient.*gradient at sample 0"):
        chain(lambda x: torch.sqrt(x).sum(1), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="one energy a sample"):
        chain(lambda x: x.sum(), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="first_step"):
        chain(quartic, torch.zeros(2, 3), first_step=2**32 - 1)
    with pytest.raises(ValueError, match="leapfrog_steps must be a positive int, got 0"):
        mg.HMC(2, 0, 0.1)
