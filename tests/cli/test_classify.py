"""`mgebm classify`: its figures, its picture, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.console import one_line
from PIL import Image

from mgebm_fast.evaluation.few_labels import readout

from .conftest import TINY


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(
        readout.net_predictions, "__kwdefaults__", {**readout.net_predictions.__kwdefaults__, "steps": 3}
    )
    monkeypatch.setattr(readout, "WIDTHS", (0.1,))
    monkeypatch.setattr(readout, "PENALTIES", (10.0,))
    monkeypatch.setattr(readout, "INVERSE_STRENGTHS", (1.0,))


def test_json_is_one_object_and_the_picture_is_one(mgebm, trained, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep" / "curve.png"
    result = mgebm(
        "classify", trained, "--labels", "4,2", "--draws", 2, "--fine-tune", "--json", "--picture", out
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert (found["data"], found["num_train"], found["num_test"], found["classes"]) == ("digits", 1437, 360, 10)
    assert found["labels"] == [4, 2] and found["draws"] == 2
    kinds = [row["kind"] for row in found["contenders"]]
    assert kinds == ["learned", "fine-tuned", "supervised", "random", "pixels", "pixels"]
    for row in found["contenders"]:
        assert set(row["accuracy"]) == {"4", "2"}
        for figures in row["accuracy"].values():
            assert len(figures["draws"]) == 2
            assert all(value * 360 == pytest.approx(round(value * 360)) for value in figures["draws"])
    assert found["contenders"][-1]["accuracy"]["4"]["mean"] > 0.5  # pixels of digits tell them apart
    picture = np.asarray(Image.open(out).convert("RGB"))
    assert picture.shape == (500, 950, 3) and picture.std() > 5


def test_people_get_a_table(mgebm, trained):
    result = mgebm("classify", trained, "--labels", "2", "--draws", 1)
    assert result.exit_code == 0, result.output
    assert "2 a class" in result.stdout and "pixels" in result.stdout and "±" not in result.stdout.split("┃")[-1]


@pytest.mark.parametrize("labels", ["ten", "", "1", "5,5", "3,,4", "0,10", "2.5"])
def test_labels_are_whole_numbers(mgebm, trained, labels):
    assert f"--labels: must be different whole numbers of at least 2 with commas between them, got {labels!r}" in (
        one_line(mgebm("classify", trained, "--labels", labels))
    )


def test_more_labels_than_images_of_a_class(mgebm, trained):
    line = one_line(mgebm("classify", trained, "--labels", "10,200"))
    assert "--labels: must be at most 139" in line and "got 200 in digits" in line


def test_a_run_without_an_energy(mgebm, tmp_path):
    out = tmp_path / "abp"
    sets = ["--set", "steps=1", "--set", "abp.infer_steps=1", "--set", "batch_size=4", "--set", "abp.generator_width=4"]
    assert mgebm("train", "digits-abp", *sets, "--out", out).exit_code == 0
    line = one_line(mgebm("classify", out))
    assert f"run: must have an energy net whose features can be read, got {out}, a GeneratorModel" in line


@pytest.mark.parametrize(("preset", "kind"), [("chimes", "sounds"), ("fire", "videos")])
def test_sounds_and_videos(mgebm, tmp_path, preset, kind):
    size = "[64]" if preset == "chimes" else "[4, 8, 8]"
    sets = ["--set", "steps=1", "--set", "langevin.steps=1", "--set", f"spatial-temporal.size={size}"]
    sets += ["--set", "batch_size=2", "--set", "width=0.1", "--set", "spatial-temporal.layers=[[2, 3, 2]]"]
    result = mgebm("train", preset, *sets, "--out", tmp_path / "x")
    assert result.exit_code == 0, result.output
    line = one_line(mgebm("classify", tmp_path / "x"))
    assert f"run: must hold a model of images for `mgebm classify`, got {tmp_path / 'x'}, a model of {kind}" in line


def test_data_without_labels_or_with_one_class(mgebm, trained, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    line = one_line(mgebm("classify", trained, "--data", tmp_path / "x.npy", "--labels", 2))
    assert "must be labelled, with at least two classes, got no labels" in line
    for i, image in enumerate(images):
        path = tmp_path / "set" / "only" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    line = one_line(mgebm("classify", trained, "--data", tmp_path / "set", "--labels", 2))
    assert "at least two classes, got 1 in" in line


def test_runs_must_share_their_images(mgebm, trained, tmp_path):
    other = tmp_path / "faces"
    result = mgebm("train", "digits", *TINY, "--data", "texture:brick", "--out", other)
    assert result.exit_code == 0, result.output
    line = one_line(mgebm("classify", trained, other))
    assert "run: must all be of the same data, size, channels and classes, got digits 1x8x8" in line
    assert "run: must be given once" in one_line(mgebm("classify", trained, trained))


def test_a_model_file_needs_data_and_pictures_are_png_files(mgebm, trained, tmp_path):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((trained / "model.safetensors").read_bytes())
    assert "--data: must be given" in one_line(mgebm("classify", alone))
    assert "--picture: must end in .png" in one_line(mgebm("classify", trained, "--picture", tmp_path / "x.jpg"))
    (tmp_path / "x.png").mkdir()
    assert "--picture: must be a file, got the folder" in one_line(
        mgebm("classify", trained, "--picture", tmp_path / "x.png")
    )
