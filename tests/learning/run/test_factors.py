"""How steep an energy is where its chains are, and the noise on observed images that follows it."""

from __future__ import annotations

import json

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
from mgebm_fast.learning.run.factors import MOST_GROWTH, Growth

STIFF = {"stabilise": {"stiffness": (0.0, 1e-6), "data_noise": (0.02, 0.04)}, "steps": 12, "log_every": 2}
MULTIGRID_OPTIONS = {"multigrid": {"bank_size": 12, "conditional": True}}


def records(run):
    return [record for record in Run(run).metrics() if "lr_factor" in record]


@pytest.mark.parametrize("labels", [0, 2])
def test_largest_curvature_is_the_largest_eigenvalue_of_the_hessian(labels):
    """Of a smooth convex energy in float64, by autograd's Hessian; label planes are no part of x."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2 + labels, 6, 3, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(96, 1)).double()
    net[3].weight.data.abs_()
    x = torch.randn(5, 2 + labels, 4, 4, dtype=torch.float64)

    def gradient(at):
        at = at.double().requires_grad_()
        return torch.autograd.grad(net(at).sum(), at)[0]

    expected = []
    for image in x:
        hessian = torch.autograd.functional.hessian(
            lambda pixels, rest=image[2:]: net(torch.cat([pixels.view(2, 4, 4), rest])[None]).sum(), image[:2].flatten()
        )
        expected.append(float(torch.linalg.eigvalsh(hessian)[-1]))
    for iterations, error in ((2000, 1e-4), (6, 0.2)):
        found = largest_curvature(gradient, x, torch.tensor(1e-4), slice(2), iterations)
        assert float(found) == pytest.approx(sum(expected) / 5, rel=error)


def test_of_a_flat_energy_it_is_0():
    assert largest_curvature(torch.zeros_like, torch.randn(3, 1, 2, 2), torch.tensor(0.1), slice(1)) == 0


def test_noise_grows_above_the_bound_and_goes_back_below_three_quarters_of_it():
    growth, said = Growth({"size_8": 0.8, "size_16": 0.0}), []
    for update, stiffness in ((20, 0.7), (40, 0.9), (60, 0.9), (80, 0.7), (100, 0.5), (200, 0.5)):
        said.append(growth.take({"size_8/stiffness": stiffness, "size_16/stiffness": 9.0}, update, Ranks()))
        if update == 40:
            assert growth.factors == {"size_8": pytest.approx(1.0015**20)}
        if update == 80:
            assert growth.factors == {"size_8": pytest.approx(1.0015**40)}
    assert said == [False, True, True, False, True, True]
    assert growth.factors["size_8"] == pytest.approx(max(1.0, 1.0015**40 / 1.0005**120))
    again = Growth({"size_8": 0.8, "size_16": 0.0})
    again.restore(json.loads(json.dumps(growth.state())))
    for one in (growth, again):
        one.take({"size_8/stiffness": 0.9}, 100_000, Ranks())
    assert growth.factors == again.factors == {"size_8": MOST_GROWTH}
    growth.take({"size_8/stiffness": 0.1}, 200_000, Ranks())
    assert growth.factors == {"size_8": 1.0}
    assert not Growth({"size_8": 0.0}).take({"size_8/stiffness": 9.0}, 20, Ranks())


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
