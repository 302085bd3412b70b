"""The adapters of examples/: one chain by the other package's sampler and by ours, where that package is installed."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import mgebm_fast as mg

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NET = mg.nets.multigrid_net(8, channels=1, norm="none", variant="compact", width=0.2)
START = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def adapter(name: str) -> dict:
    return runpy.run_path(str(EXAMPLES / f"{name}_adapter.py"))


def test_torchebm_chains_are_ours(capsys):
    samplers = pytest.importorskip("torchebm.samplers", reason="torchebm is not installed")
    from torchebm.core import BaseModel, LinearScheduler

    names = adapter("torchebm")
    model = names["Energy"](NET)
    torch.testing.assert_close(model.gradient(START), BaseModel.gradient(model, START))
    falling = LinearScheduler(start_value=0.5, end_value=0.1, n_steps=4)
    cold = samplers.LangevinDynamics(model, step_size=falling, noise_scale=1e-30, clamp=(0.0, 1.0))
    ours = names["langevin"](cold, 5)
    assert ours.drift == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    for energy in (NET, model):  # a model of theirs goes into our chain as it is
        torch.testing.assert_close(
            ours(energy, START, seed=0, precision="fp32"), cold.sample(x=START, n_steps=5), rtol=0, atol=1e-6
        )
    assert names["langevin"](samplers.LangevinDynamics(model, 0.02, noise_scale=0.5), 1).noise_std == pytest.approx(
        (0.1,)
    )
    with pytest.raises(ValueError, match="HeunIntegrator"):
        names["langevin"](samplers.LangevinDynamics(model, integrator="heun"), 1)
    names["main"]()
    assert "accepts" in capsys.readouterr().out


def test_ebmkit_chains_are_ours(capsys):
    ebm = pytest.importorskip("ebm", reason="ebmkit is not installed")
    names = adapter("ebmkit")
    cold = ebm.LangevinDynamics(0.5, steps=5, noise_scale=0.0, grad_clip=0.01, clamp=(0.0, 1.0))
    ours = names["langevin"](cold)
    expected = cold.sample(NET, START, return_trajectory=True)
    torch.testing.assert_close(ours(NET, START, seed=0, precision="fp32"), expected[-1], rtol=0, atol=1e-6)
    inside = names["Chain"](ours)
    torch.testing.assert_close(inside.sample(NET, START, return_trajectory=True), expected, rtol=0, atol=1e-3)  # auto
    torch.testing.assert_close(inside.sample(NET, START, steps=2), expected[2], rtol=0, atol=1e-3)
    assert names["langevin"](ebm.LangevinDynamics(0.02)).noise_std == pytest.approx(0.2)
    with pytest.raises(ValueError, match="MALA"):
        names["langevin"](ebm.MALA(0.02))
    names["main"]()
    assert "updates" in capsys.readouterr().out
