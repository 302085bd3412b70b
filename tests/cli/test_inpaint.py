"""`mgebm inpaint`: its figures, its files, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers.console import one_line
from PIL import Image

from mgebm_fast import data
from mgebm_fast.evaluation.inpainting import inpaint, length_images, pick_length
from mgebm_fast.models import Model
from mgebm_fast.models.occlusions import occlusion


def figures(result):
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


@pytest.mark.parametrize("kind", ["square", "doodle", "pepper"])
def test_json_is_one_object_and_writes_nothing(mgebm, trained, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    found = figures(mgebm("inpaint", trained, "--mask", kind, "--num", 20, "--json"))
    assert found["mask"] == kind and found["num"] == 20 and found["data"] == "digits"
    assert 0 < found["error"] < 1 and 0 < found["error_mean_fill"] < 1
    assert 0 < found["psnr"] < 60 and found["error_std"] > 0
    assert found["occluded_share"] == pytest.approx(0.6 if kind == "pepper" else 0.25, abs=0.02)
    assert list(tmp_path.iterdir()) == []


def test_known_pixels_are_in_the_array(mgebm, trained, tmp_path):
    out = tmp_path / "deep" / "x.npy"
    assert mgebm("inpaint", trained, "--num", 12, "--seed", 3, "--out", out).exit_code == 0
    completed = np.load(out)
    held_out = data.load("digits", size=8, channels=1, split="held_out").images
    hidden = np.broadcast_to(occlusion("square", 12, 8, seed=3).numpy(), completed.shape)
    for image, mask in zip(completed, hidden, strict=True):
        assert any(np.array_equal(image[~mask], original[~mask]) for original in held_out)
    # the same seed gives the same, another seed other images
    for name, seed in (("y", 3), ("z", 4)):
        mgebm("inpaint", trained, "--num", 12, "--seed", seed, "--out", tmp_path / f"{name}.npy")
    assert np.array_equal(np.load(tmp_path / "y.npy"), completed)
    assert not np.array_equal(np.load(tmp_path / "z.npy"), completed)


def test_the_picture_has_its_place_and_people_get_a_table(mgebm, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mgebm("inpaint", trained, "--num", 20)
    assert result.exit_code == 0 and "PSNR" in result.stdout and "mean fill" in result.stdout
    picture = np.asarray(Image.open(tmp_path / "inpainted.png").convert("RGB"))
    assert picture.shape[1] > 16 * 40 and picture.shape[0] > 3 * 40


def test_a_mask_of_ones_own(mgebm, trained, tmp_path):
    values = np.zeros((8, 8), bool)
    values[:, 4:] = True
    np.save(tmp_path / "right.npy", values)
    found = figures(mgebm("inpaint", trained, "--mask", tmp_path / "right.npy", "--num", 5, "--json"))
    assert found["occluded_share"] == 0.5
    np.save(tmp_path / "three.npy", np.stack([values] * 3))
    call = ("inpaint", trained, "--mask", tmp_path / "three.npy", "--json", "--num")
    assert "one for each of the 5 images, got 3" in one_line(mgebm(*call, 5))
    assert figures(mgebm(*call, 3))["num"] == 3


def test_more_images_than_are_held_out_is_a_note(mgebm, trained):
    found = figures(mgebm("inpaint", trained, "--num", 1000, "--json"))
    assert found["num"] == 360 and found["notes"] == ["only 360 held-out images"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mask", "doddle"], "did you mean 'doodle'"),
        (["--out", "x.jpg"], "must end in .png or .npy"),
        (["--out", "folder"], "must end in .png or .npy"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_line(mgebm, trained, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in one_line(mgebm("inpaint", trained, *options))
    assert list(tmp_path.iterdir()) == []


def test_a_model_file_alone_needs_data(mgebm, trained, tmp_path):
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((trained / "model.safetensors").read_bytes())
    assert "--data" in one_line(mgebm("inpaint", alone, "--json"))
    assert figures(mgebm("inpaint", alone, "--json", "--num", 4, "--data", "digits"))["num"] == 4
    assert "does not exist" in one_line(mgebm("inpaint", tmp_path / "no_run", "--json"))


def test_the_length_is_picked_on_training_images(mgebm, trained):
    call = ("inpaint", trained, "--mask", "doodle", "--num", 12, "--seed", 3, "--threads", 1, "--json")
    found = figures(mgebm(*call))
    model = Model.load(trained)
    training, held_out = (data.load("digits", size=8, channels=1, split=split) for split in ("train", "held_out"))
    picked = pick_length(model, length_images(training, 3), "doodle", seed=3)
    assert found["length"] == picked.length and found["length_images"] == 64
    assert found["length_errors"] == pytest.approx({f"{k:g}": v for k, v in picked.errors.items()}, rel=1e-6)
    images = held_out.batch(np.random.default_rng(3).permutation(len(held_out))[:12])
    mask = occlusion("doodle", 12, 8, seed=3)
    for length in (picked.length, 0.5, 2.0):
        given = found if length == picked.length else figures(mgebm(*call, "--length", length))
        assert given["length"] == length and (length == picked.length or given["length_errors"] == {})
        expected = inpaint(model, images, mask, seed=3, length=length).figures()
        assert given["error"] == pytest.approx(expected["error"], rel=1e-6)
    assert figures(mgebm(*call)) == figures(mgebm(*call, "--length", "auto")) == found
    assert "training images (--length 1 does not)" in mgebm(*call).stderr


def test_the_table_says_the_length(mgebm, trained, tmp_path):
    result = mgebm("inpaint", trained, "--num", 5, "--out", tmp_path / "a.png")
    words = " ".join(result.stdout.split())
    assert "as long as a sample's, picked on 64 training images by error (0.25: 0." in words
    result = mgebm("inpaint", trained, "--num", 5, "--length", "0.5", "--out", tmp_path / "b.png")
    assert "chains 0.5 × as long as a sample's" in " ".join(result.stdout.split()) and "picked" not in result.stdout


def test_without_training_images_the_length_is_that_of_a_sample(mgebm, run):
    config = run / "config.toml"
    config.write_text(config.read_text().replace('data = "digits"', 'data = "/gone/images.zip"'))
    call = ("inpaint", run, "--num", 4, "--data", "texture:brick", "--json")
    found = figures(mgebm(*call))
    assert found["length"] == 1 and found["length_images"] == 0 and "/gone/images.zip" in found["notes"][0]
    message = one_line(mgebm(*call, "--length", "auto"))
    assert "--length: auto must have images that" in message and "/gone/images.zip" in message


@pytest.mark.parametrize("length", ["0", "-1", "nan", "inf", "long"])
def test_a_length_is_auto_or_a_number(mgebm, trained, length):
    message = one_line(mgebm("inpaint", trained, f"--length={length}", "--json"))
    assert f"--length: must be auto or a finite number > 0, got '{length}'" in message


def test_a_length_past_the_noise_counter_is_refused_by_its_name(mgebm, trained):
    assert "--length: must leave every chain fewer than 2**32 steps" in one_line(
        mgebm("inpaint", trained, "--length=1e10", "--json")
    )


def test_help_has_an_example(mgebm):
    result = mgebm("inpaint", "--help")
    assert result.exit_code == 0 and "  mgebm inpaint runs/" in result.stdout
