"""Every preset trains from the command line with nothing but what is installed, and its run can be used."""

from __future__ import annotations

import dataclasses
import json
import socket

import numpy as np
import pytest
from typer.testing import CliRunner

from mgebm_fast.cli import app
from mgebm_fast.data.builtin import is_builtin
from mgebm_fast.evaluation import features
from mgebm_fast.learning import METHODS, Run, build_model, load_preset, preset_names

SMALL = ["--set", "steps=2", "--set", "batch_size=4", "--set", "width=0.05", "--set", "langevin.steps=2"]
BASELINES = [
    name for name in preset_names() if load_preset(name).method in ("cd", "pcd", "single-grid-cd", "short-run")
]


def mgebm(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a preset's data must need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_the_list_says_method_data_and_time():
    listed = json.loads(mgebm("presets", "--json").stdout)
    assert [entry["name"] for entry in listed] == preset_names()
    for entry in listed:
        assert entry["method"] in METHODS and is_builtin(entry["data"]) and entry["time"] and entry["description"]
    assert {entry["method"] for entry in listed} == set(METHODS)
    text = mgebm("presets").stdout
    for entry in listed:
        assert f"{entry['method']} on {entry['data']}" in text


# Tables whose samples' chains have a length of their own, a thousand steps in some.
FEW = {table: ["--set", f"{table}.sample_steps=4"] for table in ("frame", "cd", "generative-convnet")}


# Of every method the preset that takes least: its run goes on, and samples twice the same.
GOING_ON = {
    load_preset(name).method: name for name in sorted(preset_names(), key=lambda name: "digits" in name)
}.values()


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_trains_two_steps_and_its_run_is_used(name, tmp_path, no_network):
    out = tmp_path / "run"
    mgebm("train", name, *SMALL, *FEW.get(load_preset(name).method, ()), "--out", out)
    run = Run(out)
    assert run.finished and len(run.metrics()) >= 1 and run.config.method == load_preset(name).method
    if name in GOING_ON:
        mgebm("train", "--out", out, "--resume", "--set", "steps=3")
    mgebm("sample", out, "--num", 3, "--seed", 1, "--out", tmp_path / "a.npy")
    a = np.load(tmp_path / "a.npy")
    size = getattr(run.model(), "shape", (run.config.sizes[-1],) * 2)
    assert a.shape == (3, run.config.channels, *size)
    if name in GOING_ON:
        mgebm("sample", out, "--num", 3, "--seed", 1, "--out", tmp_path / "b.npy")
        assert np.array_equal(a, np.load(tmp_path / "b.npy"))
    assert a.dtype == (np.float32 if len(size) == 1 else np.uint8)
    assert list((out / "samples").glob("*.png"))


def test_a_baseline_is_evaluated(tmp_path, monkeypatch):
    monkeypatch.setattr(features.feature_space, "__kwdefaults__", {"seed": 0, "visits": 640})
    mgebm("train", "digits-pcd", *SMALL, "--out", tmp_path / "run")
    figures = json.loads(mgebm("evaluate", tmp_path / "run", "--num", 20, "--json").stdout)
    assert figures["num"] == 20 and figures["kid"] is not None


def test_filters_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mgebm("train", "texture", *SMALL, "--set", "value_range=[-4,4]", "--out", "wall")
    learned = ["--set", "frame.filters=wall", "--data", "texture:brick/4"]
    mgebm("train", "frame", *SMALL, *learned, "--out", "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    mgebm("train", "--out", tmp_path / "run", "--resume", "--set", "steps=3")
    assert Run(tmp_path / "run").config.steps == 3
    (tmp_path / "wall").rename(tmp_path / "moved")
    moved = ["--set", f"frame.filters={tmp_path / 'moved'}"]
    mgebm("train", "--out", tmp_path / "run", "--resume", "--set", "steps=4", *moved)
    (tmp_path / "elsewhere" / "gabor").mkdir()  # the bank's name is no path
    mgebm("train", "frame", *SMALL, "--out", tmp_path / "bank")
    assert Run(tmp_path / "bank").config.options.filters == "gabor"


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_has_the_net_of_its_twin(name):
    config, twin = load_preset(name), load_preset(name.partition("-")[0])
    assert build_model(config).nets[0].config() == build_model(twin).nets[-1].config()
    assert config.optimiser == twin.optimiser and config.data == twin.data
    ours, theirs = (dataclasses.asdict(each.stabilise) for each in (config, twin))
    if config.method == "single-grid-cd":  # its one net also makes the coarse shape, and settles as coarse nets do
        assert ours.pop("noise_anneal_share") == theirs.pop("noise_anneal_share")[0]
    assert ours == theirs
