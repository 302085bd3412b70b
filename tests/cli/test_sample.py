"""`mgebm sample`: the three kinds of output, their contents, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from helpers.console import one_line
from PIL import Image

import mgebm_fast as mg
from mgebm_fast.data import load
from mgebm_fast.evaluation import evaluate


def test_an_array_is_the_models_own_samples(mgebm, trained, tmp_path):
    assert mgebm("sample", trained, "--num", 5, "--seed", 3, "--out", tmp_path / "x.npy").exit_code == 0
    stored = np.load(tmp_path / "x.npy")
    assert stored.shape == (5, 1, 8, 8) and stored.dtype == np.uint8
    model = mg.MultiGrid.load(trained)
    low, high = model.value_range
    x = model.sample(5, seed=3).numpy()
    np.testing.assert_array_equal(stored, np.round(255 * (x - low) / (high - low)).astype(np.uint8))


def test_steps_replace_those_of_every_grids_chain(mgebm, trained, tmp_path):
    assert mgebm("sample", trained, "--num", 5, "--steps", 7, "--out", tmp_path / "x.npy").exit_code == 0
    model = mg.MultiGrid.load(trained)
    own = model.to_uint8(model.sample(5, seed=0)).numpy()
    model.sample_steps = 7
    stored = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(stored, model.to_uint8(model.sample(5, seed=0)).numpy())
    assert (stored != own).any()


def test_each_grid_may_be_given_its_own_steps(mgebm, trained, tmp_path):
    model = mg.MultiGrid.load(trained)
    model.sample_steps = tuple(range(2, 2 + len(model.nets)))
    given = ",".join(map(str, model.sample_steps))
    assert mgebm("sample", trained, "--num", 5, "--steps", given, "--out", tmp_path / "x.npy").exit_code == 0
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), model.to_uint8(model.sample(5, seed=0)).numpy())
    for wrong in ("0", "1.5", "3,", "x", f"{given},4", "2000000"):
        refused = mgebm("sample", trained, "--num", 5, "--steps", wrong, "--out", tmp_path / "y.npy")
        words = f"--steps: must be a whole number from 1 to 1,000,000, or {len(model.nets)} of them with commas"
        assert words in one_line(refused) and f"got {wrong!r}" in one_line(refused)
        assert refused.exit_code == 2


def test_a_sample_may_be_given_cycles(mgebm, trained, tmp_path):
    model = mg.MultiGrid.load(trained)
    for given, cycles in (("2,2", (2, 2)), ("none", ())):
        assert (
            mgebm("sample", trained, "--num", 5, "--cycles", given, "--out", tmp_path / f"{given}.npy").exit_code == 0
        )
        model.cycles = cycles
        expected = model.to_uint8(model.sample(5, seed=0)).numpy()
        np.testing.assert_array_equal(np.load(tmp_path / f"{given}.npy"), expected)
    for wrong in ("1", str(model.sizes[-1]), "x", "2,", ""):
        refused = mgebm("sample", trained, "--num", 5, "--cycles", wrong, "--out", tmp_path / "y.npy")
        assert f"--cycles: must hold sizes among 2, 4, got {wrong!r}" in one_line(refused) and refused.exit_code == 2
    for words, note in (("none", "no V-cycles (--cycles)"), ("2", "V-cycles down to 2 (--cycles)")):
        shown = mgebm("evaluate", trained, "--num", 20, "--cycles", words, "--json")
        assert note in json.loads(shown.stdout)["notes"] and shown.exit_code == 0
        model.cycles = (2,) if words == "2" else ()
        figures = evaluate(model, *(load("digits", size=8, channels=1, split=s) for s in ("train", "held_out")), num=20)
        assert json.loads(shown.stdout)["kid"] == pytest.approx(figures["kid"])
    refused = mgebm("evaluate", trained, "--cycles", "2", "--by-size")
    assert "--cycles: must be left out with --by-size" in one_line(refused) and refused.exit_code == 2
    refused = mgebm("evaluate", trained, "--cycles", "2", "--record")
    assert "--record: must be left out with --cycles 2" in one_line(refused) and refused.exit_code == 2


def test_seed_and_first_sample_name_the_samples(mgebm, trained, tmp_path):
    calls = {"a": ["--num", 4], "b": ["--num", 4], "tail": ["--num", 2, "--first-sample", 2], "other": ["--seed", 1]}
    for name, extra in calls.items():
        assert mgebm("sample", trained, "--num", 4, *extra, "--out", tmp_path / f"{name}.npy").exit_code == 0
    a, b, tail, other = (np.load(tmp_path / f"{name}.npy") for name in calls)
    np.testing.assert_array_equal(a, b)
    # another batch size may round otherwise in the convolution, and one level of grey is what that can do
    assert np.abs(a[2:].astype(int) - tail).max() <= 1
    assert (a != other).any()


def test_no_callback_without_a_terminal(mgebm, trained, tmp_path, monkeypatch):
    """A callback forbids CUDA graphs, and reads the device at every step: a bar that nobody sees must not."""
    callbacks, sample = [], mg.MultiGrid.sample

    def spied(self, *arguments, **options):
        callbacks.append(options.get("callback"))
        return sample(self, *arguments, **options)

    monkeypatch.setattr(mg.MultiGrid, "sample", spied)
    for variables in ({}, {"FORCE_COLOR": "1"}):  # with the second, rich takes any stream for a terminal
        monkeypatch.delenv("FORCE_COLOR", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert mgebm("sample", trained, "--num", 2, "--out", tmp_path / f"{len(callbacks)}.npy").exit_code == 0
    assert callbacks[0] is None and callable(callbacks[1])


def test_a_picture_has_the_samples_between_gaps(mgebm, trained, tmp_path):
    for suffix in ("png", "npy"):
        assert mgebm("sample", trained, "--num", 6, "--out", tmp_path / f"x.{suffix}").exit_code == 0
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    samples, gap, scale = np.load(tmp_path / "x.npy"), 2, 5  # 8 pixels become 40
    side = 8 * scale + gap
    assert picture.shape == (2 * side + gap, 3 * side + gap, 3)
    for i, sample in enumerate(samples):
        top, left = gap + i // 3 * side, gap + i % 3 * side
        cell = picture[top : top + 8 * scale : scale, left : left + 8 * scale : scale, 0]
        np.testing.assert_array_equal(cell, sample[0])
    assert (picture[:gap] == 255).all() and (picture[:, :gap] == 255).all()


def test_a_folder_has_one_picture_a_sample(mgebm, trained, tmp_path):
    out = tmp_path / "deep" / "folder"
    (tmp_path / "deep").mkdir()
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    assert mgebm("sample", trained, "--num", 3, "--out", tmp_path / "link").exit_code == 0
    assert (tmp_path / "link").is_symlink()
    assert mgebm("sample", trained, "--num", 3, "--out", tmp_path / "x.npy").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == [f"sample_0000{i}.png" for i in range(3)]
    for i, sample in enumerate(np.load(tmp_path / "x.npy")):
        np.testing.assert_array_equal(np.asarray(Image.open(out / f"sample_0000{i}.png")), sample[0])
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def test_every_grid_can_be_shown(mgebm, trained, tmp_path):
    assert mgebm("sample", trained, "--num", 2, "--grids", "--out", tmp_path / "x.png").exit_code == 0
    assert mgebm("sample", trained, "--num", 2, "--grids", "--out", tmp_path / "x").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [f"size_00{size}" for size in (1, 2, 4, 8)]
    sizes = [Image.open(path / "sample_00001.png").size for path in sorted((tmp_path / "x").iterdir())]
    assert sizes == [(1, 1), (2, 2), (4, 4), (8, 8)]
    assert ".png or a folder" in one_line(mgebm("sample", trained, "--grids", "--out", tmp_path / "x.npy"))


def test_a_full_folder_is_refused_and_overwrite_replaces_samples_only(mgebm, trained, tmp_path):
    out = tmp_path / "x"
    assert mgebm("sample", trained, "--num", 3, "--out", out).exit_code == 0
    (out / "notes.txt").write_text("mine")
    before = (out / "sample_00000.png").read_bytes()
    assert "--overwrite" in one_line(mgebm("sample", trained, "--num", 2, "--seed", 5, "--out", out))
    assert (out / "sample_00000.png").read_bytes() == before
    assert mgebm("sample", trained, "--num", 2, "--seed", 5, "--out", out, "--overwrite").exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "sample_00000.png", "sample_00001.png"]
    assert (out / "sample_00000.png").read_bytes() != before


def test_checkpoints_and_files_can_be_sampled(mgebm, trained, tmp_path):
    for i, source in enumerate(("model.safetensors", "checkpoints/step_000001", "checkpoints")):
        result = mgebm("sample", trained / source, "--num", 2, "--out", tmp_path / f"{i}.npy")
        assert result.exit_code == 0, result.output


def test_a_failure_while_writing_leaves_nothing(mgebm, trained, tmp_path, monkeypatch):
    from mgebm_fast import pictures

    made = []

    def full_disk(path, array, **options):
        if len(made) == 2:
            raise OSError(28, "No space left on device", str(path))
        made.append(path)

    monkeypatch.setattr(pictures, "save_png", full_disk)
    assert "No space left" in one_line(mgebm("sample", trained, "--num", 4, "--out", tmp_path / "x"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file/x.png", "file", "folder.png"])
def test_a_place_that_cannot_be_written_is_told_before_sampling(mgebm, trained, tmp_path, monkeypatch, name):
    monkeypatch.setattr(mg.MultiGrid, "sample", None)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    assert "--out" in one_line(mgebm("sample", trained, "--out", tmp_path / name))
    assert (tmp_path / "file").read_text() == "mine"


def truncated(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def other_sizes(run):
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = run / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {key: file.get_tensor(key) for key in file.keys()}
    described = json.loads(metadata["mgebm_fast"])
    described["config"]["sizes"] = [1, 3, 9, 27]
    save_file(tensors, path, {"mgebm_fast": json.dumps(described)})


def not_a_model(run):
    (run / "model.safetensors").write_bytes(b"GIF89a" * 100)


def empty(run):
    shutil.rmtree(run)
    run.mkdir()


@pytest.mark.parametrize("damage", [truncated, other_sizes, not_a_model, empty])
def test_a_damaged_run_is_one_line_and_writes_nothing(mgebm, run, tmp_path, damage):
    damage(run)
    one_line(mgebm("sample", run, "--num", 2, "--out", tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()


def test_a_run_that_does_not_exist_suggests_its_neighbour(mgebm, run, tmp_path):
    message = one_line(mgebm("sample", run.with_name("digit"), "--out", tmp_path / "x.png"))
    assert "did you mean 'digits'" in message


@pytest.mark.parametrize("option", [["--num", "0"], ["--seed", "-1"], ["--num", "many"], ["--first-sample", "-1"]])
def test_a_wrong_number_is_told_by_option(mgebm, trained, tmp_path, option):
    result = mgebm("sample", trained, *option, "--out", tmp_path / "x.png")
    assert result.exit_code == 2 and option[0] in result.stderr
    assert not (tmp_path / "x.png").exists()


def test_files_of_a_folder_are_named_by_sample_id(mgebm, trained, tmp_path):
    result = mgebm("sample", trained, "--num", 2, "--first-sample", 7, "--out", tmp_path / "pictures")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["sample_00007.png", "sample_00008.png"]


def test_a_format_that_is_not_written_is_refused(mgebm, trained, tmp_path):
    result = mgebm("sample", trained, "--out", tmp_path / "samples.jpg")
    assert result.exit_code == 2 and "must end in .png or .npy, or be a folder" in result.stderr
    assert not (tmp_path / "samples.jpg").exists()


def test_memory_that_is_not_there_is_told_in_gigabytes(mgebm, tmp_path, monkeypatch):
    def too_wide(*sizes, **options):
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] can't allocate memory: you tried to allocate 4000000000000 bytes"
        )

    monkeypatch.setattr("mgebm_fast.learning.methods.multigrid.MultiGrid", too_wide)
    line = one_line(mgebm("train", "digits", "--set", "steps=1", "--out", tmp_path / "wide"))
    assert "GB were asked for in one piece" in line and "width" in line and "alloc_cpu" not in line
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_file_is_named(mgebm, trained):
    line = one_line(mgebm("sample", trained, "--num", 2, "--out", "/proc/x.png"))
    assert "--out: must be where a file can be written, got /proc/x.png, " in line and "Errno" not in line
