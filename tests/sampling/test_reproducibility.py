"""One seed, one chain: what is equal bit for bit, and what is equal to the convolution library's rounding."""

import pytest
import torch

from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import Langevin

# On the 0–255 scale, after 12 steps: DESIGN §2. Measured figures are in docs/reproducibility.md.
TOLERANCE = 1e-3
STEPS = 12
DYNAMICS = Langevin(STEPS, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))


def quadratic(x):
    return ((x - 100.0) / 3.0).square().flatten(1).sum(1) / 2.0


NETS = {
    "quadratic": (lambda: quadratic, 16),
    "4": (lambda: multigrid_net(4, norm="none"), 4),
    "16": (lambda: multigrid_net(16, norm="none", width=0.25), 16),
    "64": (lambda: multigrid_net(64, norm="none", width=0.125), 64),
    "compact-8": (lambda: multigrid_net(8, norm="none", variant="compact"), 8),
    # A bound method is a callable like any other: the autograd plan.
    "compact-8-autograd": (lambda: multigrid_net(8, norm="none", variant="compact").forward, 8),
}


@pytest.fixture(params=NETS)
def case(request):
    """(energy, four images, tolerance): none for the quadratic, which has to be equal."""
    build, size = NETS[request.param]
    x = 255 * torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    return build(), x, 0.0 if request.param == "quadratic" else TOLERANCE


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check(got, expected, tolerance):
    moved = (got - expected).abs().max()
    assert moved <= tolerance, float(moved)


def test_the_same_call_is_equal(case):
    energy, x, _ = case
    assert torch.equal(DYNAMICS(energy, x, seed=1), DYNAMICS(energy, x, seed=1))
    assert not torch.equal(DYNAMICS(energy, x, seed=1), DYNAMICS(energy, x, seed=2))


@pytest.mark.parametrize("split", [2, 1])
def test_a_split_batch_is_the_same_chain(case, split):
    energy, x, tolerance = case
    whole = DYNAMICS(energy, x, seed=1, first_sample=10)
    parts = [DYNAMICS(energy, x[i : i + split], seed=1, first_sample=10 + i) for i in range(0, 4, split)]
    check(torch.cat(parts), whole, tolerance)


def test_sample_ids_place_a_sample_anywhere(case):
    energy, x, tolerance = case
    order = torch.tensor([1, 3, 0, 2])
    check(DYNAMICS(energy, x[order], seed=1, first_sample=order), DYNAMICS(energy, x, seed=1)[order], tolerance)


@pytest.mark.parametrize("cut", [1, 11])
def test_a_cut_chain_is_equal(case, cut):
    energy, x, _ = case
    first = Langevin(cut, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))(energy, x, seed=1, first_step=100)
    rest = Langevin(STEPS - cut, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))
    assert torch.equal(rest(energy, first, seed=1, first_step=100 + cut), DYNAMICS(energy, x, seed=1, first_step=100))


def test_forty_steps_are_sixteen_and_twenty_four(case):
    """An energy that is read as a graph is so from 16 steps on: shorter parts, by autograd, are equal to rounding."""
    energy, x, tolerance = case
    make = dict(drift=0.5, noise_std=0.4, grad_clamp=1.0, clamp=(0.0, 255.0))
    exact = {"seed": 3, "precision": "fp32"}  # auto may be bf16 as a graph, and is fp32 by autograd
    whole = Langevin(40, **make)(energy, x, **exact)

    def cut_at(cut):
        halfway = Langevin(cut, **make)(energy, x, **exact)
        return Langevin(40 - cut, **make)(energy, halfway, first_step=cut, **exact)

    assert torch.equal(cut_at(16), whole)
    check(cut_at(10), whole, tolerance)


def test_one_thread_and_two_are_the_same_chain(case, threads):
    energy, x, tolerance = case
    threads(1)
    one = DYNAMICS(energy, x, seed=1)
    threads(2)
    check(DYNAMICS(energy, x, seed=1), one, tolerance)


def test_channels_last_is_the_same_chain(case):
    energy, x, tolerance = case
    check(DYNAMICS(energy, x.to(memory_format=torch.channels_last), seed=1), DYNAMICS(energy, x, seed=1), tolerance)
