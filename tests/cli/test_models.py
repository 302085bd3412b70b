"""Models that come with the package: small, sampled at once, taken wherever a run is, and what their cards say."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mgebm_fast as mg
from mgebm_fast.data.builtin import is_builtin
from mgebm_fast.evaluation.recogniser import fit_recogniser
from mgebm_fast.learning import Run
from mgebm_fast.learning.run.stored_run import SHIPPED, shipped_names

MOST_BYTES = 4_000_000


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_they_are_small_half_precise_and_of_data_that_anyone_has(mgebm):
    listed = json.loads(mgebm("models", "--json").stdout)
    assert [entry["name"] for entry in listed] == shipped_names() and "digits" in shipped_names()
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) <= MOST_BYTES
    for entry in listed:
        tensors = load_file(SHIPPED / entry["name"] / "model.safetensors")
        assert {t.dtype for name, t in tensors.items() if name != "labels"} == {torch.float16}
        assert is_builtin(entry["data"])
        card = (SHIPPED / entry["name"] / "README.md").read_text(encoding="utf-8")
        for row in ("data", "command", "seed", "time", "kid"):
            assert re.search(rf"^\| {row} \| .+ \|$", card, re.MULTILINE), row
    assert all(name in mgebm("models").stdout for name in shipped_names())


@pytest.mark.parametrize("name", shipped_names())
def test_the_same_seed_gives_the_same_samples(name, mgebm):
    for out in ("a.npy", "b.npy"):
        result = mgebm("sample", name, "--num", 3, "--seed", 1, "--out", out)
        assert result.exit_code == 0, result.output
    a = np.load("a.npy")
    assert np.array_equal(a, np.load("b.npy")) and a.std() > 10
    model = mg.load(name, device="cpu")
    assert np.array_equal(model.to_uint8(model.sample(3, seed=1)).numpy(), a)


def test_the_digits_are_recognised():
    model = mg.load("digits", device="cpu")
    shares = fit_recogniser(mg.data.load("digits", size=8, channels=1)).shares(
        model.to_uint8(model.sample(100, seed=0)).numpy()
    )
    assert sum(shares.values()) > 0.45


def test_a_name_stands_for_a_run(mgebm):
    mg.pictures.save_png("digit.png", np.zeros((8, 8), np.uint8))
    for arguments in (
        ["evaluate", "digits", "--num", 20, "--json"],
        ["score", "digits", "digit.png"],
        ["inpaint", "digits", "--num", 4, "--out", "filled.png"],
        ["export", "digits", "digits.safetensors", "--to", "state-dict"],
        ["report", "digits", "--out", "page.html"],
        ["train", "--from", "digits", "--set", "steps=1", "--out", "on"],
    ):
        result = mgebm(*arguments)
        assert result.exit_code == 0, result.output
    assert Run("on").config.start_from == "builtin:digits"
    assert Run("digits").config.data == "digits"


def test_what_lies_here_comes_first(mgebm, trained):
    shutil.copytree(trained, "digits")
    assert Run("digits").config.steps == 2 and mg.load("digits").origin.config.steps == 2
    assert Run("builtin:digits").config.steps > 2 and mg.load("builtin:digits").origin.config.steps > 2


def test_the_nearest_name_is_given(mgebm):
    result = mgebm("sample", "digit")
    assert result.exit_code == 2 and "digit does not exist" in result.output and "'digits'" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_names())
def test_the_figures_are_those_of_the_weights_that_ship(name):
    model, run = mg.load(name, device="cpu"), Run(name)
    card = (run.path / "README.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"^\| fid_matched \| (\S+) \|$", card, re.MULTILINE)
    found = mg.evaluation.evaluate(model, run.data("train"), run.data("held_out"), num=1000, seed=0)
    assert found["fid_matched"] == pytest.approx(float(written), rel=0.1)
