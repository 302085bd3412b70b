"""Which model a run folder stands for when some of it is damaged or gone, and that the user is told."""

from __future__ import annotations

import json
import shutil

import pytest
from helpers.console import one_line

from mgebm_fast.evaluation import features
from mgebm_fast.learning import Run
from mgebm_fast.models import Model, storage


@pytest.fixture
def damaged(run):
    """A run that was not finished, whose newest checkpoint is truncated."""
    (run / "model.safetensors").unlink()
    file = run / "checkpoints" / "step_000002" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return run


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--num", 2, "--out", "x.npy"],
        ["evaluate", "--num", 4, "--json"],
        ["inpaint", "--num", 2, "--length", "1", "--json"],
        ["diagnose", "--num", 2, "--json"],
    ],
)
def test_an_older_checkpoint_is_taken_and_told_of(mgebm, damaged, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features.feature_space, "__kwdefaults__", {"seed": 0, "visits": 64})
    result = mgebm(command[0], damaged, *command[1:])
    assert result.exit_code == 0, result.output
    told = [line for line in result.stderr.splitlines() if "damaged" in line]
    assert len(told) == 1
    assert told[0].startswith(f"{damaged}: step_000002 is damaged (model.safetensors: truncated, 100 bytes where ")
    assert told[0].endswith("; the model is that of step_000001")


def test_the_model_is_the_older_one(mgebm, damaged, tmp_path):
    for name, source in (("run", damaged), ("step", damaged / "checkpoints" / "step_000001")):
        result = mgebm("sample", source, "--num", 2, "--out", tmp_path / f"{name}.npy")
        assert result.exit_code == 0 and ("damaged" in result.stderr) == (name == "run")
    assert (tmp_path / "run.npy").read_bytes() == (tmp_path / "step.npy").read_bytes()


def test_whole_runs_are_opened_without_a_word(mgebm, run, tmp_path, recwarn):
    (run / "model.safetensors").unlink()
    result = mgebm("sample", run, "--num", 2, "--out", tmp_path / "x.npy")
    assert result.exit_code == 0 and "the model is that of" not in result.stderr
    Run(run).model()
    assert not [warning for warning in recwarn if "the model is that of" in str(warning.message)]


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "--num", 2, "--out", "x.npy"],
        ["evaluate", "--num", 4, "--json"],
        ["diagnose", "--num", 2, "--json"],
        ["report", "--out", "x.html"],
    ],
)
def test_a_model_that_is_not_that_of_a_finished_run_is_told_of(mgebm, run, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features.feature_space, "__kwdefaults__", {"seed": 0, "visits": 64})

    def told(path=run):
        result = mgebm(command[0], path, *command[1:])
        assert result.exit_code == 0, result.output
        return [line for line in result.stderr.splitlines() if "the model is that" in line or "collapsed" in line]

    config = run / "config.toml"
    config.write_text(config.read_text().replace("\nsteps = 2\n", "\nsteps = 4\n", 1))  # longer, and stopped
    assert told() == [f"{run}: not finished, the model is that of update 2 of 4"]
    collapse = run / "collapse.json"
    collapse.write_text(json.dumps({"update": 3, "model": 1, "why": "the gap of size 8 grew"}))
    assert told() == [f"{run}: {Run(run).collapse}"]
    (run / "model.safetensors").unlink()
    for name in ("step_000001", "step_000002"):
        shutil.rmtree(run / "checkpoints" / name)
    assert told() == [f"{run}: not finished, the model is that of update 0 of 4: untrained"]
    assert told(run / "checkpoints" / "step_000000") == []  # a checkpoint is what it is


def test_in_python_it_is_a_warning(damaged):
    with pytest.warns(UserWarning, match="step_000002 is damaged .*; the model is that of step_000001"):
        assert Run(damaged).model_file().parent.name == "step_000001"
    (damaged / "checkpoints" / "step_000002" / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="step_000002 holds no model; the model is that of step_000001"):
        assert storage.find(damaged).parent.name == "step_000001"
    with pytest.warns(UserWarning, match="step_000002 holds no model"):
        Model.load(damaged)


def test_a_folder_without_a_run_is_told_by_argument(mgebm, tmp_path):
    (tmp_path / "empty").mkdir()
    line = one_line(mgebm("sample", tmp_path / "empty", "--out", tmp_path / "x.png"))
    assert line == (
        "error: run: must be the folder of a run, a checkpoint's or a model file, got "
        f"{tmp_path / 'empty'}, which holds no model"
    )
