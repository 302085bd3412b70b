"""Checkpoint folders: whole or absent, damage seen, leftovers cleaned, the newest kept."""

from __future__ import annotations

import errno
import json

import pytest
import torch

from mgebm_fast.errors import CheckpointError
from mgebm_fast.learning.run import checkpoint


def make(root, step, value=0.0):
    tensors = {"w": torch.full((100,), value)}
    folder = root / checkpoint.name_of(step)
    return checkpoint.write(
        folder, lambda path: checkpoint.write_tensors(path / "a.safetensors", tensors), {"iteration": step}
    )


def test_written_and_read(tmp_path):
    folder = make(tmp_path, 5, 2.0)
    assert checkpoint.read(folder)["iteration"] == 5
    assert checkpoint.read_tensors(folder / "a.safetensors")["w"].tolist() == [2.0] * 100
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]
    make(tmp_path, 5, 3.0)
    assert checkpoint.read_tensors(folder / "a.safetensors")["w"][0] == 3.0
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]


def test_failure_leaves_the_old_one_and_nothing_else(tmp_path):
    folder = make(tmp_path, 5, 2.0)

    def fill(path):
        (path / "a.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with pytest.raises(OSError, match="disk is full.*so it goes on"):
        with checkpoint.naming_a_full_disk(lambda: "so it goes on"):
            checkpoint.write(folder, fill, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]
    assert checkpoint.read(folder)["iteration"] == 5


def test_other_errors_keep_their_own_words():
    with pytest.raises(PermissionError, match="not allowed"):
        with checkpoint.naming_a_full_disk(lambda: "advice"):
            raise PermissionError(errno.EACCES, "not allowed")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "state"])
def test_damage_is_named(tmp_path, damage):
    folder = make(tmp_path, 5)
    file = folder / "a.safetensors"
    data = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(data[:-7])
        message = r"a.safetensors: truncated, \d+ bytes where \d+"
    elif damage == "flip":
        file.write_bytes(data[:-7] + b"\x55" + data[-6:])
        message = "a.safetensors: damaged"
    elif damage == "remove":
        file.unlink()
        message = "a.safetensors: missing"
    else:
        state = (folder / "state.json").read_text()
        (folder / "state.json").write_text(state[: len(state) // 2])
        message = "state.json: truncated"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(folder)
    make(tmp_path, 3)
    found, faults = checkpoint.newest_whole(tmp_path)
    assert found[0].name == "step_000003" and [f.name for f, _ in faults] == ["step_000005"]


def test_another_format_is_refused(tmp_path):
    folder = make(tmp_path, 5)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "version": 99}))
    with pytest.raises(CheckpointError, match="99"):
        checkpoint.read(folder)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.read(tmp_path)


def test_order_pruning_and_cleaning(tmp_path):
    for step in (999_999, 2, 1_000_000, 30):
        make(tmp_path, step)
    (tmp_path / ".step_000031.77.tmp").mkdir()
    (tmp_path / ".step_000031.77.tmp" / "half").write_bytes(b"x")
    assert [int(p.name[5:]) for p in checkpoint.listed(tmp_path)] == [2, 30, 999_999, 1_000_000]
    checkpoint.prune(tmp_path, 2)
    checkpoint.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1000000", "step_999999"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    folder = make(tmp_path, 5)
    folder.rename(tmp_path / ".step_000005.77.tmp.old")
    checkpoint.clean(tmp_path)
    assert checkpoint.read(folder)["iteration"] == 5


def test_a_failed_second_rename_puts_the_old_one_back(tmp_path, monkeypatch):
    folder = make(tmp_path, 5, 1.0)
    rename = checkpoint.os.rename

    def failing(source, target):
        if target == folder and source.name.endswith(".tmp"):
            raise OSError(errno.EIO, "no")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", failing)
    with pytest.raises(OSError, match="no"):
        make(tmp_path, 5, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    checkpoint.read(folder)
    assert checkpoint.read_tensors(next(folder.glob("*.safetensors")))["w"].unique().tolist() == [1.0]
