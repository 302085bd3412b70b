import pytest
import torch

from mgebm_fast import noise
from mgebm_fast.models import MultiGrid
from mgebm_fast.sampling import Langevin

SHORT = Langevin(2, drift=0.5, noise_std=0.1, clamp=(-1.0, 1.0))


def model(sizes=(1, 2, 4, 8), channels=2, norm="none", **more):
    more = {"langevin": SHORT, "value_range": (-1.0, 1.0), "variant": "compact", "width": 0.25, **more}
    m = MultiGrid(sizes, channels=channels, norm=norm, **more)
    m.set_colours(2 * torch.rand(20, channels, generator=torch.Generator().manual_seed(0)) - 1)
    return m


def observed(m, n=16):
    """The model after one look at data at every size, so that a batch net has running statistics."""
    for size, net in zip(m.sizes[1:], m.nets, strict=True):
        with net.observing():
            net(torch.randn(n, m.channels, size, size, generator=torch.Generator().manual_seed(size)))
    return m


def test_defaults_are_the_paper_s():
    m = MultiGrid(width=0.1)
    assert m.sizes == (1, 4, 16, 64) and m.norm == "batch" and m.batch_size == 100
    assert m.langevin == (Langevin(30, step_size=0.3, noise_scale=1.0, reference_std=50.0, clamp=(0.0, 255.0)),) * 3
    assert [net.size for net in m.nets] == [(4, 4), (16, 16), (64, 64)]
    assert len(m.nets[2].layers) == 4  # variant B


def test_nets_of_a_ladder_start_from_different_weights_and_the_seed_decides_them():
    same = MultiGrid((1, 4, 8, 16), variant="compact", norm="none", seed=3)
    again = MultiGrid((1, 4, 8, 16), variant="compact", norm="none", seed=3)
    other = MultiGrid((1, 4, 8, 16), variant="compact", norm="none", seed=4)
    first = [net.layers[0].weight for m in (same, other) for net in m.nets]
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i])
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), again.parameters(), strict=True))


def test_sample_is_in_the_value_range_and_a_function_of_the_seed():
    m = model()
    x = m.sample(5, seed=1)
    assert x.shape == (5, 2, 8, 8) and x.dtype == torch.float32 and float(x.abs().max()) <= 1.0
    assert torch.equal(m.sample(5, seed=1), x)
    assert not torch.equal(m.sample(5, seed=2), x)
    assert len({tuple(image.flatten().tolist()) for image in x}) == 5


def test_samples_start_from_the_stored_colours_by_sample_id():
    m = model()
    grids = m.sample(12, seed=1, return_grids=True)
    rows = grids[0][:, :, 0, 0]
    matches = (rows[:, None] == m.colours[None]).all(2)
    assert bool(matches.any(1).all()) and len(torch.unique(matches.int().argmax(1))) > 3
    assert torch.equal(m.draw_colours(4, seed=1, first_sample=8)[:, :, 0, 0], rows[8:])


def test_samples_of_the_chain_use_the_sampling_streams():
    m = model()
    grids = m.sample(4, seed=9, first_sample=3, return_grids=True)
    expected = m.cascade(
        m.draw_colours(4, seed=9, first_sample=3), seed=9, first_sample=3, purpose=noise.Purpose.SAMPLING
    )
    assert all(torch.equal(a, b) for a, b in zip(grids, expected, strict=True))


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_groups_only_bound_the_memory_where_samples_are_independent(group):
    m = model()
    whole = m.sample(7, seed=1, precision="fp32")
    torch.testing.assert_close(m.sample(7, seed=1, batch_size=group, precision="fp32"), whole, rtol=0, atol=1e-4)
    parts = [m.sample(3, seed=1, precision="fp32"), m.sample(4, seed=1, first_sample=3, precision="fp32")]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)


def test_batch_statistics_are_those_of_full_groups():
    m = model(norm="batch", batch_size=4)
    sizes = set()
    six = m.sample(6, seed=1, callback=lambda grid, step, x: sizes.add(len(x)))
    assert sizes == {4} and len(six) == 6
    eight = m.sample(8, seed=1)
    assert torch.equal(six, eight[:6])
    assert torch.equal(m.sample(4, seed=1, first_sample=4), eight[4:])
    assert not torch.allclose(m.sample(6, seed=1, batch_size=6), six, atol=1e-3)


def test_sampling_leaves_no_trace_on_the_model():
    m = observed(model(norm="batch", batch_size=4, spectral_norm=True))
    before = {name: value.clone() for name, value in m.state_dict().items()}
    m.sample(3, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in m.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in m.parameters())


def test_known_pixels_of_each_sample():
    m = model(batch_size=2)
    known = torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 2, 8, 8)
    mask = torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    mask[:, :, 4:] = True
    x = m.sample(3, seed=0, known=known, mask=mask)
    assert torch.equal(x[:, :, :4], known[:, :, :4])
    m = model(norm="batch", batch_size=2)
    assert torch.equal(m.sample(3, seed=0, known=known, mask=mask)[:, :, :4], known[:, :, :4])
    with pytest.raises(ValueError, match="sample: known must broadcast"):
        m.sample(3, seed=0, known=known[:2], mask=mask)


def test_frozen_model_has_independent_samples():
    m = observed(model(norm="batch", batch_size=4)).freeze_norm()
    assert m.norm == "frozen" and m.langevin == (SHORT,) * 3
    five, two = (m.sample(n, seed=1, precision="fp32") for n in (5, 2))
    torch.testing.assert_close(five[:2], two, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="must have observed data"):
        model(norm="batch").freeze_norm()


