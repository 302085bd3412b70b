"""Tiny runs, made once, and a way to call the command line in this process."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mgebm_fast.cli import app
from mgebm_fast.data import ImageData
from mgebm_fast.evaluation import Judges, features
from mgebm_fast.evaluation.comparison import compare

TINY = ["--set", "steps=2", "--set", "langevin.steps=2", "--set", "batch_size=32", "--set", "width=0.1"]


@pytest.fixture(autouse=True, scope="session")
def short_training():
    """Of the classifiers whose features KID and FID compare; those of the same images and settings are fitted once."""
    evaluate = importlib.import_module("mgebm_fast.evaluation.evaluate")  # the package has a function of that name
    fit, fitted = evaluate.fit_judges, {}

    def judges(train: ImageData, held_out: ImageData, **settings: object) -> Judges:
        shortened = features.feature_space.__kwdefaults__  # which tests shorten further
        key = str([train.fingerprint(), held_out.fingerprint(), settings, shortened, torch.get_num_threads()])
        if key not in fitted:
            fitted[key] = fit(train, held_out, **settings)
        return fitted[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.feature_space, "__kwdefaults__", {"seed": 0, "visits": 640})
        for module in (evaluate, compare):
            patch.setattr(module, "fit_judges", judges)
        yield


@pytest.fixture(scope="session")
def mgebm() -> Callable[..., Result]:
    def call(*arguments: object) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return call


def train_tiny(mgebm: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory, setting: str) -> Path:
    """A run of two updates of small nets on digits, with one more setting."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    result = mgebm("train", "digits", *TINY, "--set", setting, "--out", out)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def trained(mgebm: Callable[..., Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates; tests that write use `run`, a copy."""
    return train_tiny(mgebm, tmp_path_factory, "checkpoint_every=1")


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "digits"))
