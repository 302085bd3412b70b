import numpy as np
import pytest
import torch

from mgebm_fast import noise, ops
from mgebm_fast.errors import DivergenceError
from mgebm_fast.models import MultiGrid
from mgebm_fast.sampling import Langevin
from mgebm_fast.sampling.cascade import updated_cells

LADDERS = [((1, 2, 4, 8), 1), ((1, 4, 8, 32), 2), ((1, 3, 6, 12, 24), 3), ((1, 5), 4)]


def model(sizes=(1, 2, 4, 8), channels=1, norm="none", **more):
    dynamics = more.pop("langevin", Langevin(2, drift=0.5, noise_std=0.1, clamp=(-1.0, 1.0)))
    return MultiGrid(
        sizes, channels=channels, norm=norm, variant="compact", width=0.25, value_range=(-1.0, 1.0), langevin=dynamics,
        **more,
    )  # fmt: skip


def starts(n, channels=1, seed=0):
    return 2 * torch.rand(n, channels, 1, 1, generator=torch.Generator().manual_seed(seed)) - 1


@pytest.mark.parametrize("sizes, channels", LADDERS)
def test_any_ladder_and_any_channel_count(sizes, channels):
    grids = model(sizes, channels).cascade(starts(3, channels), seed=1)
    assert [tuple(x.shape) for x in grids] == [(3, channels, s, s) for s in sizes]
    assert all(float(x.abs().max()) <= 1.0 for x in grids)


@pytest.mark.parametrize("sizes, channels", LADDERS[:3])
def test_each_grid_is_a_chain_from_the_replicated_one_before(sizes, channels):
    m = model(sizes, channels)
    grids = m.cascade(starts(3, channels), seed=7, first_sample=5, first_step=11, purpose=noise.Purpose.TRAINING_CHAIN)
    assert torch.equal(grids[0], starts(3, channels))
    for i in range(1, len(sizes)):
        x = ops.upsample(grids[i - 1], sizes[i] // sizes[i - 1], backend="reference")
        where = noise.stream(noise.Purpose.TRAINING_CHAIN, i)
        expected = m.langevin[i - 1](m.nets[i - 1], x, seed=7, first_sample=5, first_step=11, stream=where)
        assert torch.equal(grids[i], expected)


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (1, 3, 6, 18)])
def test_a_linear_start_lies_between_the_centres_of_the_coarser_pixels_and_has_their_means(sizes):
    m = model(sizes, 2, upsampling="linear")
    grids = m.cascade(starts(3, 2), seed=7)
    for i in range(1, len(sizes)):
        coarse, side = grids[i - 1].double().numpy(), sizes[i] // sizes[i - 1]
        x = between_centres(coarse, sizes[i])
        means = x.reshape(*coarse.shape[:3], side, coarse.shape[3], side).mean((3, 5))
        x = torch.from_numpy(x + np.kron(coarse - means, np.ones((side, side)))).float()
        torch.testing.assert_close(ops.pyramid(x, [sizes[i - 1]])[0], grids[i - 1], rtol=1e-5, atol=1e-6)
        expected = m.langevin[i - 1](m.nets[i - 1], x, seed=7, stream=noise.stream(noise.Purpose.SAMPLING, i))
        torch.testing.assert_close(grids[i], expected, rtol=1e-5, atol=1e-6)
    nearest = model(sizes, 2).cascade(starts(3, 2), seed=7)
    assert torch.equal(grids[1], nearest[1]) and not torch.equal(grids[2], nearest[2])  # a 1×1 image has one value


def between_centres(x, size):
    """Linear interpolation along rows, then columns; outside the outermost centres it is constant."""
    centres, places = (np.arange(x.shape[-1]) + 0.5) / x.shape[-1], (np.arange(size) + 0.5) / size
    for axis in (-1, -2):
        x = np.apply_along_axis(lambda row: np.interp(places, centres, row), axis, x)
    return x