@pytest.mark.parametrize("value_range", [(0.0, 255.0), (-1.0, 1.0), (0.0, 1.0), (-3.0, 7.5)])
def test_bytes_survive_the_way_to_the_model_s_units_and_back(value_range):
    m = model(value_range=value_range)
    pixels = torch.arange(256, dtype=torch.uint8)
    units = m.from_uint8(pixels)
    assert units.dtype == torch.float32
    assert units[0] == value_range[0] and units[255] == pytest.approx(value_range[1])
    assert torch.equal(m.to_uint8(units), pixels)
    assert m.to_uint8(torch.tensor([-1e9, 1e9])).tolist() == [0, 255]


def test_any_energies_may_stand_in_for_the_nets():
    class Quadratic(torch.nn.Module):
        def forward(self, x):
            return x.square().flatten(1).sum(1)

    m = MultiGrid((1, 2, 4), channels=1, nets=[Quadratic(), Quadratic()], langevin=SHORT, value_range=(-1.0, 1.0))
    m.set_colours(torch.zeros(1, 1))
    assert m.norm == "none" and m.sample(3).shape == (3, 1, 4, 4)
    with pytest.raises(ValueError, match="nets must be EnergyNets or ResidualNets to be frozen, got Quadratic"):
        m.freeze_norm()


def test_explain_has_every_grid():
    lines = model().explain().splitlines()
    grids = [lines[i : i + 7] for i in range(0, len(lines), 7)]
    names = ["grid 1", "  chain", "  gradient", "  device", "  update", "  graph", "  samples"]
    assert [line.partition(" (")[0].partition(":")[0] for line in grids[0]] == names
    assert len(grids) == 3
    assert grids[2][0] == "grid 3 (size 8)" and grids[2][1].startswith("  chain: 2 steps")


def test_config_rebuilds_the_model():
    m = model(norm="batch", activation="silu", spectral_norm=True, batch_size=7)
    copy = MultiGrid.from_config(m.config())
    copy.set_colours(m.colours)
    copy.load_state_dict(m.state_dict())
    assert copy.config() == m.config()
    assert torch.equal(copy.sample(3, seed=2), m.sample(3, seed=2))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sizes=(1, 3, 4)), "each must divide the next, got 3 → 4"),
        (dict(sizes=(1, 4, 2)), "sizes must grow and each must divide the next, got 4 → 2"),
        (dict(sizes=(1, 4, 4)), "got 4 → 4"),
        (dict(sizes=(2, 4)), "sizes must start at 1"),
        (dict(sizes=(1,)), "sizes must be two or more positive ints"),
        (dict(sizes=(1, 4.0)), "sizes must be two or more positive ints"),
        (dict(channels=0), "channels must be a positive int"),
        (dict(value_range=(1.0, 0.0)), r"value_range must be \(low, high\) with low < high"),
        (dict(value_range=(-1e38, 3e38)), r"value_range must be .*, within ±1e30, got \(-1e\+38, 3e\+38\)"),
        (dict(batch_size=0), "batch_size must be a positive int or None"),
        (dict(langevin=[SHORT]), "langevin must be a Langevin or 3 of them"),
        (dict(norm="layer"), "norm must be one of"),
        (dict(variant="D"), "variant must be one of"),
        (dict(seed=-1), "seed must be in"),
        (dict(nets=[]), "nets must be 3, one a size after the first, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiGrid(**{"sizes": (1, 2, 4, 8), "channels": 2, "norm": "none", "variant": "compact", **arguments})


def test_wrong_samples_are_named():
    m = model()
    for n in (0, -1, 2.0):
        with pytest.raises(ValueError, match="sample: n must be a positive int"):
            m.sample(n)
    with pytest.raises(ValueError, match="sample: batch_size must be a positive int"):
        m.sample(1, batch_size=0)
    with pytest.raises(ValueError, match="sample: seed must be in"):
        m.sample(1, seed=-5)
    with pytest.raises(ValueError, match="must hold a colour distribution, got none"):
        MultiGrid((1, 2), norm="none").sample(1)


def test_wrong_colours_are_named():
    m = model()
    for colours in (torch.zeros(3, 1), torch.zeros(0, 2), torch.zeros(2)):
        with pytest.raises(ValueError, match=r"colours must have shape \(M, 2\)"):
            m.set_colours(colours)
    with pytest.raises(ValueError, match="colours must be finite"):
        m.set_colours(torch.tensor([[0.0, float("nan")]]))
    m.set_colours(torch.zeros(4, 2, 1, 1, dtype=torch.float64))
    assert m.colours.shape == (4, 2) and m.colours.dtype == torch.float32


@pytest.mark.parametrize("training", [False, True])
def test_nets_of_any_kind_that_couple_samples_run_in_whole_groups(training):
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(64, 1),
        torch.nn.Flatten(0),
    ).train(training)  # fmt: skip
    dynamics = Langevin(2, step_size=0.3, clamp=(0.0, 255.0))
    m = MultiGrid((1, 4), channels=1, nets=[net], langevin=dynamics, batch_size=5)
    m.set_colours(torch.rand(9, 1) * 255)
    assert bool(m.coupled) == training
    torch.testing.assert_close(m.sample(7, precision="fp32"), m.sample(10, precision="fp32")[:7], rtol=1e-5, atol=1e-3)
