"""Files: atomic and durable writes, links and pipes as targets, and what interrupted writes left."""

from __future__ import annotations

import os

import numpy as np
import pytest

from mgebm_fast import files
from mgebm_fast.pictures import save_png


def test_a_link_stays_one_and_a_pipe_is_refused(tmp_path):
    target, link, pipe = tmp_path / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    for content in (b"new", b"again"):
        files.write_bytes(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="must be a regular file or new"):
        files.write_bytes(pipe, b"x")
    assert pipe.is_fifo() and len(list(tmp_path.iterdir())) == 3


def test_pictures_and_their_folder_are_synchronised(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    save_png(tmp_path / "x.png", np.zeros((2, 2), np.uint8))
    assert synced == [str(tmp_path / f".x.png.{os.getpid()}.tmp"), str(tmp_path)]
    synced.clear()
    files.make_folder(tmp_path / "a/b")
    assert synced == [str(tmp_path), str(tmp_path / "a")]


def test_leftovers_of_dead_processes_go(tmp_path):
    for name in (".x.png.999999999.tmp", f".x.png.{os.getppid()}.tmp", ".y.png.999999999.tmp", ".x.png.mine"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".x.png.999999998.tmp").mkdir()
    files.clean(tmp_path, "x.png")
    kept = [".x.png.mine", f".x.png.{os.getppid()}.tmp", ".y.png.999999999.tmp"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    files.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".x.png.mine"]


def test_an_array_is_written_whole_or_not_at_all(tmp_path):
    path, array = tmp_path / "x.npy", np.arange(6).reshape(2, 3).T
    assert files.write_npy(path, array) == path and np.array_equal(np.load(path), array)
    with pytest.raises(ValueError, match="allow_pickle"):
        files.write_npy(path, np.array([object()]))
    assert np.array_equal(np.load(path), array) and os.listdir(tmp_path) == ["x.npy"]
