"""A run's folder as input: links, pipes, changed and damaged files, and numbers that no good state has."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import warnings

import pytest
import torch
from helpers.training import tiny_data
from rich.console import Console

from mgebm_fast import files
from mgebm_fast.cli.train import _write_report
from mgebm_fast.errors import CheckpointError, ConfigError, DivergenceError
from mgebm_fast.evaluation.page import page
from mgebm_fast.learning import Run
from mgebm_fast.learning.run import checkpoint, interrupts, records
from mgebm_fast.models import Model, MultiGrid, storage


@pytest.fixture
def run(trainer, tmp_path):
    """A run stopped after 4 of 6 updates, with checkpoints at 2 and 4."""
    trainer(out=tmp_path / "run").fit(4)
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "data.json", "model.safetensors", "checkpoints"])
def test_nothing_in_a_run_is_followed(trainer, run, tmp_path, name):
    outside = tmp_path / "outside"
    (run / name).rename(outside)
    (run / name).symlink_to(outside)
    before = sorted(outside.iterdir()) if outside.is_dir() else outside.read_bytes()
    for use in (lambda: trainer(out=run).resume(), lambda: Run(run)):
        with pytest.raises(CheckpointError, match=f"{name}: must be a .*, got a symbolic link"):
            use()
    assert before == (sorted(outside.iterdir()) if outside.is_dir() else outside.read_bytes())


def test_a_linked_picture_is_replaced_and_a_linked_checkpoint_not_touched(trainer, run, tmp_path):
    mine, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    mine.write_text("mine")
    (run / "checkpoints/step_000002").rename(elsewhere)
    (run / "checkpoints/step_000002").symlink_to(elsewhere)
    (run / "samples/step_000006.png").symlink_to(mine)
    ours = trainer(out=run, keep_checkpoints=1)
    ours.resume()
    ours.fit()
    assert mine.read_text() == "mine" and (elsewhere / "state.json").is_file()
    assert not (run / "samples/step_000006.png").is_symlink()


def test_a_report_follows_nothing_and_shows_pictures_alone(run, tmp_path):
    """Of links, pipes, huge, empty and damaged files, and files of other names, nothing is on the page of a run."""
    names = [f"step_{name}.png" for name in ("000005", "000006", "000007", "000008", "000009")]
    link, pipe, sparse, empty, text = (run / "samples" / name for name in names)
    link.symlink_to(tmp_path / "outside.png")
    (tmp_path / "outside.png").write_bytes((run / "samples" / "step_000004.png").read_bytes())
    os.mkfifo(pipe)
    with sparse.open("wb") as file:
        file.truncate(10 << 30)
    empty.touch()
    text.write_text("no picture")
    (run / "samples" / "step_x.png").write_text("of another program")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            f'{{"step": 5, "seconds_per_update": null}}\n{{"step": 5, "size_8/gap": {"9" * 400}}}\n{{"step": 5}}\n'
        )
    with pytest.warns(UserWarning, match="2 of 7 records are damaged"):
        found = page([Run(run)])
    assert found.count('<img alt="update ') == 2 and 'alt="update 4"' in found
    assert "Left out, no pictures: step_000005.png, step_000006.png, step_000007.png" in found


def test_training_goes_on_where_there_can_be_no_report_and_writes_through_no_link(run, tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    (run / "report.html").symlink_to(tmp_path / "mine")
    _write_report(run)
    assert (tmp_path / "mine").read_text() == "mine" and "<!doctype html>" in (run / "report.html").read_text()
    (run / "config.toml").write_text("seed = -1")
    _write_report(run)
    assert capsys.readouterr().err.startswith("no report: ")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/step_000004/state.json", "model.safetensors"])
def test_pipes_are_not_opened(trainer, run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    with pytest.raises(CheckpointError, match="regular file"):
        checkpoint.read(run / "checkpoints/step_000004") if "state" in name else trainer(out=run).resume()


def test_no_more_is_read_than_was_written(run):
    file = run / "checkpoints/step_000004/model.safetensors"
    os.truncate(file, 10 << 30)
    with pytest.raises(CheckpointError, match="10737418240 bytes where"):
        checkpoint.read(file.parent)
    with pytest.raises(CheckpointError, match="10737418240 bytes where"):
        Model.load(file)
    os.truncate(file.with_name("state.json"), 10 << 30)
    with pytest.raises(CheckpointError, match="must have at most"):
        checkpoint.read(file.parent)


def test_a_state_belongs_to_its_folder_and_to_itself(run):
    folder = run / "checkpoints/step_000004"
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"iteration": 4', '"iteration": 3'))
    with pytest.raises(CheckpointError, match="damaged or changed"):
        checkpoint.read(folder)
    (folder / "state.json").write_text(text)
    folder.rename(run / "checkpoints/step_000005")
    with pytest.raises(CheckpointError, match="must be of update 5, as its folder's name says, got 4"):
        checkpoint.read(run / "checkpoints/step_000005")


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "9" * 5000, '{"format": 3}', "null", '{"format": "mgebm_fast.checkpoint", "version": 1}']
)
def test_any_damage_of_a_state_is_one_error(run, text):
    (run / "checkpoints/step_000004/state.json").write_text(text)
    with pytest.raises(CheckpointError, match="state.json: "):
        checkpoint.read(run / "checkpoints/step_000004")


def forged(folder, **change):
    """The state of a checkpoint changed, with the checksum that belongs to the change."""
    state = {**json.loads((folder / "state.json").read_text()), **change}
    del state["crc32"]
    (folder / "state.json").write_text(json.dumps({**state, "crc32": checkpoint.checksum(state)}))
    return folder


@pytest.mark.parametrize(
    "change",
    [{"metrics": []}, {"metrics": {"bytes": -1}}, {"iteration": 4.0}, {"rollback": []}, {"measure": "x"}],
)
def test_a_state_of_other_types_is_damaged_whatever_its_checksum_says(run, change):
    with pytest.raises(CheckpointError, match="state.json"):
        checkpoint.read(forged(run / "checkpoints" / "step_000004", **change))


def test_the_configuration_of_a_checkpoint_is_a_table(run):
    with pytest.raises(ConfigError, match="step_000004: must be a table of keys, got 'none'"):
        Run(forged(run / "checkpoints" / "step_000004", config="none"))


def test_numbers_of_checkpoints_are_digits(run):
    (run / "checkpoints" / "step_²").mkdir()
    assert storage.find(run / "checkpoints").parent.name == "step_000004"


def test_files_of_a_state_lie_in_its_folder(run):
    path = run / "checkpoints/step_000004/state.json"
    state = json.loads(path.read_text())
    del state["crc32"]
    state.update(version=1, files={"/dev/zero": {"bytes": 1, "crc32": "0"}})
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="files must be names of this folder, got '/dev/zero'"):
        checkpoint.read(path.parent)
    state["files"] = {}
    path.write_text(json.dumps(state))
    assert checkpoint.read(path.parent)["iteration"] == 4  # of the format before, which had no checksum of its own


def test_damaged_records_are_kept_and_reported(trainer, run):
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00" + lines[1][1:] + b"".join(lines[2:]))
    with pytest.warns(UserWarning, match="1 of 4 records are damaged"):
        records.read(path)
    words = io.StringIO()
    ours = trainer(out=run, console=Console(file=words))
    ours.resume()
    ours.fit()
    assert "metrics.jsonl: damaged; 3 records up to update 4 could be read" in words.getvalue()
    assert [r["step"] for r in records.read(path)] == [1, 3, 4, 5, 6]
    assert (run / "metrics.jsonl.damaged").read_bytes().startswith(lines[0] + b"\x00")


def test_a_changed_or_lost_record_is_reported(run):
    path, mark = run / "metrics.jsonl", checkpoint.read(run / "checkpoints/step_000004")["metrics"]
    text = path.read_bytes()
    for changed in (text.replace(b'"step": 4', b'"step": 3', 1), text[:-10], text[: text.rindex(b'{"step": 4')]):
        path.write_bytes(changed)
        assert "damaged" in records.truncate(path, 4, 0, mark)
    path.write_bytes(text + b'{"step": 5}\n')
    assert records.truncate(path, 4, 0, mark) == "" and path.read_bytes() == text


def test_a_final_model_has_a_checksum(run):
    file = run / "model.safetensors"
    assert Run(run).model().sizes == (1, 2, 4)
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    for load in (Run(run).model, lambda: MultiGrid.load(run), lambda: Model.load(file)):
        with pytest.raises(CheckpointError, match="model.safetensors: damaged, its checksum"):
            load()
    (run / "model.json").write_text('{"format": "mgebm_fast.model", "version": 1, "files": []}')
    with pytest.raises(CheckpointError, match="cannot tell whether model.safetensors is whole .it lists none"):
        Model.load(file)
    (run / "model.json").unlink()
    assert Model.load(file).sizes == (1, 2, 4)  # of a run from before there were checksums


def test_between_two_models_both_are_known(trainer, run, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    longer = trainer(out=run)
    longer.resume()
    with monkeypatch.context() as patched:
        replace = os.replace
        patched.setattr(os, "replace", lambda a, b: killed() if "model.safe" in str(b) else replace(a, b))
        with pytest.raises(KeyboardInterrupt):
            longer.fit()
    Run(run).model()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e16])
def test_insane_models_are_neither_saved_nor_loaded(trainer, run, tmp_path, value, monkeypatch):
    ours = trainer()
    with torch.no_grad():
        next(ours.model.parameters()).view(-1)[0] = value
    with pytest.raises(DivergenceError, match="must be finite and at most 1e\\+08 in size"):
        ours.model.save(tmp_path / "x.safetensors")
    with pytest.raises(DivergenceError, match="must be finite"):
        ours.save(tmp_path / "checkpoint")
    assert not (tmp_path / "x.safetensors").exists() and not (tmp_path / "checkpoint").exists()
    from mgebm_fast.models import storage

    monkeypatch.setattr(storage, "fault_of", lambda *_: "")
    ours.model.save(tmp_path / "x.safetensors")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="x.safetensors: .* must be finite and at most"):
        Model.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("out", [True, False])
def test_the_last_update_is_checked(trainer, tmp_path, out):
    ours = trainer(out=tmp_path if out else None, steps=1, optimiser={"name": "sgd", "lr": 1e30})
    with pytest.raises(DivergenceError, match="must be finite and at most .*stopped at update 1, which was not saved"):
        ours.fit()
    assert not (tmp_path / "model.safetensors").exists()


def test_moments_are_checked(trainer, tmp_path):
    ours = trainer(out=tmp_path / "run")
    ours.fit(2)
    next(iter(next(iter(ours.rule.named_optimisers().values())).state.values()))["exp_avg"].fill_(float("nan"))
    with pytest.raises(DivergenceError, match="exp_avg must be finite"):
        ours.save(tmp_path / "x")


def test_going_back_from_an_insane_update(trainer, tmp_path):
    ours = trainer(out=tmp_path, rollback={"attempts": 1})
    update = ours.rule.update

    def insane(batch, iteration, **options):
        metrics = update(batch, iteration, **options)
        if iteration == 5 and not ours.rule.attempt:
            with torch.no_grad():
                next(ours.model.parameters()).fill_(float("inf"))
        return metrics

    ours.rule.update = insane
    assert ours.fit().finished and len(ours._loop.history.made) == 1
    assert [r["step"] for r in Run(tmp_path).metrics()] == [1, 2, 3, 4, 4, 5, 6]


def test_replaced_images_are_named(trainer, run):
    data = tiny_data()
    data.images[3] = 0
    with pytest.raises(ConfigError, match="data must be the images that the run began with, but .*1 replaced"):
        trainer(out=run, data=data).resume()


def test_where_it_goes_on_from_is_said(trainer, run):
    words = io.StringIO()
    trainer(out=run, console=Console(file=words, width=200)).resume()
    assert f"going on after update 4, from {run}/checkpoints/step_000004" in words.getvalue()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_signals_of_batch_systems_save(trainer, tmp_path, name, capfd):
    ours = trainer(out=tmp_path, console=Console(file=io.StringIO()))
    update = ours.rule.update

    def signalled(batch, iteration, **options):
        for _ in range(2 if iteration == 2 else 0):  # they come again, and do not abort
            os.kill(os.getpid(), getattr(signal, name))
        return update(batch, iteration, **options)

    ours.rule.update = signalled
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # under nohup SIGHUP is ignored, and stays so
    try:
        assert not ours.fit().finished
    finally:
        signal.signal(getattr(signal, name), before)
    assert checkpoint.read(tmp_path / "checkpoints/step_000003")["iteration"] == 3
    assert name in capfd.readouterr().err


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupts.StopRequests(lambda name: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Dead(io.StringIO):
    def write(self, text):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


@pytest.mark.parametrize("terminal", [False, True])
def test_a_dead_console_does_not_end_a_run(trainer, tmp_path, terminal, monkeypatch):
    ours = trainer(out=tmp_path, console=Console(file=Dead(), force_terminal=terminal))
    update = ours.rule.update
    ours.rule.update = lambda b, i, **o: (os.kill(os.getpid(), signal.SIGINT) if i == 2 else None, update(b, i, **o))[1]
    monkeypatch.setattr(sys, "stderr", None)  # closed
    outcome = ours.fit()
    assert outcome.iteration == 3 and (tmp_path / "checkpoints/step_000003").is_dir()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_is_reported_once(tmp_path, monkeypatch, number):
    def fails(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    monkeypatch.setattr(files, "_said", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for name in "ab":
            files.write_bytes(tmp_path / name, b"x")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a", "b"]
    assert len(said) == 1 and "does not support fsync" in str(said[0].message)
    number = errno.EIO
    with pytest.raises(OSError) as caught:
        files.write_bytes(tmp_path / "c", b"x")
    assert caught.value.errno == errno.EIO and not (tmp_path / "c").exists()
    with pytest.raises(OSError) as caught:
        files.synchronise(tmp_path)
    assert caught.value.filename == str(tmp_path)
