"""Where commands write: folders of other things are refused, and so is what cannot be written, before any work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import typing

import numpy as np
import pytest
from helpers.console import one_line
from PIL import Image

import mgebm_fast as mg
from mgebm_fast.cli.app import _LastingStream, _Output, app
from mgebm_fast.cli.outputs import check_place
from mgebm_fast.evaluation.comparison import compare as comparison


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def pictures(tmp_path):
    """A folder of two images, which is somebody's data."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8), 90).save(folder / name)
    return folder


@pytest.mark.parametrize("lost", [[], ["config.toml", "model.safetensors"], ["config.toml", "checkpoints"]])
def test_compare_refuses_a_run(mgebm, run, lost):
    for name in lost:
        (run / name).rename(run.parent / name)
    before = contents(run)
    line = one_line(mgebm("compare", "digits", "--seeds", 0, "--set", "steps=1", "--out", run))
    assert line == f"error: --out: must be new, empty or a comparison's folder, got {run}, which holds a run"
    assert contents(run) == before


def test_compare_refuses_other_files_and_takes_what_a_comparison_left(mgebm, pictures, tmp_path, monkeypatch):
    line = one_line(mgebm("compare", "digits", "--out", pictures))
    assert "--out: must be new, empty or a comparison's folder" in line and line.endswith((" a.png", " b.png"))
    assert sorted(contents(pictures)) == ["a.png", "b.png"]

    def reached(*_, **__):
        raise ValueError("training begins")

    monkeypatch.setattr(comparison, "compare", reached)
    begun, stopped = tmp_path / "begun", tmp_path / "stopped"
    (begun / "digits" / "seed-0").mkdir(parents=True)
    (stopped / "digits" / "seed-0").mkdir(parents=True)
    (stopped / "digits" / "seed-0.json").write_text("{}")
    (stopped / "notes.txt").write_text("mine")
    for out in (tmp_path / "new", begun, stopped):
        assert "training begins" in one_line(mgebm("compare", "digits", "digits-cd", "--seeds", 0, "--out", out))
    assert not (tmp_path / "new").exists()


def test_diagnose_refuses_a_folder_of_other_files(mgebm, trained, pictures):
    call = ["diagnose", trained, "--num", 2, "--steps", 2, "--out", pictures]
    line = one_line(mgebm(*call))
    assert (
        f"--out: must be a new or empty folder or that of an earlier diagnosis, got {pictures}, which holds a.png"
        in line
    )
    assert sorted(contents(pictures)) == ["a.png", "b.png"]
    before = contents(pictures)
    assert mgebm(*call, "--overwrite").exit_code == 0
    after = contents(pictures)
    assert "report.json" in after and {name: after[name] for name in before} == before


def test_diagnose_replaces_an_earlier_diagnosis(mgebm, trained, tmp_path):
    call = ["diagnose", trained, "--num", 2, "--out", tmp_path / "x"]
    assert mgebm(*call, "--steps", 2).exit_code == 0
    names = set(contents(tmp_path / "x"))
    (tmp_path / "x" / "grid_7_size_512.png").write_bytes(b"of a model with more grids")
    assert mgebm(*call, "--steps", 3).exit_code == 0
    assert set(contents(tmp_path / "x")) == names
    assert json.loads((tmp_path / "x" / "report.json").read_text())["chains"][0]["steps"] == 3


def test_diagnoses_of_videos_are_known_too(mgebm, tmp_path):
    sets = ["--set", "steps=1", "--set", "langevin.steps=1", "--set", "spatial-temporal.size=[4, 8, 8]"]
    sets += ["--set", "batch_size=2", "--set", "width=0.1", "--set", "spatial-temporal.layers=[[2, 3, 2]]"]
    assert mgebm("train", "fire", *sets, "--out", tmp_path / "fire").exit_code == 0
    call = ["diagnose", tmp_path / "fire", "--num", 2, "--steps", 4, "--out", tmp_path / "x"]
    for _ in range(2):
        result = mgebm(*call)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    "command", [["sample", "x.png"], ["sample", "x"], ["inpaint", "x.png"], ["diagnose", "x"], ["classify", "x.png"]]
)
def test_a_place_that_cannot_be_made_is_named_before_any_work(mgebm, trained, monkeypatch, command):
    for cls in (mg.MultiGrid, mg.models.Model):
        monkeypatch.setattr(cls, "sample", None, raising=False)
    if command[0] == "classify":
        pytest.importorskip("matplotlib")
    option = "--picture" if command[0] == "classify" else "--out"
    line = one_line(mgebm(command[0], trained, option, f"/proc/none/{command[1]}"))
    assert line.startswith(f"error: {option}: must be where a file can be written, got /proc/none/{command[1]}")


def test_train_and_compare_try_the_place_before_data_are_read(mgebm, tmp_path):
    for command in ("train", "compare"):
        line = one_line(mgebm(command, "digits", "--data", "texture:none", "--out", "/proc/none/run"))
        assert "--out: must be where a file can be written, got /proc/none/run, but in /proc none can" in line


def test_trying_a_place_leaves_nothing(tmp_path):
    check_place(tmp_path / "a" / "b" / "x.png")
    check_place(tmp_path / "a" / "b", folder=True)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="^--csv: must be .* got .*file/x.png, but in .* none can"):
        check_place(tmp_path / "file" / "x.png", "--csv")
    (tmp_path / "mine").mkdir()
    check_place(tmp_path / "mine", folder=True)
    check_place(tmp_path / "mine" / "x.png")
    assert sorted(contents(tmp_path)) == ["file", "mine"]


