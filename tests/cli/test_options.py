"""The images of a run, or of `--data`, as the commands that measure a run take them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.console import one_line
from PIL import Image

import mgebm_fast as mg
from mgebm_fast.cli.inpaint import _training_images
from mgebm_fast.cli.options import images_of
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


def test_warnings_are_lines_like_others_and_a_runs_folder_in_a_configurations_place_is_told_what_it_is(mgebm, tmp_path):
    folder, out = pictures(tmp_path / "set", [f"{i:03d}.png" for i in range(40)], 0), tmp_path / "my run"
    (folder / "photograph.cr2").write_bytes(b"raw")
    result = mgebm("train", "digits", *TINY, "--data", folder, "--out", out)
    assert result.exit_code == 0
    lines = [line for line in result.stderr.splitlines() if "passed over" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: ") and "cr2" in lines[0]
    assert "UserWarning" not in result.stderr and "warnings.warn" not in result.stderr
    result = mgebm("train", out)
    words = one_line(result)
    assert f"--out '{out}' --resume" in words and f"'{out}'/config.toml begins another" in words


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


def test_a_run_s_own_images_are_divided_as_they_were_wherever_they_lie_now(mgebm, tmp_path):
    """And so that none that was learnt from is measured on."""
    out, moved = tmp_path / "run", tmp_path / "moved"
    folder = pictures(tmp_path / "set", [f"{i:03d}.png" for i in range(60)], 0)
    assert mgebm("train", "digits", *TINY, "--data", folder, "--out", out).exit_code == 0
    pictures(folder.rename(moved), ["009_new.png"], 100)
    (moved / Run(out).fingerprint()["names"][0]).unlink()
    model, config = mg.load(out), Run(out).config
    part = images_of(out, model, config, str(moved))
    own = Run(out).fingerprint()["held_out"]
    assert len(part(split="train")) == 53 and part(split="held_out").names == tuple(own)
    assert len(_training_images(out, model, config, 0, str(moved))[0]) == 53
    result = mgebm("evaluate", out, "--num", 8, "--json", "--record", "--data", moved)
    assert figures(result)["num_real"] == 6
    assert "moved: not what the run learnt from: of 60 images 1 removed" in result.stderr
    assert len(Run(out).evaluations()) == 1
    scored = figures(mgebm("score", out, moved, "--split", "held_out", "--data", moved, "--json"))["sets"][0]
    assert {one["name"] for one in scored["images"]} == set(own)


def test_other_images_of_the_same_names_are_not_the_run_s_own(mgebm, tmp_path):
    names = [f"{i:03d}.png" for i in range(60)]
    out, other = tmp_path / "run", pictures(tmp_path / "other", [*names, "new.png"], 100)
    assert mgebm("train", "digits", *TINY, "--data", pictures(tmp_path / "set", names, 0), "--out", out).exit_code == 0
    assert images_of(out, mg.load(out), Run(out).config, str(other)).keywords["like"] is None
    assert "--record: must be left out" in one_line(mgebm("evaluate", out, "--num", 8, "--record", "--data", other))


def test_data_that_are_gone_are_not_blamed_on_an_option(mgebm, tmp_path):
    out = tmp_path / "run"
    folder = pictures(tmp_path / "set", [f"{i:03d}.png" for i in range(20)], 0)
    assert mgebm("train", "digits", *TINY, "--data", folder, "--out", out).exit_code == 0
    folder.rename(tmp_path / "moved")
    line = f"error: data of {out}: {folder} is not there any more; --data PLACE says where it is now"
    drawn = ("report", out, "--out", tmp_path / "x.png")
    for call in (("train", "--out", out, "--resume"), ("evaluate", out), ("classify", out), ("inpaint", out), drawn):
        assert one_line(mgebm(*call)).endswith(line), call
    assert mgebm(*drawn, "--data", tmp_path / "moved").exit_code == 0
    call = ("train", "--out", out, "--resume", "--set", "steps=3", "--data", tmp_path / "moved")
    assert mgebm(*call).exit_code == 0
