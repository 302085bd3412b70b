"""A run that was stopped, killed or damaged, and went on, equals one that never was: every bit of every file."""

from __future__ import annotations

import dataclasses
import functools
import io
import random
import signal
import time

import pytest
import torch
from helpers import forked
from helpers.runs import same_files, same_run
from helpers.training import tiny_config, tiny_data
from rich.console import Console

from mgebm_fast.errors import CheckpointError, ConfigError
from mgebm_fast.learning import Run, train
from mgebm_fast.learning.run import checkpoint, records
from mgebm_fast.learning.run.resuming import check_same_run

VARIANTS = {
    "adam": {"stabilise": {"ema": 0.9, "data_noise": 0.03, "noise_anneal": 0.3}, "flips": True, "spectral_norm": True,
             "optimiser": {"schedule": "cosine"}},
    "residual": {"variant": "residual", "depth": 1, "spectral_norm": True, "langevin": {"steps": 16}},
    "sgd, batch": {"norm": "batch", "optimiser": {"name": "sgd", "momentum": 0.9, "grad_rescale_max": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_the_uninterrupted(trainer, tmp_path, variant):
    changes = VARIANTS[variant]
    trainer(out=tmp_path / "a", **changes).fit()
    trainer(out=tmp_path / "b", **changes).fit(4)  # checkpoints at 2 and 4
    went_on = trainer(out=tmp_path / "b", **changes)
    assert went_on.resume() == 4
    assert went_on.fit().finished
    same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("updates", [3, 6])
def test_a_resumed_model_samples_with_the_noise_of_its_last_update(trainer, tmp_path, updates):
    changes = {"stabilise": {"noise_anneal": [0.5, 0.2]}, "checkpoint_every": 1}
    whole = trainer(out=tmp_path, **changes)
    whole.fit(updates)
    resumed = trainer(out=tmp_path, **changes)
    assert resumed.resume() == updates and resumed.model.langevin == whole.model.langevin
    assert torch.equal(resumed.model.sample(4, seed=5), whole.model.sample(4, seed=5))


def test_saved_and_resumed_without_a_folder(trainer, tmp_path):
    batches = [tiny_data(8 * 6).batch(slice(8 * i, 8 * i + 8)) for i in range(6)]
    whole, first, second = trainer(), trainer(), trainer()
    for batch in batches:
        whole.step(batch)
    for batch in batches[:3]:
        first.step(batch)
    first.save(tmp_path / "mine")
    assert second.resume(tmp_path / "mine") == 3
    for batch in batches[3:]:
        second.step(batch)
    assert all(torch.equal(p, q) for p, q in zip(whole.model.parameters(), second.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="path must be given"):
        second.resume()


def test_a_stop_between_records_changes_nothing(trainer, tmp_path):
    """Neither the records nor what the watch has counted."""
    changes = {"log_every": 4, "steps": 8, "sample_every": 0, "sizes": [1, 4]}
    for name, stops in (("whole", (8,)), ("parts", (3, 5, 8))):
        for stop in stops:
            ours = trainer(out=tmp_path / name, **changes)
            ours.resume()
            ours.fit(stop)
    states = [checkpoint.read(tmp_path / name / "checkpoints/step_000008") for name in ("whole", "parts")]
    assert states[0]["rollback"] == states[1]["rollback"]
    assert [r["step"] for r in Run(tmp_path / "parts").metrics()] == [4, 8]


def test_updates_after_the_last_checkpoint_are_made_again(trainer, tmp_path):
    trainer(out=tmp_path / "a").fit()
    lost = trainer(out=tmp_path / "b")
    lost.fit(5)
    checkpoint.prune(tmp_path / "b/checkpoints", 1)
    (tmp_path / "b/checkpoints/step_000005").rename(tmp_path / "b/checkpoints/.step_000005.1.tmp")
    lost._loop.iteration = 2
    went_on = trainer(out=tmp_path / "b")
    assert went_on.resume() == 0  # no checkpoint is left: from the beginning, over the lines already written
    went_on.fit()
    same_run(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "b/checkpoints").glob(".*"))


def test_a_truncated_checkpoint_gives_way_to_an_older_one(trainer, tmp_path):
    trainer(out=tmp_path / "a").fit()
    trainer(out=tmp_path / "b").fit(4)
    damaged = tmp_path / "b/checkpoints/step_000004/optimiser.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    words = io.StringIO()
    went_on = trainer(out=tmp_path / "b", console=Console(file=words))
    assert went_on.resume() == 2
    assert "optimiser.safetensors: truncated" in words.getvalue() and "older" in words.getvalue()
    went_on.fit()
    same_run(tmp_path / "a", tmp_path / "b")

    (tmp_path / "b/checkpoints/step_000004/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated.*newest whole one beside it is .*step_000006"):
        trainer().resume(tmp_path / "b/checkpoints/step_000004")
    for folder in checkpoint.listed(tmp_path / "b/checkpoints"):
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint of .* is whole: .*truncated"):
        trainer(out=tmp_path / "b").resume()
    with pytest.raises(CheckpointError, match="model.safetensors: truncated"):
        trainer().resume(tmp_path / "b/checkpoints/step_000006")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"langevin": {"steps": 4}}, "langevin.steps must be 3, .* got 4"),
        ({"sizes": [1, 4]}, r"sizes must be \[1, 2, 4\], .* got \[1, 4\]"),
        ({"seed": 1}, "seed must be 0, .* got 1"),
        ({"batch_size": 9}, "batch_size must be 8"),
        ({"width": 0.25}, "width must be 0.125"),
        ({"optimiser": {"name": "sgd"}}, "optimiser.name must be 'adam'"),
    ],
)
def test_another_run_is_refused(trainer, tmp_path, changes, message):
    trainer(out=tmp_path / "run").fit(2)
    with pytest.raises(ConfigError, match=message):
        trainer(out=tmp_path / "run", **changes).resume()


