"""The examples run, at small size, and leave their pictures; each is short enough to be read at once."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import mgebm_fast as mg

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = {  # options, and images across and down in the picture
    "annealing": (["--num", "400"], None),
    "guidance": (["--num", "2", "--steps", "2", "--epochs", "1"], (2, 10)),
    "inpainting": (["--num", "2"], (2, 5)),
    "inverse_problem": (["--num", "2", "--samples", "2", "--steps", "2"], (2, 5)),
    "replay_buffer": (["--updates", "2", "--buffer", "64"], (8, 8)),
}
OF_A_RUN = ("guidance", "inpainting", "inverse_problem")


@pytest.mark.parametrize("name", SMALL)
def test_an_example_leaves_its_picture(name, tmp_path, monkeypatch, capsys):
    options, shape = SMALL[name]
    if name in OF_A_RUN:
        chain = mg.Langevin(steps=2, drift=1.0, noise_std=0.03, clamp=(-1.0, 1.0))
        model = mg.MultiGrid(
            (1, 2, 4, 8), channels=1, langevin=chain, norm="none", variant="compact", width=0.1, value_range=(-1.0, 1.0)
        )
        model.set_colours(torch.zeros(4, 1))
        model.save(tmp_path / "model.safetensors")
        options = [str(tmp_path / "model.safetensors"), str(tmp_path / "x.png"), *options]
    else:
        options = [str(tmp_path / "x.png"), *options]
    monkeypatch.setattr(sys, "argv", [name, *options])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    size = Image.open(tmp_path / "x.png").size
    assert shape is None or size == tuple(n * (8 * 4 + 2) + 2 for n in shape)
    if name == "annealing":
        assert "cold: 1 of 8 modes\nannealed: 8 of 8 modes" in capsys.readouterr().out


@pytest.mark.parametrize("name", SMALL)
def test_an_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
