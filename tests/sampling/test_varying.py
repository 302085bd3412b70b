"""Chains whose numbers vary: a schedule is K single steps, a value a sample is N chains, and the closed laws hold."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import mgebm_fast as mg
from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import memory
from mgebm_fast.sampling.cascade import cascade

STEPS = 18  # more than one call of the graph engine needs


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.SiLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0)
    )


class Attention(nn.Module):
    """Softmax over the first of two dimensions: its chains run by autograd."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x):
        rows = x.flatten(2)
        return (torch.softmax(self.mix(rows), 1) * rows).sum((1, 2))


ENERGIES = {
    "native": lambda: multigrid_net(4, variant="compact", norm="none"),
    "graph": mlp,
    "autograd": Attention,
}


@pytest.fixture(params=ENERGIES)
def energy(request):
    torch.manual_seed(0)
    net = ENERGIES[request.param]()
    explained = mg.Langevin(STEPS, step_size=0.1).explain(net, torch.rand(5, 3, 4, 4))
    assert explained.gradient.plan == request.param
    return net


def images(n=5, seed=0):
    return torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def close(got, want, net):
    """Bit for bit where the batch does not choose the arithmetic."""
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6 if isinstance(net, Attention) else 0)


def test_a_schedule_is_single_steps_with_its_values(energy):
    sizes, scales = torch.linspace(0.3, 0.05, STEPS), [1 - k / STEPS for k in range(STEPS)]
    sigma, mean = torch.linspace(0.5, 2, STEPS).double().numpy(), images(seed=1)
    common = dict(reference_mean=mean, grad_clamp=0.5, clamp=(-1.0, 2.0), mask=images(1, seed=2) > 0.2, seed=3)
    law = dict(steps=STEPS, step_size=sizes, noise_scale=scales, reference_std=sigma)
    whole = mg.langevin_sample(energy, images(), **law, **common)
    x = images()
    for k in range(STEPS):
        own = dict(step_size=float(sizes[k]), noise_scale=scales[k], reference_std=float(sigma[k]))
        x = mg.langevin_sample(energy, x, steps=1, first_step=k, **own, **common)
    # A single step of what is read as a graph runs by autograd, whose rounding is its own.
    torch.testing.assert_close(whole, x, rtol=0, atol=2e-6 if isinstance(energy, nn.Sequential) else 0)


def test_a_value_a_sample_is_that_chain_alone(energy):
    n = 5
    drift, noise = torch.linspace(0.01, 0.2, n), torch.linspace(0, 0.1, n)
    mean = images(seed=1)
    common = dict(steps=STEPS, reference_std=0.7, seed=3)
    got = mg.langevin_sample(energy, images(), drift=drift, noise_std=noise, reference_mean=mean, **common)
    for i in range(n):
        own = dict(drift=float(drift[i]), noise_std=float(noise[i]), reference_mean=mean[i], first_sample=i)
        close(got[i : i + 1], mg.langevin_sample(energy, images()[i : i + 1], **own, **common), energy)


def test_parts_of_a_chain_have_their_part_of_the_schedule(energy):
    """A trajectory, a callback, and a batch that is split where memory ends."""
    law = mg.Langevin(
        STEPS, drift=torch.linspace(0.1, 0.02, STEPS)[:, None] * torch.linspace(0.5, 1, 5), noise_std=0.05,
        reference_std=1.0, reference_mean=images(seed=1),
    )  # fmt: skip
    x = images()
    whole = law(energy, x, seed=3)
    *_, (step, last) = law.trajectory(energy, x, every=17, seed=3)
    assert step == STEPS - 1
    torch.testing.assert_close(last, whole, rtol=0, atol=2e-6)
    called = law(energy, x, seed=3, callback=lambda *_: None)
    torch.testing.assert_close(called, whole, rtol=0, atol=2e-6)
    from mgebm_fast.sampling.running import prepare

    chain = prepare(energy, x, STEPS, law, seed=3).chain
    halves = []
    for rows in (slice(0, 2), slice(2, 5)):
        state = x[rows].clone()
        memory.of_part(chain, x, rows).advance_(state, 0, STEPS)
        halves.append(state)
    close(torch.cat(halves), whole, energy)