def test_how_a_start_is_made_is_checked_and_stored(tmp_path):
    with pytest.raises(ValueError, match="upsampling must be 'nearest' or 'linear', got 'cubic'"):
        model(upsampling="cubic")
    m = model(upsampling="linear")
    m.set_colours(starts(5))
    m.save(tmp_path / "m.safetensors")
    again = MultiGrid.load(tmp_path / "m.safetensors")
    assert again.upsampling == "linear" and torch.equal(again.sample(4, seed=1), m.sample(4, seed=1))
    assert "upsampling" not in model().config()  # files of models before it are as they were


def test_no_counter_is_used_twice_between_grids_steps_and_purposes(monkeypatch):
    """Energies of zero and no clamp: what a grid adds is the sum of its steps' noise, as the noise op gives it."""
    m = model((1, 2, 4), langevin=[Langevin(2, drift=1.0, noise_std=1.0), Langevin(3, drift=1.0, noise_std=1.0)])
    with torch.no_grad():
        for net in m.nets:
            net.head.weight.zero_()
    used = set()
    for purpose, first in ((noise.Purpose.SAMPLING, (0, 0)), (noise.Purpose.TRAINING_CHAIN, (20, 30))):
        grids = m.cascade(starts(4), seed=3, purpose=purpose, first_step=first)
        for i, steps in ((1, 2), (2, 3)):
            added = grids[i] - ops.upsample(grids[i - 1], 2)
            total = torch.zeros_like(added)
            for step in range(first[i - 1], first[i - 1] + steps):
                where = noise.stream(purpose, i)
                assert (where, step) not in used
                used.add((where, step))
                total += ops.noise(added.shape, seed=3, step=step, stream=where)
            torch.testing.assert_close(added, total, rtol=0, atol=1e-5)
    assert len(used) == 10


def test_callback_sees_grid_and_step():
    seen = []
    m = model((1, 2, 4), langevin=[Langevin(2, step_size=0.1), Langevin(3, step_size=0.1)])
    m.cascade(
        starts(2), seed=0, first_step=(4, 9), callback=lambda grid, step, x: seen.append((grid, step, x.shape[-1]))
    )
    assert seen == [(1, 4, 2), (1, 5, 2), (2, 9, 4), (2, 10, 4), (2, 11, 4)]


