"""Loggers: what a service is called with, as runs begin, go back and go on, and what is said where it is missing."""

from __future__ import annotations

import sys
import types

import pytest

from mgebm_fast.errors import ConfigError
from mgebm_fast.learning.run import loggers, records


def fake(calls: list) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        init=lambda **options: calls.append(("init", options)) or object(),
        log=lambda values, step: calls.append(("log", values, step)),
        finish=lambda: calls.append(("finish",)),
    )


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_every_record_of_a_run_that_goes_back_and_on(name, tmp_path, monkeypatch):
    calls: list = []
    monkeypatch.setitem(sys.modules, name, fake(calls))
    folder = tmp_path / "mine"
    folder.mkdir()
    recorder = records.Recorder(folder, 0, logger=loggers.logger(name))
    recorder.add(1, {"loss": 0.5})
    recorder.add(2, {"loss": 0.25})
    recorder.rewind(1, 0)
    recorder.synchronise()
    recorder.add(2, {"loss": 0.125})
    recorder.close()
    kinds = [call[0] for call in calls]
    assert kinds == ["init", "log", "log", "finish", "init", "log", "finish"]
    assert [call[1:] for call in calls if call[0] == "log"] == [
        ({"loss": v}, s) for v, s in ((0.5, 1), (0.25, 2), (0.125, 2))
    ]
    begun = [call[1] for call in calls if call[0] == "init"]
    assert [options["name"] for options in begun] == ["mine", "mine from 1"]
    assert all(options["project"] == "mgebm_fast" for options in begun)
    assert [options.get("dir") for options in begun] == [str(folder) if name == "wandb" else None] * 2
    assert [record["loss"] for record in records.read(folder / records.METRICS)] == [0.5, 0.125]
    assert not (folder / "tensorboard").exists()


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match=r"--logger: trackio must be installed \(pip install trackio\), got "):
        loggers.logger("trackio")


def test_a_name_that_is_none_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="--logger must be one of tensorboard, wandb, trackio, got 'wandbb' .did you"):
        loggers.logger("wandbb")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_service_that_fails_ends_no_run(broken, tmp_path, monkeypatch):
    calls: list = []

    def fail(*arguments, **options):
        raise ConnectionError("no network " * 50)

    service = fake(calls)
    setattr(service, broken, fail)
    monkeypatch.setitem(sys.modules, "wandb", service)
    with pytest.warns(
        UserWarning, match="--logger: wandb failed and is left out from here on: ConnectionError"
    ) as said:
        recorder = records.Recorder(tmp_path, 0, logger=loggers.logger("wandb"))
        recorder.add(1, {"loss": 0.5})
        recorder.add(2, {"loss": 0.25})
        recorder.close()
    assert len(said) == 1 and len(str(said[0].message)) < 300
    assert [record["loss"] for record in records.read(tmp_path / records.METRICS)] == [0.5, 0.25]
    assert [call[0] for call in calls] == {"init": [], "log": ["init"], "finish": ["init", "log", "log"]}[broken]
