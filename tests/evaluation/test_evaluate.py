from __future__ import annotations

import importlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import mgebm_fast as mg
from mgebm_fast import data, evaluation
from mgebm_fast.data import ImageData
from mgebm_fast.evaluation import evaluate as run
from mgebm_fast.evaluation import features, format_report
from mgebm_fast.evaluation.report import _class_table

COMMON = {"num", "num_real", "feature_space", "notes", "seconds", "fid_matched"}
TWINS = ["kid", "fid", "precision", "recall", "nearest_distance"]
LABELLED = ["confident_share", "class_shares"]


@pytest.fixture(autouse=True, scope="module")
def short_training():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.feature_space, "__kwdefaults__", {"seed": 0, "visits": 1_500})
        yield


class Drawn:
    """A stand-in model: pictures from a function of (n, generator), passed through a value range of -1 … 1."""

    def __init__(self, draw):
        self.draw = draw

    def sample(self, n: int, *, seed: int) -> torch.Tensor:
        return torch.from_numpy(self.draw(n, np.random.default_rng(seed))).float() / 127.5 - 1

    def to_uint8(self, x: torch.Tensor) -> torch.Tensor:
        return ((x + 1) * 127.5).round().to(torch.uint8)


def noise_of(part: ImageData) -> Drawn:
    return Drawn(lambda n, r: r.integers(0, 256, (n, *part.images.shape[1:])))


def replay(part: ImageData) -> Drawn:
    return Drawn(lambda n, r: part.images[np.arange(n) % len(part)])


@pytest.fixture(scope="module")
def digits() -> tuple[ImageData, ImageData]:
    return tuple(data.load("digits", size=8, channels=1, split=split) for split in ("train", "held_out"))


@pytest.fixture(scope="module")
def judges(digits, short_training) -> evaluation.Judges:
    return evaluation.fit_judges(*digits, progress=False)


def test_real_images_score_as_held_out_ones(digits, judges):
    train, held_out = digits
    result = run(replay(held_out), train, held_out, num=360, judges=judges, progress=False)
    for key in TWINS + LABELLED:
        assert result[key] == result[f"{key}_real"], key
    assert result["num_real"] == 360 and result["fid_matched"] == result["fid"]
    assert 0.78 <= result["confident_share"] <= 0.90


def test_noise_is_far_worse_than_held_out_images(digits, judges):
    train, held_out = digits
    result = run(noise_of(train), train, held_out, num=400, judges=judges, progress=False)
    assert set(result) == COMMON | {k + s for k in TWINS + LABELLED for s in ("", "_real")} | {
        "confident_share_noise",
        "recogniser",
    }
    assert (result["num"], result["num_real"]) == (400, 360), "fewer real images than samples: all of them"
    assert any("only 360 held-out images" in note for note in result["notes"])
    assert result["fid"] > 10 * result["fid_real"]
    assert result["kid"] > 0.1 > abs(result["kid_real"])
    assert result["nearest_distance"] > 2 * result["nearest_distance_real"]
    assert result["confident_share"] <= 0.02 and result["confident_share_noise"] <= 0.02
    assert set(result["class_shares"]) == {str(k) for k in range(10)}
    assert sum(result["class_shares_real"].values()) == pytest.approx(result["confident_share_real"])
    json.dumps(result, allow_nan=False)

    console = Console(width=160, file=io.StringIO())
    console.print(format_report(result))
    text = console.file.getvalue()
    for shown in ("FID, matched", "nearest distance", f"{result['confident_share_real']:.3f}", "feature", "only 360"):
        assert shown in text


def test_copies_of_the_training_images_show_as_such(digits, judges):
    train, held_out = digits
    result = run(replay(train), train, held_out, num=50, judges=judges, progress=False)
    assert result["nearest_distance"] == 0 < result["nearest_distance_real"]
    assert result["num_real"] == 50


def test_one_seed_one_result(digits):
    train, held_out = (part.subset(slice(0, 150)) for part in digits)
    model = Drawn(lambda n, r: train.images[r.integers(0, len(train), n)])
    first, again, other = (
        {**run(model, train, held_out, num=60, seed=seed, progress=False), "seconds": None} for seed in (1, 1, 2)
    )
    assert first == again
    assert first["kid"] != other["kid"]


def test_unlabelled_colour_images(digits):
    photos = data.load("lfw", size=24, channels=3, split="all")
    train, held_out = photos.subset(slice(0, 70)), photos.subset(slice(70, 100))
    result = run(noise_of(train), train, held_out, num=40, features="classifier", progress=False)
    assert set(result) == COMMON | {k + s for k in TWINS for s in ("", "_real")}
    assert any("the data have no labels" in note for note in result["notes"])
    assert any("30 images in 64 dimensions" in note for note in result["notes"])
    assert "rotation classifier" in result["feature_space"]
    assert result["fid_matched"] > result["fid_real"]
    Console(file=io.StringIO()).print(format_report(result))


def test_a_single_class_is_judged_without_recognition(digits):
    train, held_out = (part.subset(np.flatnonzero(part.labels == 3)) for part in digits)
    result = run(replay(held_out), train, held_out, num=30, progress=False)
    assert "confident_share" not in result and "class_shares" not in result
    assert any("a single class" in note for note in result["notes"])