def test_dynamics_given_to_the_cascade_stand_in_for_the_model_s():
    other = Langevin(5, drift=0.1, noise_std=0.02)
    got = model().cascade(starts(2), seed=1, langevin=other)
    expected = model(langevin=other).cascade(starts(2), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_known_pixels_are_held_and_imposed_at_every_size(norm):
    m = model((1, 2, 4, 8), channels=2, norm=norm)
    known = 2 * torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(4)) - 1
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[4:, 5:] = True  # unknown: at size 4 two whole blocks and half of the two beside them
    held = {1: torch.ones(1, 1, dtype=torch.bool), 2: torch.ones(2, 2, dtype=torch.bool), 8: ~mask}
    held[4] = torch.ones(4, 4, dtype=torch.bool)
    held[4][2:, 3] = False
    known_with_rubbish = torch.where(mask, torch.nan, known)  # what is unknown may hold anything
    grids = m.cascade(starts(3, 2), seed=1, known=known_with_rubbish, mask=mask)
    means = []
    for size in m.sizes:
        blocks = known_with_rubbish.numpy().reshape(3, 2, size, 8 // size, size, 8 // size).swapaxes(3, 4)
        blocks = blocks.reshape(3, 2, size, size, -1)
        count = np.isfinite(blocks).sum(-1)
        means.append(torch.from_numpy((np.nansum(blocks, -1) / np.maximum(count, 1)).astype(np.float32)))
    for size, x, mean in zip(m.sizes, grids, means, strict=True):
        keep = held[size].expand(x.shape)
        torch.testing.assert_close(x[keep], mean[keep], rtol=0, atol=2e-7)
        assert not torch.isclose(x[~keep], mean[~keep]).any()
        assert bool(torch.isfinite(x).all())
    assert torch.equal(grids[-1][(~mask).expand(3, 2, 8, 8)], known[(~mask).expand(3, 2, 8, 8)])


def test_a_wholly_known_picture_comes_back():
    known = 2 * torch.rand(1, 1, 8, 8) - 1
    grids = model().cascade(starts(3), seed=1, known=known, mask=torch.zeros(1, dtype=torch.bool))
    assert torch.equal(grids[-1], known.expand(3, 1, 8, 8))
    torch.testing.assert_close(grids[0], known.mean((2, 3), keepdim=True).expand(3, 1, 1, 1))


def test_a_wholly_unknown_picture_changes_nothing():
    got = model().cascade(starts(3), seed=1, known=torch.zeros(1, 1, 8, 8), mask=torch.ones(8, 8, dtype=torch.bool))
    assert torch.equal(got[-1], model().cascade(starts(3), seed=1)[-1])


def test_masks_may_differ_by_sample_and_channel():
    mask = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.7
    for size in (1, 2, 3, 4, 6, 12):
        factor = 12 // size
        got = updated_cells(mask, size)
        assert got.shape == (2, 3, size, size)
        for i in range(size):
            for j in range(size):
                block = mask[:, :, i * factor : (i + 1) * factor, j * factor : (j + 1) * factor]
                assert torch.equal(got[:, :, i, j], block.flatten(2).all(2))


def test_divergence_names_grid_and_step():
    class Explosive(torch.nn.Module):
        def forward(self, x):
            return -(x**4).flatten(1).sum(1) * 1e6

    m = model((1, 2, 4), langevin=Langevin(40, step_size=1.0))
    m.nets[1] = Explosive()
    with pytest.raises(DivergenceError, match=r"cascade: grid 2 \(size 4\): the chain became non-finite at step \d+;"):
        m.cascade(starts(2), seed=0)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(start=torch.zeros(2, 3, 1, 1)), ValueError, r"start must have shape \(N, 1, 1, 1\), got \(2, 3, 1, 1\)"),
        (dict(start=torch.zeros(2, 1, 2, 2)), ValueError, "start must have shape"),
        (dict(start=torch.zeros(2, 1, 1, 1).double()), TypeError, "start must be a float32 tensor, got torch.float64"),
        (dict(start=[0.0]), ValueError, "start must have shape .*, got list"),
        (dict(first_step=(0, 0)), ValueError, "one entry a net"),
        (dict(langevin=[Langevin(1, step_size=0.1)]), ValueError, "langevin must be a Langevin or 3 of them"),
        (dict(mask=torch.ones(8, 8, dtype=torch.bool)), ValueError, "known and mask go together, got mask alone"),
        (dict(known=torch.ones(1, 1, 8, 8)), ValueError, "known and mask go together, got known alone"),
        (
            dict(known=torch.ones(1, 1, 8, 8), mask=torch.ones(8, 8)),
            TypeError,
            "mask must be a bool tensor, got torch.float32",
        ),
        (
            dict(known=torch.ones(1, 1, 8, 8), mask=torch.ones(4, 4, dtype=torch.bool)),
            ValueError,
            r"mask must broadcast to \(2, 1, 8, 8\), got \(4, 4\)",
        ),
        (
            dict(known=torch.ones(1, 1, 8, 8).double(), mask=torch.ones(8, 8, dtype=torch.bool)),
            TypeError,
            "known must be a float32 tensor",
        ),
        (
            dict(known=torch.full((1, 1, 8, 8), torch.nan), mask=torch.zeros(8, 8, dtype=torch.bool)),
            ValueError,
            "known must be finite",
        ),
        (dict(seed=-1), ValueError, "seed must be in"),
        (dict(precision="fp8"), ValueError, "precision must be one of"),
        (dict(backend="cuda"), ValueError, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"(cascade|MultiGrid|langevin_step).*{message}"):
        model().cascade(**{"start": starts(2), "seed": 0, **arguments})
