"""How steep an energy is where its chains are, and the noise on observed images that follows it."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from helpers.runs import same_files
from helpers.training import tiny_data
from torch import nn

from mgebm_fast.data import ImageData
from mgebm_fast.learning import Run
from mgebm_fast.learning.methods.synthesis import largest_curvature
from mgebm_fast.learning.run.distributed import Ranks
from mgebm_fast.learning.run.divergence.factors import MOST_GROWTH, Growth

STIFF = {"stabilise": {"stiffness": (0.0, 1e-6), "data_noise": (0.02, 0.04)}, "steps": 12, "log_every": 2}
MULTIGRID_OPTIONS = {"multigrid": {"bank_size": 12, "conditional": True}}


def records(run):
    return [record for record in Run(run).metrics() if "lr_factor" in record]


@pytest.mark.parametrize("labels", [0, 2])
@pytest.mark.parametrize("convex", [True, False])
def test_largest_curvature_is_the_largest_eigenvalue_of_the_hessian(labels, convex):
    """Of a smooth energy in float64, by autograd's Hessian, also where another one is larger in magnitude; label planes
    are no part of x."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2 + labels, 6, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(96, 1)).double()
    net[3].weight.data.abs_()
    if not convex:
        net[3].weight.data[:, ::3] *= -3
    x = torch.randn(5, 2 + labels, 4, 4, dtype=torch.float64)

    def gradient(at):
        at = at.double().requires_grad_()
        return torch.autograd.grad(net(at).sum(), at)[0]

    expected, lowest = [], []
    for image in x:
        hessian = torch.autograd.functional.hessian(
            lambda pixels, rest=image[2:]: net(torch.cat([pixels.view(2, 4, 4), rest])[None]).sum(), image[:2].flatten()
        )
        values = torch.linalg.eigvalsh(hessian).tolist()
        expected.append(values[-1])
        lowest.append(values[0])
    assert convex or any(-low > high for low, high in zip(lowest, expected))
    found = [float(largest_curvature(gradient, x, torch.tensor(1e-4), slice(2), n)) for n in (3000, 8)]
    assert found[0] == pytest.approx(sum(expected) / 5, rel=1e-3)
    assert 0.7 * found[0] < found[1] <= 1.001 * found[0] if convex else found[1] <= 1.001 * found[0]


def test_of_a_flat_energy_it_is_0():
    assert largest_curvature(torch.zeros_like, torch.randn(3, 1, 2, 2), torch.tensor(0.1), slice(1)) == 0


def test_noise_grows_above_the_bound_and_goes_back_below_three_quarters_of_it():
    growth = Growth({"size_8": 0.8}, log_every=20)
    up, down = 1.0015**20, 1.0005**20
    high = up**2
    seen = (0.7, 1.0), (0.9, up), (0.9, high), (0.7, high), (0.59, high / down), (0.1, high / down**2)
    for stiffness, expected in seen:
        before = growth.factors.get("size_8", 1.0)
        changed = growth.take({"size_8/stiffness": stiffness, "size_16/stiffness": 9.0}, Ranks())
        assert growth.factors.get("size_8", 1.0) == pytest.approx(expected) and changed == (before != expected)
    for _ in range(9):
        growth.take({"size_8/stiffness": 0.1}, Ranks())
    assert growth.factors == {"size_8": 1.0}
    for _ in range(60):
        growth.take({"size_8/stiffness": 0.9}, Ranks())
    assert growth.factors == {"size_8": MOST_GROWTH}
    assert not Growth({}, log_every=20).take({"size_8/stiffness": 9.0}, Ranks())
    rare = Growth({"size_8": 0.8}, log_every=5000)  # one measurement is not worth more than 100 updates
    rare.take({"size_8/stiffness": 0.9}, Ranks())
    assert rare.factors["size_8"] == pytest.approx(1.0015**100)


def test_all_ranks_take_what_the_first_has_seen():
    growth = Growth({"size_8": 0.8}, log_every=20)
    ranks = types.SimpleNamespace(size=2, tell=lambda said: '{"size_8": 0.9}')
    assert growth.take({"size_8/stiffness": 0.1}, ranks) and growth.factors["size_8"] > 1


