"""Batches that do not fit in memory, played by energies that refuse more than so many samples."""

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from mgebm_fast import ops
from mgebm_fast.errors import BatchTooLargeError
from mgebm_fast.models import MultiGrid
from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import Langevin, langevin_sample
from mgebm_fast.sampling.coupling import coupling
from mgebm_fast.sampling.memory import is_out_of_memory

CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
DYNAMICS = Langevin(5, drift=0.2, noise_std=0.3, clamp=(-3.0, 3.0))


def images(n=10, channels=2, size=4, seed=0):
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


class Bounded(nn.Module):
    """|x − a|⁴ of each sample; more than `room` samples are too many."""

    def __init__(self, room, error=None):
        super().__init__()
        self.room, self.error = room, error or RuntimeError(CPU)
        self.a = nn.Parameter(torch.tensor(0.5))
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        if len(x) > self.room:
            raise self.error
        return (x - self.a).pow(4).flatten(1).sum(1) / 8


class Coupled(Bounded):
    def __init__(self, room):
        super().__init__(room)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return super().forward(self.norm(x))


def run(energy, x, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DYNAMICS(energy, x, seed=3, **arguments)


@pytest.mark.filterwarnings("ignore:.*[0-9] samples do not fit")
@pytest.mark.parametrize("error", [RuntimeError(CPU), torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
@pytest.mark.parametrize("room", [9, 5, 3, 1])
def test_a_split_batch_is_the_same_chain(room, error):
    x = images()
    expected = DYNAMICS(Bounded(100), x, seed=3)
    with pytest.warns(UserWarning, match="10 samples do not fit in memory; they run 5 at a time"):
        got = DYNAMICS(Bounded(room, error), x, seed=3)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("masked", ["none", "shared", "each"])
@pytest.mark.parametrize("ids", ["base", "base tensor", "each"])
def test_ids_masks_and_layouts_are_split_with_their_samples(ids, masked, layout):
    x = images().contiguous(memory_format=layout)
    first = {
        "base": 40,
        "base tensor": torch.tensor(40),
        "each": torch.tensor([9, 4, 77, 2**32 - 1, 0, 5, 3, 2, 11, 6]),
    }[ids]
    keep = torch.rand(10, 1, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    mask = {"none": None, "shared": keep[:1], "each": keep}[masked]
    expected = run(Bounded(100), x, first_sample=first, mask=mask)
    got = run(Bounded(3), x, first_sample=first, mask=mask)
    assert torch.equal(got, expected) and got.stride() == expected.stride()


def test_a_callback_sees_whole_batches_and_each_step_once():
    x, seen = images(), []
    run(Bounded(3), x, first_step=7, callback=lambda step, state: seen.append((step, state.clone())))
    expected = []
    run(Bounded(100), x, first_step=7, callback=lambda step, state: expected.append((step, state.clone())))
    assert [step for step, _ in seen] == [7, 8, 9, 10, 11]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, expected, strict=True))


def test_memory_that_ends_in_the_middle_of_a_chain():
    class Leaking(Bounded):
        """From the fourth call on only five samples fit."""

        def forward(self, x):
            self.room = 100 if len(self.batches) < 3 else 5
            return super().forward(x)

    x = images()
    assert torch.equal(run(Leaking(0), x), run(Bounded(100), x))
    states = []
    run(Leaking(0), x, callback=lambda step, state: states.append(step))
    assert states == [0, 1, 2, 3, 4]


def test_what_fitted_is_remembered_for_the_energy_and_for_no_longer():
    energy, x = Bounded(5), images()
    run(energy, x)
    energy.batches.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(energy, x)
    assert set(energy.batches) == {5}
    energy.batches.clear()
    run(energy, images(n=4))
    assert set(energy.batches) == {4}
    gone = weakref.ref(energy)
    del energy
    gc.collect()
    assert gone() is None


def test_trajectories_split_too():
    x = images()
    expected = [state for _, state in DYNAMICS.trajectory(Bounded(100), x, every=2, seed=0)]
    with pytest.warns(UserWarning, match="trajectory: 10 samples do not fit"):
        got = [state for _, state in DYNAMICS.trajectory(Bounded(5), x, every=2, seed=0)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("room", [1, 2, 7, 9])
def test_a_coupled_batch_is_refused_with_the_largest_that_fits(room):
    x = images()
    before = x.clone()
    with pytest.raises(BatchTooLargeError, match=f"a batch of 10 does not fit in memory, at most {room} fit.*split"):
        DYNAMICS(Coupled(room), x)
    assert torch.equal(x, before)
    assert len(DYNAMICS(Coupled(room), x[:room])) == room


def test_a_coupled_callable_is_found_out():
    net = Coupled(4)
    with pytest.raises(BatchTooLargeError, match="at most 4 fit; it cannot be split, since a BatchNorm2d normalises"):
        langevin_sample(lambda x: -net(x), images(), steps=2, step_size=0.1)

    def spread(x):  # no module says so
        if len(x) > 6:
            raise RuntimeError(CPU)
        return (x - x.mean(0)).square().flatten(1).sum(1)

    with pytest.raises(BatchTooLargeError, match="at most 6 fit.*changes with the samples beside it"):
        langevin_sample(spread, torch.zeros(10, 2, 4, 4), steps=2, step_size=0.1)


def test_one_sample_that_does_not_fit():
    with pytest.raises(BatchTooLargeError, match=r"one sample of shape \(2, 4, 4\) does not fit"):
        run(Bounded(0), images())
    with pytest.raises(BatchTooLargeError, match="not even one sample fits"):
        run(Coupled(0), images())


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("shape mismatch"), KeyError("x")):
        with pytest.raises(type(error), match="shape mismatch|x"):
            run(Bounded(3, error), images())
    assert not is_out_of_memory(ValueError("out of memory"))


def test_whether_samples_are_coupled():
    x = images(size=8, channels=3)
    assert coupling(multigrid_net(8, norm="none", variant="compact"), x) == ""
    assert "norm='batch'" in coupling(multigrid_net(8, norm="batch", variant="compact"), x)
    assert "BatchNorm2d" in coupling(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), x)
    assert coupling(lambda x: x.square().flatten(1).sum(1), x) == ""
    assert coupling(lambda x: (x - x.mean(0)).square().flatten(1).sum(1), x) != ""
    scales = torch.ones(2, 1, 1, 1)  # which one sample takes as two
    assert coupling(lambda x: (x * scales).square().flatten(1).sum(1), x[:2]) == ""


def test_a_model_says_which_grid_does_not_fit():
    nets = [Coupled(100), Coupled(3)]
    model = MultiGrid((1, 2, 4), channels=2, nets=nets, langevin=DYNAMICS, value_range=(-3.0, 3.0))
    with pytest.raises(BatchTooLargeError, match=r"grid 2 \(size 4\): a batch of 8 does not fit in memory, at most 3"):
        model.cascade(torch.zeros(8, 2, 1, 1), seed=0)


def test_the_reference_step_of_a_part():
    """The split against one step written out, so that both cannot be wrong together."""
    x, energy = images(), Bounded(4)
    with pytest.warns(UserWarning, match="do not fit"):
        got = Langevin(1, drift=0.2, noise_std=0.3)(Bounded(4), x, seed=3, first_sample=20)
    gradient = 0.5 * (x.double() - energy.a.double()).pow(3)
    noise = ops.noise(x.shape, seed=3, step=0, first_sample=20, backend="reference").double()
    expected = x.double() - 0.2 * gradient.detach() + 0.3 * noise
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
