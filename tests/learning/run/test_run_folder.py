"""The run folder: what is in it, who may write to it, Ctrl-C, a full disk, and opening it again."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import signal

import pytest
import torch
from helpers.training import tiny_config, tiny_data
from PIL import Image
from rich.console import Console

from mgebm_fast.data import load
from mgebm_fast.errors import CheckpointError
from mgebm_fast.learning import MultiGridTrainer, Run, load_config, train
from mgebm_fast.learning.run import checkpoint
from mgebm_fast.models import MultiGrid


def test_contents(trainer, tmp_path):
    out, words = tmp_path / "deep/run", io.StringIO()
    ours = trainer(out=out, console=Console(file=words, width=40), keep_checkpoints=2, stabilise={"ema": 0.9})
    outcome = ours.fit()
    assert outcome.finished and outcome.iteration == 6
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoints", "config.toml", "data.json", "metrics.jsonl", "model.json", "model.safetensors", "samples",
        "tensorboard",
    ]  # fmt: skip
    assert load_config(out / "config.toml") == ours.config
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["best", "step_000004", "step_000006"]
    assert [p.name for p in sorted((out / "samples").iterdir())] == ["step_000003.png", "step_000006.png"]
    assert Image.open(out / "samples/step_000006.png").size[0] > 100
    lines = words.getvalue().splitlines()
    assert sum(line.startswith(f"{i}/6  ") for i, line in enumerate(lines, start=1)) == 6
    assert "energy gap" in lines[0] and "left" in lines[0] and str(out / "model.safetensors") in lines[-1]
    record = Run(out).metrics()[-1]
    for name in ("energy_observed", "energy_synthesised", "gap", "gradient_norm", "gradient_to_noise"):
        assert isinstance(record[f"size_4/{name}"], float)
    assert record["seconds_per_update"] > 0


def test_the_final_model_has_the_averaged_weights(trainer, tmp_path):
    ours = trainer(out=tmp_path, stabilise={"ema": 0.9, "noise_anneal": 0.5})
    ours.fit()
    final, newest = MultiGrid.load(tmp_path), MultiGrid.load(tmp_path / "checkpoints/step_000006")
    averages = ours.rule.average.state()
    for name, parameter in final.named_parameters():
        assert torch.equal(parameter, averages[name])
        assert torch.equal(newest.get_parameter(name), averages[name])
    assert any(not torch.equal(p, averages[n]) for n, p in ours.model.named_parameters())
    assert final.langevin[0].noise_std == pytest.approx(0.015)  # the chain as it was at the last update
    assert torch.equal(final.colours, ours.model.from_uint8(tiny_data().colours()))


def test_data_that_has_no_name_to_read_it_by_again(tmp_path):
    words = io.StringIO()
    images = torch.from_numpy(tiny_data(size=2).images)
    ours = MultiGridTrainer(
        None, images, sizes=[1, 2], width=0.125, steps=4, batch_size=4, log_every=1, out=tmp_path,
        console=Console(file=words), langevin={"steps": 2}, device="cpu",
    )  # fmt: skip
    interrupt(ours, 1)
    assert not ours.fit().finished
    assert ".resume(), then .fit()" in words.getvalue() and "mgebm train" not in words.getvalue()
    assert load_config(tmp_path / "config.toml").data == "Tensor"


def test_a_terminal_gets_a_bar(trainer, tmp_path):
    words = io.StringIO()
    trainer(out=tmp_path, console=Console(file=words, force_terminal=True, width=200)).fit()
    assert "6/6" in words.getvalue() and "updates/s" in words.getvalue() and "left" in words.getvalue()


def test_no_steps_give_the_untrained_model(trainer, tmp_path):
    ours = trainer(out=tmp_path, steps=0)
    before = [p.detach().clone() for p in ours.model.parameters()]
    assert ours.fit().finished
    assert all(torch.equal(p, q) for p, q in zip(MultiGrid.load(tmp_path).parameters(), before, strict=True))
    with pytest.raises(ValueError, match="fit: steps must be"):
        ours.fit(-1)


def test_a_folder_that_holds_something_is_refused(trainer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="new or empty folder.*choose another"):
        trainer(out=tmp_path).fit()
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileExistsError, match="which is a file"):
        train(tiny_config(), out=tmp_path / "notes.txt", data=tiny_data())
    trainer(out=tmp_path / "run").fit(2)
    elsewhere = trainer(out=tmp_path)
    elsewhere.resume(tmp_path / "run")
    with pytest.raises(FileExistsError, match="new or empty"):
        elsewhere.fit()
    with pytest.raises(FileExistsError, match="--resume"):
        train(tiny_config(), out=tmp_path / "run", data=tiny_data())


def test_two_processes_do_not_train_into_one_folder(trainer, tmp_path):
    trainer(out=tmp_path).fit(2)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    second = trainer(out=tmp_path)
    with pytest.raises(FileExistsError, match="another process is training"):
        second.resume()
    os.close(handle)
    second.resume()
    assert second.fit().finished


def interrupt(ours, at, *, times=1):
    update = ours.rule.update

    def interrupted(batch, iteration, **options):
        if iteration == at:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return update(batch, iteration, **options)

    ours.rule.update = interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(trainer, tmp_path, number, capfd):
    before, words = signal.getsignal(number), io.StringIO()
    ours = trainer(out=tmp_path, console=Console(file=words))
    update = ours.rule.update
    ours.rule.update = lambda batch, i, **o: (os.kill(os.getpid(), number) if i == 2 else None, update(batch, i, **o))[
        1
    ]
    outcome = ours.fit()
    assert not outcome.finished and outcome.iteration == 3
    assert checkpoint.read(tmp_path / "checkpoints/step_000003")["iteration"] == 3
    assert "the same trainer: .resume(), then .fit()" in words.getvalue()  # a command would not find images in memory
    assert "finishing this update" in capfd.readouterr().err
    assert signal.getsignal(number) is before
    assert not (tmp_path / "model.safetensors").exists()


def test_a_second_signal_aborts(trainer, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    ours = trainer(out=tmp_path)
    interrupt(ours, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        ours.fit()
    assert signal.getsignal(signal.SIGINT) is before
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "step_000002"]


@pytest.mark.parametrize(
    ("code", "what"), [(errno.ENOSPC, "disk is full"), (errno.EFBIG, "limit of this process .ulimit -f.")]
)
def test_a_full_disk(trainer, tmp_path, monkeypatch, code, what):
    ours, write = trainer(out=tmp_path), checkpoint.write_tensors

    def full(path, tensors):
        if ours.iteration == 4:
            path.write_bytes(b"half of it")
            raise OSError(code, os.strerror(code), str(path))
        write(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(
        OSError, match=rf"{what}.*step_000002, is whole; free some space and go on with: the same trainer"
    ):
        ours.fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["best", "step_000002"]
    assert checkpoint.read(tmp_path / "checkpoints/step_000002")["iteration"] == 2
    monkeypatch.undo()
    went_on = trainer(out=tmp_path)
    assert went_on.resume() == 2 and went_on.fit().finished


def test_open_a_run(trainer, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        Run(tmp_path / "none")
    with pytest.raises(CheckpointError, match="no config.toml"):
        Run(tmp_path)
    ours = trainer(out=tmp_path / "run")
    ours.fit(2)
    run = Run(tmp_path / "run")
    assert run.config == ours.config and not (tmp_path / "run/none").exists()
    (tmp_path / "run/model.safetensors").unlink()
    assert not run.finished and run.model_file() == tmp_path / "run/checkpoints/step_000002/model.safetensors"
    assert run.model().sizes == (1, 2, 4)
    part = Run(tmp_path / "run/checkpoints/step_000002")
    assert part.config == ours.config and part.model().sizes == (1, 2, 4)
    checkpoint.prune(tmp_path / "run/checkpoints", 1)
    (tmp_path / "run/checkpoints/step_000002/model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="no model to use.*truncated"):
        run.model()


def test_a_checkpoint_outside_a_run_has_no_run_two_folders_above(trainer, tmp_path):
    """A project may have a data.json, or a config.toml, of its own."""
    (tmp_path / "data.json").write_text('{"sha256": "of other things", "count": 3}')
    (tmp_path / "config.toml").write_text("[project]")
    ours = trainer()
    ours.fit(2)
    saved = ours.save(tmp_path / "ck/a")
    again = trainer()
    assert again.resume(saved) == 2 and Run(saved).fingerprint() is None
    assert Run(saved).evaluations_file == saved / "evaluations.jsonl"
    assert not trainer(out=tmp_path)._loop.folder.holds(saved)
    trainer(out=tmp_path / "r").fit(2)
    inside = tmp_path / "r/checkpoints/step_000002"
    assert Run(inside).fingerprint() and Run(inside).fingerprint() == Run(tmp_path / "r").fingerprint()
    assert Run(inside).evaluations_file == tmp_path / "r/evaluations.jsonl"
    assert trainer(out=tmp_path / "r")._loop.folder.holds(inside)


def test_data_of_a_run(trainer, tmp_path):
    trainer(out=tmp_path, channels=1, sizes=[1, 2, 4, 8], data=load("digits", size=8, channels=1)).fit(1)
    run = Run(tmp_path)
    assert len(run.data()) == 1437 and len(run.data("held_out")) == 360


def test_a_run_whose_bound_was_cleared_goes_on_without_it(trainer, tmp_path):
    trainer(out=tmp_path, steps=1, rollback={"gap_ratio": "none"}).fit()
    for config in (load_config(tmp_path / "config.toml"), Run(tmp_path / "checkpoints/step_000001").config):
        assert config.rollback.gap_ratio is None