def test_a_run_from_before_a_key_existed_has_its_default(trainer, tmp_path):
    ours = trainer(out=tmp_path / "run", multigrid={"bank_size": 8})
    ours.fit(2)
    state = checkpoint.read(ours._loop.folder.last_checkpoint)
    for name in ("shifts", "flips", "batch_parts"):
        del state["config"][name]
    del state["config"]["multigrid"]["bank_share"]
    check = functools.partial(check_same_run, data={}, images=len(tiny_data()), state=state, folder=tmp_path)
    check(ours.config)
    for changes, words in (({"shifts": 1}, "shifts must be 0"), ({"flips": True}, "flips must be False")):
        with pytest.raises(ConfigError, match=words):
            check(dataclasses.replace(ours.config, **changes))


def test_other_data_is_refused(trainer, tmp_path):
    trainer(out=tmp_path / "run").fit(2)
    with pytest.raises(ConfigError, match="the images that the run began with, but of 20 images 1 added"):
        trainer(out=tmp_path / "run", data=tiny_data(21)).resume()


def test_resume_of_what_is_no_run(trainer, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        trainer().resume(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="not a run's folder"):
        trainer().resume(tmp_path / "empty")


def test_killed_before_there_was_a_configuration_a_run_begins(trainer, tmp_path):
    (tmp_path / ".config.toml.1.tmp").write_text("half of it")
    words = io.StringIO()
    ours = trainer(out=tmp_path, console=Console(file=words))
    assert ours.resume() == 0 and "from the beginning" in words.getvalue()
    assert ours.fit(1).finished and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_going_on_in_a_new_folder(trainer, tmp_path):
    trainer(out=tmp_path / "a").fit(2)
    branch = trainer(out=tmp_path / "b", optimiser={"lr": 1e-4})
    assert branch.resume(tmp_path / "a/checkpoints/step_000002") == 2
    assert branch.fit().finished
    assert [r["step"] for r in Run(tmp_path / "b").metrics()] == [3, 4, 5, 6]
    assert len(Run(tmp_path / "a").metrics()) == 2


def test_going_back_sets_later_checkpoints_aside(trainer, tmp_path):
    trainer(out=tmp_path).fit()
    back = trainer(out=tmp_path, optimiser={"lr": 1e-4})
    assert back.resume(tmp_path / "checkpoints/step_000002") == 2
    back.fit(3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "best.replaced", "step_000002", "step_000003", "step_000004.replaced", "step_000006.replaced",
    ]  # fmt: skip
    assert [r["step"] for r in Run(tmp_path).metrics()] == [1, 2, 3]
    back.fit(4)  # a new best is not measured against one that was undone
    assert checkpoint.read(tmp_path / "checkpoints/best")["iteration"] == 4


def test_nothing_left_to_do(trainer, tmp_path):
    trainer(out=tmp_path / "run").fit()
    before = checkpoint.read_tensors(tmp_path / "run/model.safetensors")
    words = io.StringIO()
    again = trainer(out=tmp_path / "run", console=Console(file=words))
    again.resume()
    outcome = again.fit()
    assert outcome.finished and outcome.iteration == 6 and "nothing left to do" in words.getvalue()
    after = checkpoint.read_tensors(tmp_path / "run/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [r["step"] for r in records.read(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_cannot_be_told_to_have_made_less_than_it_has(trainer, tmp_path):
    trainer(out=tmp_path).fit(4)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shorter = trainer(out=tmp_path, steps=3)
    shorter.resume()
    with pytest.raises(ConfigError, match=r"steps must be at least 4, the updates that the run has made, got 3"):
        shorter.fit()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    enough = trainer(out=tmp_path, steps=4)
    enough.resume()
    assert enough.fit().finished and Run(tmp_path).config.steps == 4


def test_fit_may_go_beyond_the_configuration_s_steps(trainer, tmp_path):
    beyond = trainer(out=tmp_path, steps=2)
    assert [beyond.fit(4).iteration, beyond.fit(6).iteration] == [4, 6]
    again = trainer(out=tmp_path, steps=2)
    again.resume()
    assert again.fit().iteration == 6 and again.fit(7).iteration == 7


def test_more_steps_go_on(trainer, tmp_path):
    trainer(out=tmp_path / "run").fit()
    longer = trainer(out=tmp_path / "run", steps=8)
    longer.resume()
    assert longer.fit(7).iteration == 7
    assert torch.equal(Run(tmp_path / "run").model().nets[0].head.weight, longer.model.nets[0].head.weight)
    assert longer.fit().iteration == 8
    assert Run(tmp_path / "run").config.steps == 8


def test_killed_at_a_random_moment(tmp_path):
    changes = dict(steps=40, checkpoint_every=3, sample_every=20, keep_checkpoints=2,
                   stabilise={"ema": 0.9, "data_noise": 0.03})  # fmt: skip
    killed, whole = ({"out": tmp_path / name, "data": tiny_data(), "device": "cpu", "quiet": True}
                     for name in ("killed", "whole"))  # fmt: skip
    metrics, target = tmp_path / "killed/metrics.jsonl", random.randint(1, 38)
    child = forked.start(tmp_path / "said", lambda: train(tiny_config(**changes), **killed))
    while child.is_alive() and len(records.read(metrics)) < target:
        time.sleep(0.001)
    child.kill()
    child.join()
    assert child.exitcode in (-signal.SIGKILL, 0), (tmp_path / "said").read_text()
    train(tiny_config(**changes), resume=True, **killed)
    train(tiny_config(**changes), **whole)
    same_files(tmp_path / "whole", tmp_path / "killed", "step_000040")
    assert [r["step"] for r in records.read(metrics)] == list(range(1, 41))
    assert not [p for p in (tmp_path / "killed").rglob("*") if p.name.startswith(".")]
    assert len(checkpoint.listed(tmp_path / "killed/checkpoints")) == 2
