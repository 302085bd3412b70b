"""`mgebm diagnose`: its figures, its pictures, and what is refused."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest
from helpers.console import one_line
from PIL import Image

import mgebm_fast as mg
from mgebm_fast.evaluation.diagnosis import diagnose

from .conftest import train_tiny

GRIDS = ["grid 1 size 2", "grid 2 size 4", "grid 3 size 8"]


def figures(result):
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def constant(mgebm, tmp_path_factory):
    """A run whose noise is constant within a chain: only such chains have an acceptance."""
    return train_tiny(mgebm, tmp_path_factory, "langevin.noise_std=0.05")


@pytest.fixture(scope="module")
def found(mgebm, constant):
    return figures(mgebm("diagnose", constant, "--num", 6, "--steps", 20, "--json"))


def test_chains_whose_noise_falls_have_no_acceptance_and_a_note_says_so(mgebm, trained):
    found = figures(mgebm("diagnose", trained, "--num", 3, "--steps", 20, "--json"))
    for chain in found["chains"]:
        assert chain["acceptance"] is chain["gradient_to_noise"] is None and chain["potential_last"] is not None
    assert any("whose numbers vary, has no one law" in note for note in found["notes"])


def test_every_grid_has_its_figures(found):
    assert [chain["name"] for chain in found["chains"]] == GRIDS
    for chain in found["chains"]:
        assert chain["steps"] == chain["recorded"] == 20 and chain["kept"] == 10 and chain["chains"] == 6
        assert chain["gradient_to_noise"] > 0 and 0 <= chain["acceptance"] <= 1 and chain["log_acceptance"] <= 0
        assert chain["temperature"] == pytest.approx(chain["noise_std"] ** 2 / (2 * chain["drift"]))
        assert set(chain["autocorrelation_steps"]) == {"potential", "mean"}


def test_ess_and_rhat_are_arvizs(found):
    pytest.importorskip("arviz")
    for chain in found["chains"]:
        assert chain["ess"]["worst"] <= min(chain["ess"]["potential"], chain["ess"]["mean"])
        assert chain["rhat"]["worst"] >= max(chain["rhat"]["potential"], chain["rhat"]["mean"])
        assert 0 < chain["ess"]["potential"] < 600


def test_the_chains_are_those_that_sample(trained):
    model = mg.MultiGrid.load(trained)
    before = model.langevin
    report = diagnose(model, num=5, seed=3)
    samples = model.sample(5, seed=3, precision="fp32")
    expected = model.nets[-1](samples).double().detach().numpy()
    np.testing.assert_allclose(report.chains[-1].trace.potential[-1], expected, rtol=1e-6)
    diagnose(model, num=2, steps=3)
    assert model.langevin == before
    single = mg.models.SingleGrid(
        8, channels=1, langevin=mg.Langevin(steps=2, step_size=0.1), norm="none", sample_steps=7, variant="compact",
        value_range=(-1.0, 1.0),
    )  # fmt: skip
    assert diagnose(single, num=3).chains[0].figures["steps"] == 7
    assert diagnose(single, num=3, steps=4).chains[0].figures["steps"] == 4 and single.sample_steps == 7


def test_pictures_and_the_report_are_written(mgebm, trained, tmp_path):
    out = tmp_path / "deep" / "folder"
    result = mgebm("diagnose", trained, "--num", 4, "--steps", 6, "--out", out)
    assert result.exit_code == 0, result.output
    assert "acceptance if corrected" in result.stdout and "R-hat" in result.stdout
    names = [f"{grid.replace(' ', '_')}_states.png" for grid in GRIDS]
    if importlib.util.find_spec("matplotlib"):
        names += [f"{grid.replace(' ', '_')}.png" for grid in GRIDS]
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "report.json"])
    assert len(json.loads((out / "report.json").read_text())["chains"]) == 3
    for name in names:
        assert np.asarray(Image.open(out / name).convert("L")).std() > 5, name


def test_without_arviz_and_matplotlib_the_rest_is_told(mgebm, constant, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("arviz", "matplotlib") else real(name, *a)
    )
    result = mgebm("diagnose", constant, "--num", 3, "--json", "--out", tmp_path / "x")
    found = figures(result)
    assert found["chains"][0]["ess"] is None and found["chains"][0]["rhat"] is None
    assert "arviz is not installed" in found["notes"][0] and "matplotlib is not installed" in result.stderr
    assert found["chains"][0]["acceptance"] is not None
    assert sorted(p.suffix for p in (tmp_path / "x").iterdir()) == [".json", ".png", ".png", ".png"]


def test_json_alone_writes_nothing(mgebm, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    figures(mgebm("diagnose", trained, "--num", 2, "--json"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run_is_one_line(mgebm, tmp_path):
    assert "does not exist" in one_line(mgebm("diagnose", tmp_path / "none"))
    (tmp_path / "text.safetensors").write_text("no model")
    assert "no safetensors file" in one_line(mgebm("diagnose", tmp_path / "text.safetensors", "--json"))
    (tmp_path / "empty").mkdir()
    assert "which holds no model" in one_line(mgebm("diagnose", tmp_path / "empty", "--json"))
    (tmp_path / "file").write_text("")
    assert "must be a folder" in one_line(mgebm("diagnose", tmp_path / "empty", "--out", tmp_path / "file"))


@pytest.mark.parametrize("option", [["--num", "1"], ["--steps", "0"], ["--seed", "-1"]])
def test_a_wrong_number_is_told_by_option(mgebm, trained, option):
    result = mgebm("diagnose", trained, *option, "--json")
    assert result.exit_code == 2 and option[0] in result.stderr


def test_a_noise_free_run_has_a_note(trained):
    model = mg.MultiGrid.load(trained)
    model.langevin = tuple(mg.Langevin(steps=3, drift=0.1, noise_std=0.0, clamp=(-1.0, 1.0)) for _ in model.nets)
    report = diagnose(model, num=3)
    assert report.chains[0].figures["acceptance"] is None
    assert any("noise-free" in note for note in report.notes)
    if importlib.util.find_spec("matplotlib"):
        from mgebm_fast.evaluation.plots import plot_chain

        assert plot_chain(report.chains[0])[:4] == b"\x89PNG"


def test_help_has_an_example(mgebm):
    result = mgebm("diagnose", "--help")
    assert result.exit_code == 0 and "  mgebm diagnose runs/" in result.stdout


def test_data_that_are_others_now_are_reported(mgebm, run):
    stored = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps({**stored, "digest": "0" * 64, "names": None, "content": None}))
    result = mgebm("diagnose", run, "--num", 2, "--steps", 2, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["chains"]
    assert "digits: not what the run learnt from: names or pixels of some images differ" in result.stderr
    (run / "data.json").write_text(json.dumps(stored))
    assert "not what" not in mgebm("diagnose", run, "--num", 2, "--steps", 2, "--json").stderr