def test_a_cascade_anneals_each_grid():
    torch.manual_seed(0)
    nets = [multigrid_net(size, variant="compact", norm="none") for size in (2, 4)]
    laws = [
        mg.Langevin(3, drift=[0.3, 0.2, 0.1], noise_std=0.1),
        mg.Langevin(2, drift=0.1, noise_std=torch.linspace(0, 1, 5)),
    ]
    got = cascade(nets, (1, 2, 4), laws, torch.rand(5, 3, 1, 1), seed=1)
    x = mg.ops.upsample(got[1], 2)
    from mgebm_fast import noise

    stream = noise.stream(noise.Purpose.SAMPLING, 2)
    assert torch.equal(got[2], laws[1](nets[1], x, seed=1, stream=stream))


class Quadratic(nn.Module):
    """E = a ‖x‖² / 2."""

    def forward(self, x):
        return 0.5 * 2.0 * x.square().flatten(1).sum(1)


def test_the_closed_law_of_an_annealed_chain():
    """x_K of a Gaussian energy is Gaussian: its mean and variance follow from the schedule alone."""
    deltas = torch.linspace(0.5, 0.1, 30).double()
    got = mg.langevin_sample(Quadratic(), torch.full((4000, 4), 3.0), steps=30, step_size=deltas, seed=0)
    mean, variance = 3.0, 0.0
    for delta in deltas.tolist():
        keep = 1 - delta**2 / 2 * 2.0
        mean, variance = keep * mean, keep**2 * variance + delta**2
    error = 4 / math.sqrt(got.numel())
    assert abs(float(got.mean()) - mean) < error * math.sqrt(variance)
    assert abs(float(got.var()) / variance - 1) < error * math.sqrt(2)


def test_the_closed_law_of_tethered_chains():
    """exp(−a‖x‖²/2 − ‖x − m‖²/2σ²) with a mean an image and a width a sample: N(m/(1 + aσ²), σ²/(1 + aσ²))."""
    n, copies = 3, 3000
    mean, sigma = torch.tensor([-2.0, 0.5, 4.0]), torch.tensor([0.2, 0.5, 1.0])
    where = mean.repeat_interleave(copies)[:, None].expand(-1, 4)
    got = mg.langevin_sample(
        Quadratic(), where, steps=400, step_size=0.1, reference_std=sigma.repeat_interleave(copies),
        reference_mean=where, seed=0,
    )  # fmt: skip
    got = got.reshape(n, -1).double()
    shrink = 1 + 2.0 * sigma.double() ** 2
    # A step of δ widens the law of precision p = 2 + 1/σ² to 1/(p (1 − δ² p / 4)).
    precision = 2.0 + sigma.double() ** -2
    variance = 1 / (precision * (1 - 0.1**2 * precision / 4))
    error = 4 / math.sqrt(copies * 4)
    assert ((got.mean(1) - mean.double() / shrink).abs() < error * variance.sqrt()).all()
    assert ((got.var(1) / variance - 1).abs() < error * math.sqrt(2)).all()


def test_explain_says_what_varies():
    law = mg.Langevin(
        4, step_size=[0.4, 0.3, 0.2, 0.1], noise_scale=torch.rand(5) + 1, reference_std=[1.0, 1.0, 1.0, 2.0],
        reference_mean=torch.zeros(5, 3, 4, 4),
    )  # fmt: skip
    said = str(law.explain(mlp(), images()))
    assert "drift 0.005 to 0.08 by step" in said and "reference N(tensor (5, 3, 4, 4), of varying std)" in said
    assert "by step and sample" in said
    assert law.varying == ("step_size", "noise_scale", "reference_std", "reference_mean")


def test_bad_numbers_are_refused_when_they_are_described():
    with pytest.raises(ValueError, match="Langevin: step_size must be finite and at least 1e-18 in every entry"):
        mg.Langevin(2, step_size=[0.1, 0.0])
    with pytest.raises(ValueError, match="Langevin: reference_mean must be given with reference_std"):
        mg.Langevin(2, step_size=0.1, reference_mean=torch.zeros(3))
    with pytest.raises(ValueError, match="step_size must hold one value a step, 3, or .*, got 2"):
        mg.langevin_sample(mlp(), images(), steps=3, step_size=[0.1, 0.2])


