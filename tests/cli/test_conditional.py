"""Class-conditional runs in the commands: drawn by class, measured by class, refused where one energy is needed."""

from __future__ import annotations

import functools
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.console import one_line

import mgebm_fast as mg
from mgebm_fast import evaluation
from mgebm_fast.evaluation.comparison import compare as comparison
from mgebm_fast.evaluation.distances import kid
from mgebm_fast.learning import load_config, work

from .conftest import TINY, train_tiny


@pytest.fixture(scope="module")
def by_class(mgebm, tmp_path_factory):
    return train_tiny(mgebm, tmp_path_factory, "multigrid.conditional=true")


def test_classes_are_drawn_in_turn(mgebm, by_class, tmp_path):
    call = ("sample", by_class, "--class", "3", "--class", "8", "--num", 4, "--first-sample", 1)
    result = mgebm(*call, "--out", tmp_path / "x.npy")
    assert result.exit_code == 0, result.output
    model = mg.MultiGrid.load(by_class)
    x = model.sample(4, seed=0, first_sample=1, labels=torch.tensor([8, 3, 8, 3]))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), model.to_uint8(x).numpy())


def test_all_is_every_class(mgebm, by_class, tmp_path):
    assert mgebm("sample", by_class, "--class", "all", "--num", 12, "--out", tmp_path / "x.npy").exit_code == 0
    model = mg.MultiGrid.load(by_class)
    x = model.sample(12, seed=0, labels=torch.arange(12) % 10)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), model.to_uint8(x).numpy())


@pytest.mark.parametrize("name, words", [("seven", "must be one of 0, 1, 2"), ("", "must be one of 0, 1, 2")])
def test_a_class_that_there_is_not(mgebm, by_class, tmp_path, name, words):
    result = mgebm("sample", by_class, "--class", name, "--out", tmp_path / "x.png")
    assert words in one_line(result) and not list(tmp_path.iterdir())


def test_a_run_without_classes_and_an_export_are_refused(mgebm, trained, by_class, tmp_path):
    result = mgebm("sample", trained, "--class", "3", "--out", tmp_path / "x.png")
    assert "multigrid.conditional = true" in one_line(result)
    result = mgebm("export", by_class, "--to", "state-dict", tmp_path / "x.safetensors")
    assert "one energy for all images" in one_line(result)
    result = mgebm("classify", by_class)
    assert "a class-conditional MultiGrid" in one_line(result)
    assert not list(tmp_path.iterdir())


def test_training_from_a_run_needs_its_classes(mgebm, by_class, tmp_path):
    result = mgebm("train", "digits", *TINY, "--from", by_class, "--out", tmp_path / "on")
    assert "classes of a class-conditional model must be 0, 1, 2" in one_line(result) and "got none" in one_line(result)


def test_kid_by_class_is_the_mean_of_kids_of_one_class_each(by_class):
    model = mg.MultiGrid.load(by_class)
    train, held_out = (mg.data.load("digits", size=8, channels=1, split=split) for split in ("train", "held_out"))
    judges = evaluation.fit_judges(train, held_out, seed=0, progress=False)
    found = evaluation.evaluate(model, train, held_out, num=120, judges=judges, progress=False)
    labels, real_labels = model.draw_labels(120, seed=0).numpy(), held_out.labels
    chosen = np.sort(np.random.default_rng(0).permutation(len(held_out))[:120])
    sets = {
        "class_kid": (model.to_uint8(model.sample(120, seed=0)).numpy(), labels),
        "class_kid_real": (held_out.images[chosen], real_labels[chosen]),
    }
    for key, (images, classes) in sets.items():
        kids = []
        for k in range(10):
            reference, features = (
                judges.space.extract(x) for x in (train.images[train.labels == k], images[classes == k])
            )
            kids.append(kid(reference, features, subset_size=min(250, len(reference), len(features))))
        assert found[key] == pytest.approx(np.mean(kids), rel=1e-6), key


def test_evaluation_counts_classes(mgebm, by_class):
    found = json.loads(mgebm("evaluate", by_class, "--num", 60, "--json").stdout)
    model = mg.MultiGrid.load(by_class)
    held_out = mg.data.load("digits", size=8, channels=1, split="held_out")
    chosen = np.sort(np.random.default_rng(0).permutation(len(held_out))[:60])
    energies = model.class_energies(torch.from_numpy(held_out.images[chosen]))
    guesses = sum(energies.values()).argmin(1).numpy()
    assert found["class_accuracy"] == pytest.approx((guesses == held_out.labels[chosen]).mean())
    assert 0 <= found["class_agreement"] <= 0.5 < 0.9 < found["class_agreement_real"]


