"""The images of a run, or of `--data`, as the commands that measure a run take them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import mgebm_fast as mg
from mgebm_fast.cli.inpaint import _training_images
from mgebm_fast.learning import Run

from .conftest import TINY, train_tiny


def pictures(folder, names, seed):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        seed += 1
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return folder


def figures(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_images_added_later_leave_the_held_out_ones_out_of_the_choice_of_a_length(mgebm, tmp_path):
    folder = pictures(tmp_path / "set", [f"{i:03d}.png" for i in range(60)], 0)
    out = tmp_path / "run"
    assert mgebm("train", "digits", *TINY, "--data", folder, "--out", out).exit_code == 0
    held_out = mg.data.load(folder, size=8, channels=1, split="held_out", like=Run(out).fingerprint()).images
    assert len(held_out) == 6
    pictures(folder, [f"{i:03d}_new.png" for i in range(30)], 100)
    pool, why = _training_images(out, mg.load(out), Run(out).config, 0)
    assert not why and len(pool) == 54
    assert not {image.tobytes() for image in held_out} & {image.tobytes() for image in pool.images}


@pytest.fixture(scope="module")
def threes(mgebm, tmp_path_factory):
    return train_tiny(mgebm, tmp_path_factory, "classes=3")


def test_other_data_need_not_have_the_classes_of_a_run(mgebm, threes, tmp_path):
    letters = pictures(tmp_path / "letters", [f"{name}/{i}.png" for name in "ab" for i in range(20)], 7)
    words = f"{letters}: all its images, it has not the classes of the run (3)"
    calls = [
        ("evaluate", threes, "--num", 8), ("score", threes, letters), ("inpaint", threes, "--length", 1),
        ("classify", threes, "--labels", 2, "--draws", 1),
    ]  # fmt: skip
    for call in calls:
        result = mgebm(*call, "--data", letters, "--json")
        figures(result)
        assert words in result.stderr, call


def test_classes_are_taken_of_the_run_s_own_data_and_of_others_that_have_them(mgebm, threes, tmp_path):
    own = figures(mgebm("score", threes, "digits", "--json"))
    assert own["training"]["num"] == 146
    mixed = pictures(tmp_path / "mixed", [f"{name}/{i}.png" for name in "23" for i in range(20)], 7)
    result = mgebm("score", threes, "digits", "--data", mixed, "--json")
    assert figures(result)["training"]["num"] == 18 and "all its images" not in result.stderr
