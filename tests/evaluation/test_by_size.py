"""KID by size: what chains that stay where they begin must give, labels of held-out images, and what is refused."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import mgebm_fast as mg
import mgebm_fast.sampling.cascade
from mgebm_fast import data, ops
from mgebm_fast.errors import Refused
from mgebm_fast.evaluation import by_size, evaluate_by_size, features, format_by_size
from mgebm_fast.evaluation.distances import kid
from mgebm_fast.models import SingleGrid

STILL = mg.Langevin(1, drift=1e-9, noise_std=0.0, clamp=(-1.0, 1.0))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", size=8, channels=1, split="train"), data.load(
        "digits", size=8, channels=1, split="held_out"
    )


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(features.feature_space, "__kwdefaults__", {"seed": 0, "visits": 512})


def still_model(train, **more):
    model = mg.MultiGrid(
        (1, 2, 4, 8), channels=1, width=0.1, variant="compact", norm="none", value_range=(-1.0, 1.0), langevin=STILL,
        batch_size=16, **more,
    )  # fmt: skip
    labels = {"labels": torch.from_numpy(train.labels)} if model.classes else {}
    model.set_colours(model.from_uint8(train.colours().round().to(torch.uint8)), **labels)
    return model


def test_chains_that_stay_are_the_enlarged_images_they_begin_at(digits):
    train, held_out = digits
    result = evaluate_by_size(still_model(train), train, held_out, num=50, features="classifier", progress=False)
    assert result["sizes"] == [4, 8] and result["num"] == 50
    assert {begin: set(sizes) for begin, sizes in result["kid"].items()} == {
        "1": {"4", "8"},
        "2": {"4", "8"},
        "4": {"8"},
    }
    chosen = np.sort(np.random.default_rng(0).permutation(len(held_out))[:50])
    space = features.feature_space("classifier", train, held_out, visits=512)
    reference = space.extract(train.images)
    for begin in (2, 4):
        small = ops.pyramid(torch.from_numpy(held_out.images[chosen]), [begin])[0].round()
        enlarged = small.to(torch.uint8).repeat_interleave(8 // begin, 2).repeat_interleave(8 // begin, 3)
        expected = kid(reference, space.extract(enlarged.numpy()), subset_size=50)
        assert result["kid"][str(begin)]["8"] == pytest.approx(expected, rel=1e-6, abs=1e-9)
    real = kid(reference, space.extract(held_out.images[chosen]), subset_size=50)
    assert result["kid_real"]["8"] == pytest.approx(real, rel=1e-6, abs=1e-9)
    assert result["kid"]["2"]["8"] > result["kid"]["4"]["8"] > result["kid_real"]["8"]
    assert f"trained on {train.name} train split (accuracy 0." in result["feature_space"]
    shown = io.StringIO()
    Console(file=shown, width=80).print(format_by_size(result))
    assert "held-out 4×4" in shown.getvalue() and f"{result['kid']['4']['8']:.3f}" in shown.getvalue()


def test_chains_of_class_conditional_models_hold_the_labels_of_held_out_images(digits, monkeypatch):
    train, held_out = digits
    model = still_model(train, classes=list(reversed(train.class_names)))
    starts = []
    monkeypatch.setattr(
        by_size, "cascade", lambda nets, sizes, dynamics, start, **rest: (
            starts.append((start, rest["mask"])) or mg.sampling.cascade.cascade(nets, sizes, dynamics, start, **rest)
        )
    )  # fmt: skip
    result = evaluate_by_size(model, train, held_out, num=20, features="classifier", progress=False)
    chosen = np.sort(np.random.default_rng(0).permutation(len(held_out))[:20])
    wanted = [model.classes.index(held_out.class_names[k]) for k in held_out.labels[chosen]]
    at_4 = torch.cat([start for start, _ in starts if start.shape[-1] == 4])
    assert at_4[:, 1:].amax((2, 3)).argmax(1).tolist() == wanted
    assert all(not mask[:, 1:].any() and mask[:, :1].all() for _, mask in starts)
    assert result["kid"]["4"]["8"] > result["kid_real"]["8"]


def test_what_has_no_sizes_or_labels_is_refused(digits):
    train, held_out = digits
    with pytest.raises(
        Refused, match="evaluate_by_size: model must be a MultiGrid with a size of at least 4, got 'Sing"
    ):
        evaluate_by_size(SingleGrid(8, channels=1, width=0.1), train, held_out)
    model = still_model(train, classes=["a", "b"] + [str(i) for i in range(2, 10)])
    with pytest.raises(Refused, match="held_out must have labels among the model's classes, a, b, 2, .*got 0, 1, 2"):
        evaluate_by_size(model, train, held_out, num=100, features="classifier")
    with pytest.raises(Refused, match="held_out must hold at least two images, got 1"):
        evaluate_by_size(still_model(train), train, held_out.subset([0]))


def test_a_size_whose_features_are_alike_is_left_out_with_a_note(digits, monkeypatch):
    train, held_out = digits
    make = features.feature_space

    def blind_at_4(kind, own, *rest, **options):
        space = make(kind, own, *rest, **options)
        return replace(space, extract=lambda x: torch.ones(len(x), 2).double()) if own.size == 4 else space

    monkeypatch.setattr(by_size, "feature_space", blind_at_4)
    result = evaluate_by_size(still_model(train), train, held_out, num=20, features="classifier", progress=False)
    assert result["kid_real"]["4"] is result["kid"]["1"]["4"] is result["kid"]["2"]["4"] is None
    assert "4" not in result["kid"]["4"] and None not in [of["8"] for of in result["kid"].values()]
    assert result["notes"] == ["KID at 4×4 left out: the feature space does not tell the training images apart"]
    Console(file=io.StringIO()).print(format_by_size(result))
