"""`mgebm` on runs with a generator: samples by it alone, rows between samples, in-painting, and what makes no sense."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from mgebm_fast.cli import app

SMALL = ["--set", "steps=2", "--set", "batch_size=32", "--set", "width=0.1", "--set", "langevin.steps=3"]


def mgebm(*arguments, ends=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == ends, result.output
    return result


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("digits-cooperative", "digits-abp", "digits-cd"):
        mgebm("train", name, *SMALL, "--out", folder / name.partition("-")[2])
    return folder


def drawn(runs, name, out, *options):
    mgebm("sample", runs / name, "--seed", 3, "--out", out, *options)
    return np.load(out)


@pytest.mark.parametrize("name", ["cooperative", "abp"])
def test_samples_by_the_generator_alone(runs, tmp_path, name):
    alone = drawn(runs, name, tmp_path / "alone.npy", "--num", 5, "--generator")
    samples = drawn(runs, name, tmp_path / "samples.npy", "--num", 5)
    assert alone.shape == samples.shape == (5, 1, 8, 8)
    assert np.array_equal(alone, samples) == (name == "abp")  # a descriptor's chain moves what it is given
    later = drawn(runs, name, tmp_path / "later.npy", "--num", 2, "--generator", "--first-sample", 3)
    assert np.abs(later.astype(int) - alone[3:]).max() <= 1


def test_steps_are_of_chains_alone(runs, tmp_path):
    few, many = (drawn(runs, "cooperative", tmp_path / f"{k}.npy", "--num", 3, "--steps", k) for k in (3, 9))
    assert np.array_equal(few, drawn(runs, "cooperative", tmp_path / "own.npy", "--num", 3)) and (few != many).any()
    refused = mgebm("sample", runs / "abp", "--steps", 9, "--out", tmp_path / "x.png", ends=2)
    words = " ".join(refused.stderr.split())
    assert "--steps: must be left out for" in words and "a GeneratorModel without chains of images" in words


@pytest.mark.parametrize("name", ["cooperative", "abp"])
def test_rows_between_samples(runs, tmp_path, name):
    rows = drawn(runs, name, tmp_path / "rows.npy", "--num", 2, "--interpolate", 5)
    alone = drawn(runs, name, tmp_path / "alone.npy", "--num", 4, "--generator")
    assert rows.shape == (10, 1, 8, 8)
    assert np.abs(rows[[0, 4, 5, 9]].astype(int) - alone).max() <= 1
    second = drawn(runs, name, tmp_path / "second.npy", "--num", 1, "--interpolate", 5, "--first-sample", 1)
    assert np.abs(second.astype(int) - rows[5:]).max() <= 1
    mgebm("sample", runs / name, "--num", 2, "--interpolate", 5, "--out", tmp_path / "rows.png")
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.size == (5 * 42 + 2, 2 * 42 + 2)  # a row for each pair, cells of 40 and gaps of 2


@pytest.mark.parametrize("name", ["cooperative", "abp"])
def test_known_pixels_are_explained_and_kept(runs, tmp_path, name):
    result = mgebm("inpaint", runs / name, "--num", 4, "--length", 1, "--out", tmp_path / "filled.png", "--json")
    figures = json.loads(result.stdout)
    assert figures["num"] == 4 and 0 < figures["error"] < 1
    assert (tmp_path / "filled.png").is_file()


def test_a_descriptor_has_chains_to_diagnose(runs):
    result = mgebm("diagnose", runs / "cooperative", "--num", 4, "--steps", 8, "--json")
    assert json.loads(result.stdout)["chains"][0]["steps"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sample", "cd", "--generator"), "--generator: the run must have a generator"),
        (("sample", "cd", "--interpolate", 4), "--interpolate: the run must have a generator"),
        (("sample", "abp", "--interpolate", 4, "--grids"), "--grids: must be left out beside --interpolate"),
        (("sample", "cooperative", "--generator", "--steps", 3), "--steps: must be left out beside --generator"),
        (("sample", "abp", "--interpolate", 1), "greater than or equal to 2"),
        (("diagnose", "abp"), "must have chains to diagnose"),
    ],
)
def test_what_makes_no_sense_is_said(runs, tmp_path, arguments, message):
    command, name, *options = arguments
    result = mgebm(command, runs / name, *options, "--out", tmp_path / "x", ends=2)
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "x").exists()