@pytest.mark.parametrize(
    ("shape", "quarter"), [("linear", 0.7525), ("geometric", 0.1**0.5), ("cosine", 0.855018), ("first", 0.01)]
)
def test_a_schedule_fits_chains_of_any_length(energy, shape, quarter):
    """The list of its values, bit for bit, and what its formula says at a quarter of the way from 1 to 0.01."""
    schedule = mg.Schedule(1.0, 0.01, shape)
    values = schedule.values(5)
    assert values[0] == 1.0 and values[1] == pytest.approx(quarter) and values[-1] == 0.01
    assert schedule.values(1) == [1.0]
    law = mg.Langevin(STEPS, step_size=0.1, noise_scale=schedule, reference_std=mg.Schedule(2, 1))
    for chain in (law, law.of_length(3), dataclasses.replace(law, steps=1)):
        listed = {name: getattr(chain, name).values(chain.steps) for name in chain.varying}
        want = dataclasses.replace(chain, **listed)(energy, images(), seed=3)
        assert torch.equal(chain(energy, images(), seed=3), want)


def test_a_list_is_stretched_to_another_length():
    law = mg.Langevin(3, drift=[0.4, 0.2, 0.1], noise_std=0.3)
    assert law.of_length(3) == law
    assert law.of_length(5).drift == pytest.approx((0.4, 0.3, 0.2, 0.15, 0.1))
    assert law.of_length(1).drift == (0.4,)
    with pytest.raises(ValueError, match="drift must hold one value a step, 5, or be a Schedule, got 3"):
        dataclasses.replace(law, steps=5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mg.Schedule(-1, 1), "Schedule: start must be a finite number >= 0, got -1"),
        (lambda: mg.Schedule(1, math.inf), "Schedule: end must be a finite number >= 0, got inf"),
        (lambda: mg.Schedule(1, "2"), "Schedule: end must be a finite number >= 0, got '2'"),
        (lambda: mg.Schedule(1, 0, "geometric"), "start and end must be > 0 in a geometric one, got 1 and 0"),
        (lambda: mg.Schedule(1, 0, "cosin"), "shape must be one of .*'cosin' .did you mean 'cosine'"),
        (lambda: mg.Langevin(2, step_size=mg.Schedule(1, 0)), "step_size must be finite and at least 1e-18"),
        (
            lambda: mg.ops.langevin_step_(images(), images(), step_size=mg.Schedule(1, 0.1), seed=0),
            "langevin_step_: step_size must be a number in a single step",
        ),
        (
            lambda: mg.MALA.correcting(mg.Langevin(2, drift=0.1, noise_std=mg.Schedule(1, 0))),
            "MALA: noise_std must be a number here",
        ),
    ],
)
def test_schedules_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_corrected_samplers_say_that_their_numbers_do_not_vary():
    with pytest.raises((TypeError, ValueError), match="step_size must be a number"):
        mg.MALA(3, step_size=[0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="step_size must be a number here, the same for all"):
        mg.Langevin(2, step_size=[0.1, 0.2]).update()


@pytest.mark.parametrize(
    "numbers",
    [
        {"drift": 1.0, "noise_std": mg.Schedule(0.16, 0.0)},
        {"step_size": mg.Schedule(0.3, 0.1, "cosine"), "reference_std": 1.7},
        {"step_size": 0.3, "noise_scale": [1.0, 0.7, 0.1], "reference_std": mg.Schedule(3.0, 1.0, "geometric")},
        {"step_size": 0.3, "reference_std": 50.0},
    ],
)
def test_the_table_of_a_chain_is_that_of_its_checked_numbers(numbers):
    """What captured training reads in place of what an eager update makes of annealed dynamics."""
    factor = 0.83
    name = "noise_std" if "drift" in numbers else "noise_scale"
    noise = numbers.get(name, 1.0)
    annealed = {**numbers, name: [n * factor for n in noise] if isinstance(noise, list) else noise * factor}
    law = mg.Langevin(3, **annealed).update(torch.empty(1, 1))
    expected = torch.tensor([law.arguments[:3]]) if law.table is None else law.table[:, 0]
    assert torch.equal(torch.tensor(mg.Langevin(3, **numbers).table(factor), dtype=torch.float64).float(), expected)