def test_nothing_held_out_gives_nulls(digits, judges):
    train = digits[0]
    result = run(replay(train), train, train.subset([]), num=20, judges=judges, progress=False)
    for key in [*TWINS, *LABELLED]:
        assert result[f"{key}_real"] is None, key
    assert result["num_real"] == 0 and result["fid_matched"] is None
    json.dumps(result, allow_nan=False)
    Console(file=io.StringIO()).print(format_report(result))


def test_progress_stays_off_standard_output(digits, capsys):
    train, held_out = (part.subset(slice(0, 60)) for part in digits)
    run(replay(held_out), train, held_out, num=20, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num": 1}, "num must be at least 2, got 1"),
        ({"held_out": ImageData(np.zeros((3, 1, 4, 4), np.uint8))}, r"held_out must have images .*got \(1, 4, 4\)"),
        ({"train": ImageData(np.zeros((0, 1, 8, 8), np.uint8))}, "train must have at least 2 images, got 0"),
        (
            {"model": Drawn(lambda n, r: np.zeros((n, 3, 8, 8)))},
            r"model must draw uint8 images of shape \(20, 1, 8, 8\)",
        ),
    ],
)
def test_wrong_arguments_are_named(digits, change, message):
    train, held_out = digits
    arguments = {"model": replay(train), "train": train, "held_out": held_out, "num": 20, "progress": False} | change
    with pytest.raises(ValueError, match=f"evaluate: {message}"):
        run(**arguments)


def constant(count: int, value: int = 7) -> ImageData:
    return ImageData(np.full((count, 1, 8, 8), value, np.uint8), name="grey")


def test_equal_training_images_are_refused(digits):
    """Their features all are the same: FID came out as 7e22."""
    with pytest.raises(ValueError, match="evaluate: train must have images that differ, got 30 equal ones of grey"):
        run(replay(digits[1]), constant(30), constant(10), num=20, progress=False)


def test_equal_samples_are_measured_and_noted(digits, judges):
    result = run(replay(constant(1)), *digits, num=40, judges=judges, progress=False)
    assert "all samples are the same image" in result["notes"]
    assert result["kid_real"] + 0.3 < result["kid"] < 1e3


def test_features_that_see_all_images_alike_give_no_distance(digits, judges):
    blind = replace(judges, reference=torch.ones_like(judges.reference))
    result = run(replay(digits[1]), *digits, num=40, judges=blind, progress=False)
    assert result["kid"] is result["fid"] is result["fid_matched"] is None
    assert any("does not tell the training images apart" in note for note in result["notes"])
    format_report(result)


def test_class_names_come_from_the_data(digits):
    names = tuple(f"digit {k}" for k in range(10))
    train, held_out = (replace(part, class_names=names) for part in digits)
    result = run(replay(held_out), train, held_out, num=20, progress=False)
    assert tuple(result["class_shares"]) == names


@pytest.mark.parametrize("device, expected", [(None, "meta"), ("cpu", "cpu")])
def test_judges_are_fitted_where_the_model_is_or_moved_to(digits, judges, monkeypatch, device, expected):
    train, held_out = digits
    drawn, places = replay(held_out), []

    class Model(torch.nn.Module):
        sample, to_uint8 = staticmethod(drawn.sample), staticmethod(drawn.to_uint8)

    model = Model()
    model.register_buffer("weight", torch.zeros(2, device="meta"))
    monkeypatch.setattr(Model, "to", lambda self, device: self)
    module = importlib.import_module("mgebm_fast.evaluation.evaluate")
    monkeypatch.setattr(module, "fit_judges", lambda *_, device, **__: places.append(str(device)) or judges)
    run(model, train, held_out.subset(slice(0, 40)), num=20, device=device, progress=False)
    assert places == [expected]


@pytest.mark.parametrize("share, bar", [(0.001, 0), (0.25, 15), (0.5, 30), (0.9, 30)])
def test_bars_of_classes_are_as_long_as_their_shares(share, bar):
    """The whole length is half of all samples, of two classes, or more: next to nothing has no bar."""
    table = _class_table({"class_shares": {"even": share, "odd": 0.0}, "class_shares_real": None})
    assert [len(cell) for cell in table.columns[3].cells] == [bar, 0]


@pytest.mark.parametrize(
    ("unlabelled", "classes"),
    [((0,), "0123456789"), ((1,), "0123456789"), ((0, 1), "0123456789"), ((), "abcdefghij")],
    ids=["training", "held out", "both", "other classes"],
)
def test_figures_by_class_need_labels_of_the_classes(digits, judges, unlabelled, classes):
    train, held_out = (replace(part, labels=None) if i in unlabelled else part for i, part in enumerate(digits))
    judges = replace(judges, names=[]) if 0 in unlabelled else judges
    model = mg.MultiGrid(
        (1, 8), classes=tuple(classes), channels=1, width=0.1, variant="compact", norm="none",
        value_range=(-1.0, 1.0), langevin=mg.Langevin(1, drift=0.1, noise_std=0.1),
    )  # fmt: skip
    model.set_colours(torch.zeros(10, 1), torch.arange(10))
    found = evaluation.evaluate(model, train, held_out, num=20, judges=judges, progress=False)
    assert found["class_kid"] is found["class_kid_real"] is None and "class_agreement" not in found
    words = "class_kid, class_agreement and class_accuracy left out: not all images have labels among the model's "
    assert words in " ".join(found["notes"]) and found["kid"] is not None