def test_observed_images_have_the_noise_and_records_say_so(trainer, tmp_path):
    ours = trainer(out=tmp_path, data=tiny_data(), **STIFF)
    ours.fit()
    found = [(record["step"], record.get("size_4/data_noise_factor", 1.0)) for record in records(tmp_path)]
    assert found == [(step, pytest.approx(1.0015 ** (step - 2))) for step in range(2, 13, 2)]
    assert all(record["size_4/stiffness"] > 1e-6 for record in records(tmp_path))
    assert ours.rule.numbers(0).data_noise == pytest.approx([0.02, 0.04 * 1.0015**12])
    assert not any("size_4/lr_factor" in record for record in records(tmp_path))


def test_a_stopped_run_goes_on_as_if_it_had_not(trainer, tmp_path):
    """The factors are part of a checkpoint, and of the state that a run without a folder goes back to."""
    trainer(out=tmp_path / "whole", data=tiny_data(), **STIFF).fit()
    trainer(out=tmp_path / "stopped", data=tiny_data(), **STIFF).fit(5)  # between two records
    again = trainer(out=tmp_path / "stopped", data=tiny_data(), **STIFF)
    assert again.resume() == 5 and again.rule.factors["size_4"].data_noise == pytest.approx(1.0015**4)
    again.fit()
    same_files(tmp_path / "whole", tmp_path / "stopped", "step_000012")


def test_going_back_takes_the_factors_of_the_good_state(trainer):
    changes = {**STIFF, "rollback": {"attempts": 1, "data_noise_factor": 2.0}, "checkpoint_every": 4}
    ours, seen = trainer(data=tiny_data(), **changes), []
    check = ours._loop.history.watch.check

    def checked(metrics, update):
        check(metrics, update)
        if update == 5:
            seen.append(ours.rule.factors["size_4"].data_noise)
        if update == 8 and ours.rule.attempt == 0:
            raise ours._loop.history.watch._ran_away("size_4", 9.0, 1.0, "made to", update)

    ours._loop.history.watch.check = checked
    ours.fit()
    assert seen == [pytest.approx(1.0015**4), pytest.approx(2.0 * 1.0015**4)]
    assert ours.rule.factors["size_4"].data_noise == pytest.approx(2.0 * 1.0015**12)
    assert ours._loop.history.returned("size_4").data_noise == 2.0


def test_labels_and_banks_are_measured_too(trainer, tmp_path):
    pixels = tiny_data().images
    data = ImageData(pixels, np.arange(len(pixels)) % 2, ("even", "odd"))
    trainer(out=tmp_path, data=data, **STIFF, **MULTIGRID_OPTIONS).fit()
    assert records(tmp_path)[-1]["size_4/data_noise_factor"] > 1


def test_a_bound_that_comes_or_goes_at_a_resumption(trainer, tmp_path):
    """It begins at factor 1, however many updates were made before; without it the factor is 1 again."""
    for name, before, after, expected in ("comes", 0.0, 1e-6, 1.0015**2), ("goes", 1e-6, 0.0, 1.0):
        stabilise = [{"data_noise": (0.02, 0.04), "stiffness": (0.0, bound)} for bound in (before, after)]
        trainer(out=tmp_path / name, data=tiny_data(), **{**STIFF, "stabilise": stabilise[0]}).fit(10)
        again = trainer(out=tmp_path / name, data=tiny_data(), **{**STIFF, "stabilise": stabilise[1]})
        assert again.resume() == 10
        again.fit()
        assert again.rule.factors_of("size_4").data_noise == pytest.approx(expected), name


def test_a_net_without_noise_has_no_factor(trainer, tmp_path):
    stabilise = {"stiffness": 1e-6, "data_noise": (0.0, 0.04)}
    trainer(out=tmp_path, data=tiny_data(), **{**STIFF, "stabilise": stabilise}).fit()
    assert {name for name in records(tmp_path)[-1] if name.endswith("noise_factor")} == {"size_4/data_noise_factor"}


def test_the_net_of_a_video_is_bounded_too(trainer, tmp_path):
    """Whose size is that of its clips, whatever `sizes` says."""
    clips = np.random.default_rng(0).integers(0, 256, (6, 6, 8, 1), dtype=np.uint8)
    options = {"size": [4, 6, 8], "layers": [[3, 3, 2]]}
    more = {"method": "spatial-temporal", "batch_size": 2, "spatial-temporal": options}
    stabilise = {"stiffness": 1e-9, "data_noise": 0.1}
    ours = trainer(out=tmp_path, data=clips, steps=4, log_every=2, stabilise=stabilise, **more)
    ours.fit()
    (net,) = ours.rule.names
    assert records(tmp_path)[-1][f"{net}/stiffness"] != 0 and ours.rule.stiffness_bounds == {net: 1e-9}