def test_data_errors_name_the_option(mgebm, trained, pictures, tmp_path):
    np.save(tmp_path / "x.npy", np.full((4, 8, 8), np.nan, np.float32))
    for call in (["train", "digits", "--out", tmp_path / "run"], ["evaluate", trained], ["inpaint", trained, "--json"]):
        line = one_line(mgebm(*call, "--data", tmp_path / "x.npy"))
        assert line.startswith("error: --data: pixels of x.npy must be finite")
    line = one_line(mgebm("train", "digits", "--data", tmp_path / "none", "--out", tmp_path / "run"))
    assert line.startswith("error: --data: ") and "none' is not a file, a folder or a built-in set" in line
    line = one_line(mgebm("train", "chimes", "--data", pictures, "--out", tmp_path / "run"))
    assert line == (
        "error: --data: a sound must be a .wav file, an .npy array or simulated:chimes, "
        f"got {str(pictures)!r}, a folder"
    )
    line = one_line(mgebm("train", "fire", "--data", "digits", "--out", tmp_path / "run"))
    assert line.startswith("error: --data: ")
    assert not (tmp_path / "run").exists()


def test_classify_names_its_options(mgebm, trained, tmp_path):
    line = one_line(mgebm("classify", trained, "--labels", "10,200"))
    assert line.startswith("error: --labels: must be at most 139")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    line = one_line(mgebm("classify", trained, "--data", tmp_path / "x.npy", "--labels", 2))
    assert line.startswith("error: --data: must be labelled, with at least two classes, got no labels")


def test_links_stay_links_pipes_are_refused_and_leftovers_go(mgebm, trained, tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "target.png")
    (tmp_path / ".target.png.999999999.tmp").write_text("half")
    os.mkfifo(tmp_path / "pipe.png")
    assert mgebm("sample", trained, "--num", 1, "--out", tmp_path / "link.png").exit_code == 0
    line = one_line(mgebm("sample", trained, "--num", 1, "--out", tmp_path / "pipe.png"))
    assert line.startswith("error: --out: must be a regular file or new, got ")
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "pipe.png").is_fifo()
    assert sorted(contents(tmp_path)) == ["link.png", "pipe.png", "target.png"]


def test_a_folder_of_samples_follows_the_umask(mgebm, trained, tmp_path):
    before = os.umask(0o077)
    try:
        assert mgebm("sample", trained, "--num", 1, "--out", tmp_path / "x").exit_code == 0
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o700


def test_a_console_without_a_reader_is_survived():
    with open("/dev/full", "w") as full:
        stream = _LastingStream(full)
        for _ in range(2):
            stream.write("words\n")
            stream.flush()
        assert stream.encoding == full.encoding


def test_a_command_whose_output_cannot_be_written_ends_with_one_line_and_quietly_where_its_reader_has_left(capfd):
    def code(file):
        with pytest.raises(SystemExit) as ended, file:
            stream = _Output(file)
            stream.write("words\n")
            stream.flush()
        return ended.value.code

    reading, writing = os.pipe()
    os.close(reading)
    assert code(os.fdopen(writing, "w")) == 0 and capfd.readouterr().err == ""
    assert code(open("/dev/full", "w")) == 2
    assert capfd.readouterr().err == "error: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("command", ["sample", "evaluate", "diagnose"])
def test_more_samples_than_a_command_can_draw_are_refused_at_once(mgebm, trained, command):
    line = one_line(mgebm(command, trained, "--num", 10**12))
    assert line.startswith("error: --num: must be less than or equal to 10000000, got 1000000000000")


def test_every_number_that_an_option_takes_has_bounds():
    numbers = {}
    for command in app.registered_commands:
        for name, hint in typing.get_type_hints(command.callback, include_extras=True).items():
            kind, *about = typing.get_args(hint) or (hint,)
            if kind is int or int in typing.get_args(kind):
                numbers[command.callback.__name__, name] = about[0]
    assert ("sample", "num") in numbers and ("report", "threads") in numbers
    assert [place for place, option in numbers.items() if option.min is None or option.max is None] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("report {}" + " {}" * 100, "run: must be at most 100 runs, got 101"),
        ("classify {}" + " {}" * 100, "run: must be at most 100 runs, got 101"),
        ("classify {} --labels " + ",".join(map(str, range(2, 200))), "--labels: must be at most 100 numbers, got 198"),
        ("score {}" + " digits" * 1001, "images: must be at most 1,000 sets; a folder of images is one set, got 1,001"),
        ("compare digits digits-cd --out new --seeds " + ",".join(map(str, range(501))),
         "--seeds: must be at most 1,000 runs of presets, got 1,002"),
        ("sample {} --interpolate 1000000", "--interpolate: must be at most 10,000,000 images, NUM rows of POINTS"),
        ("sample {} --first-sample 4294967295", "--first-sample: must leave --num 64 samples below 2**32, got 429496"),
    ],
)  # fmt: skip
def test_longer_lists_than_a_command_can_take_are_refused_at_once(mgebm, trained, words, message):
    assert message in one_line(mgebm(*words.replace("{}", str(trained)).split(" ")))


def test_closed_streams_are_opened_again():
    program = "import os, sys; from mgebm_fast.cli.app import secure_console; secure_console(); os.fstat(2); print()"
    command = f"exec {sys.executable} -c '{program}; sys.stderr.write(str(0))' <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