def test_inpainting_is_of_the_class_of_each_image(mgebm, by_class, tmp_path):
    call = ("inpaint", by_class, "--num", 12, "--json")
    found = json.loads(mgebm(*call).stdout)
    model = mg.MultiGrid.load(by_class)
    held_out = mg.data.load("digits", size=8, channels=1, split="held_out")
    chosen = np.random.default_rng(0).permutation(len(held_out))[:12]
    mask, labels = evaluation.occlusion("square", 12, 8), torch.from_numpy(held_out.labels[chosen])
    filled = evaluation.inpaint(model, held_out.batch(chosen), mask, labels=labels, length=found["length"])
    assert found["error"] == pytest.approx(filled.figures()["error"], rel=1e-9) and found["notes"] == []
    training = mg.data.load("digits", size=8, channels=1, split="train")
    rows = np.random.default_rng(0).permutation(len(training))[:64]
    of_training = torch.from_numpy(training.labels[rows])
    picked = evaluation.pick_length(model, training.batch(rows), "square", labels=of_training)
    assert found["length_errors"] == pytest.approx(picked.figures()["length_errors"], rel=1e-9)

    np.save(tmp_path / "bare.npy", held_out.images)
    shutil.copy(by_class / "model.safetensors", tmp_path)  # without its run, which names the classes to read
    alone = ("inpaint", tmp_path / "model.safetensors", "--data", tmp_path / "bare.npy", *call[2:], "--length", 1)
    bare = json.loads(mgebm(*alone).stdout)
    assert any("classes are drawn" in note for note in bare["notes"])


def test_threads_are_those_of_a_resumed_run(mgebm, tmp_path, monkeypatch):
    seen, module = [], importlib.import_module("mgebm_fast.learning.methods.work")  # the package has such a function
    monkeypatch.setattr(module, "threads_for", lambda model, size: seen.append((model.classes, size)) or 1)
    assert mgebm("train", "digits", *TINY, "--set", "multigrid.conditional=true", "--out", tmp_path).exit_code == 0
    assert mgebm("train", "--out", tmp_path, "--resume").exit_code == 0
    assert seen == [(tuple("0123456789"), 32)] * 2


def test_a_comparison_goes_on_with_them_and_counts_their_label_planes(mgebm, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "Settings", functools.partial(comparison.Settings, inpainted=8))
    preset, out = tmp_path / "dc.toml", tmp_path / "out"
    preset.write_text('name = "dc"\nbase = "digits"\n[multigrid]\nconditional = true\n')
    call = ["compare", "digits", preset, "--seeds", "0", *TINY, "--num", 20, "--threads", 1, "--json", "--no-picture"]
    first = mgebm(*call, "--out", out)
    assert first.exit_code == 0, first.output
    again = mgebm(*call, "--out", out)
    assert again.exit_code == 0, again.output
    assert "training" not in again.stderr and json.loads(again.stdout)["runs"] == json.loads(first.stdout)["runs"]
    of_digits, of_classes = (load_config(out / name / "seed-0" / "config.toml") for name in ("digits", "dc"))
    assert of_classes.classes == tuple("0123456789") and work(of_classes) > 1.1 * work(of_digits)
    filled = json.loads(mgebm("inpaint", out / "dc" / "seed-0", "--num", 8, "--threads", 1, "--json").stdout)
    assert json.loads(first.stdout)["runs"][1]["figures"]["square_error"] == pytest.approx(filled["error"], rel=1e-9)
    assert [run["work"] for run in json.loads(first.stdout)["runs"]] == [work(of_digits), work(of_classes)]

    monkeypatch.setattr(comparison, "measured", lambda entry, *_: json.loads(first.stdout)["runs"][0])
    long = [*call, "--set", "steps=8", "--equal-work", "--out", tmp_path / "equal"]
    assert mgebm(*long).exit_code == 0
    equal = load_config(tmp_path / "equal" / "dc" / "seed-0" / "config.toml")
    assert equal.steps < 8 and work(equal) == pytest.approx(4 * work(of_digits), rel=0.5 / equal.steps)
