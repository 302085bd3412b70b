"""`mgebm train`: run folders, resuming, and one clear line for every bad input."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from helpers import forked
from helpers.console import one_line
from PIL import Image
from safetensors.torch import load_file

from mgebm_fast.cli import main
from mgebm_fast.errors import DivergenceError
from mgebm_fast.learning import Run, load_config

from .conftest import TINY


@pytest.fixture
def pictures(tmp_path):
    """Six images that can be read."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def same_tensors(path, expected):
    tensors = load_file(path)
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in tensors)


def test_a_run_folder_holds_what_the_help_says(mgebm, trained):
    help_text = mgebm("train", "--help").stdout
    section = help_text.partition("In the run folder:")[2].partition("Arguments")[0]
    named = re.findall(r"^ +((?:[\w.]+/?, )?[\w.]+/?)  ", section, flags=re.MULTILINE)
    entries = {entry.rstrip("/") for names in named for entry in names.split(", ")}
    assert "collapse.json" in entries  # of a run that collapsed alone
    assert entries - {"collapse.json"} == {path.name for path in trained.iterdir()}


def test_overrides_reach_the_stored_configuration(trained):
    config = load_config(trained / "config.toml")
    assert (config.steps, config.langevin.steps, config.batch_size, config.width) == (2, 2, 32, 0.1)
    assert config.name == "digits"


def test_every_preset_has_the_common_keys():
    from mgebm_fast.learning import apply_overrides, load_preset, preset_names

    common = "steps=3 langevin.steps=2 seed=1 batch_size=2 checkpoint_every=1 sample_every=1 width=0.5 sizes=1,2,4"
    for name in preset_names():
        config = apply_overrides(load_preset(name), common.split())
        assert (config.steps, config.seed, config.sizes) == (3, 1, (1, 2, 4))


def test_the_default_folder_is_runs_and_the_name(mgebm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mgebm("train", "digits", *TINY, "--set", "steps=0").exit_code == 0
    assert (tmp_path / "runs" / "digits" / "config.toml").is_file()


def test_a_configuration_file_trains(mgebm, trained, tmp_path):
    result = mgebm("train", trained / "config.toml", "--out", tmp_path / "again", "--seed", str(2**64 - 1))
    assert result.exit_code == 0, result.output
    assert load_config(tmp_path / "again" / "config.toml").seed == 2**64 - 1


def test_the_same_seed_gives_the_same_model(mgebm, trained, tmp_path):
    again = tmp_path / "again"
    assert mgebm("train", "digits", *TINY, "--set", "checkpoint_every=1", "--out", again).exit_code == 0
    assert same_tensors(again / "model.safetensors", load_file(trained / "model.safetensors"))


def test_a_folder_with_the_name_of_a_built_in_set_is_pointed_out(mgebm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    result = mgebm("train", "digits", "--data", "digits", *TINY, "--set", "steps=0", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "./digits" in result.stderr and "builtin:digits" in result.stderr
    assert not (tmp_path / "run").exists()


def test_resume_goes_on_and_needs_no_preset(mgebm, run):
    result = mgebm("train", "--out", run, "--resume", "--set", "steps=4")
    assert result.exit_code == 0, result.output
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 4
    assert (run / "checkpoints" / "step_000004" / "optimiser.safetensors").is_file()


def test_a_longer_run_has_its_nets_join_where_they_did(mgebm, tmp_path):
    out = tmp_path / "run"
    grown = ["--set", "sizes=1,4,8", "--set", "begin=0,0.5", "--set", "log_every=1"]
    assert mgebm("train", "digits", *TINY, *grown, "--set", "steps=4", "--out", out).exit_code == 0
    assert mgebm("train", "--out", out, "--resume", "--set", "steps=9").exit_code == 0
    assert Run(out).config.first_updates() == (0, 2) and Run(out).config.steps == 9
    assert [record["step"] for record in Run(out).metrics() if "size_8/gap" in record] == [3, 4, 5, 6, 7, 8, 9]


def test_a_run_killed_before_it_had_a_configuration_begins(mgebm, tmp_path):
    result = mgebm("train", "digits", *TINY, "--set", "steps=1", "--out", tmp_path / "run", "--resume")
    assert result.exit_code == 0 and "no checkpoint yet, training starts from the beginning" in result.stderr
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_configuration_of_a_run_resumes_that_run_and_no_other_of_its_name(mgebm, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "runs" / "digits"
    shutil.copytree(run, other)
    for lost in ("none", "checkpoints"):  # a run that was killed before its first one too
        shutil.rmtree(run / lost, ignore_errors=True)
        assert mgebm("train", run / "config.toml", "--resume", "--set", "steps=3").exit_code == 0
        assert [found.config.steps for found in (Run(run), Run(other))] == [3, 2]


def test_resume_of_a_finished_run_changes_nothing(mgebm, run):
    before = load_file(run / "model.safetensors"), (run / "metrics.jsonl").read_bytes()
    assert mgebm("train", "digits", "--out", run, "--resume").exit_code == 0
    assert same_tensors(run / "model.safetensors", before[0])
    assert (run / "metrics.jsonl").read_bytes() == before[1]


def test_data_of_a_path_is_stored_so_that_it_is_found_from_elsewhere(mgebm, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    result = mgebm("train", "cifar10", "--data", "pictures", *TINY, "--set", "sizes=1,2,4", "--out", run)
    assert result.exit_code == 0, result.output
    monkeypatch.chdir("/")
    assert load_config(run / "config.toml").data == str(pictures)
    assert mgebm("train", "--out", run, "--resume", "--set", "steps=3").exit_code == 0


def test_unreadable_images_of_the_held_out_part_are_told_of_and_refused(mgebm, pictures, tmp_path):
    from mgebm_fast import data

    held = data.load(pictures, size=12, channels=3, split="held_out").images
    (path,) = [p for p in pictures.iterdir() if np.array_equal(np.asarray(Image.open(p)).transpose(2, 0, 1), held[0])]
    path.write_bytes(b"")
    result = mgebm("train", "cifar10", "--data", pictures, "--out", tmp_path / "run", *TINY)
    assert result.exit_code == 0 and path.name in result.stderr
    assert path.name in one_line(
        mgebm("train", "cifar10", "--data", pictures, "--out", tmp_path / "strict", "--strict", *TINY)
    )
    # With nothing readable held out, what is measured has no real twin.
    found = json.loads(mgebm("evaluate", tmp_path / "run", "--num", 4, "--json").stdout)
    assert found["num_real"] == 0 and found["kid_real"] is None


def test_unreadable_images_are_listed_and_skipped(mgebm, pictures, tmp_path):
    (pictures / "zero.png").write_bytes(b"")
    (pictures / "corrupt.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    arguments = ["train", "cifar10", "--data", pictures, *TINY, "--set", "sizes=1,2,4"]
    result = mgebm(*arguments, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "2 of " in result.stderr and "zero.png" in result.stderr and "corrupt.png" in result.stderr
    message = one_line(mgebm(*arguments, "--out", tmp_path / "strict", "--strict"))
    assert ".png" in message
    assert not (tmp_path / "strict").exists()


BAD = {
    "unknown preset": (["digts"], "did you mean 'digits'"),
    "no such file": (["missing.toml"], "missing.toml"),
    "unknown key": (["digits", "--set", "batchsize=3"], "did you mean 'batch_size'"),
    "unknown key of a section": (["digits", "--set", "langevin.step=3"], "did you mean 'langevin.steps'"),
    "misspelt section": (["digits", "--set", "langevn.steps=3"], "did you mean 'langevin.steps'"),
    "key without its section": (["digits", "--set", "lr=1e-3"], "did you mean 'optimiser.lr'"),
    "no value": (["digits", "--set", "steps"], "key=value"),
    "wrong type": (["digits", "--set", "steps=many"], "steps must be"),
    "sizes that do not divide": (["digits", "--set", "sizes=1,3,8"], "3 does not divide 8"),
    "negative step size": (
        [
            "digits",
            "--set",
            "langevin.drift=none",
            "--set",
            "langevin.noise_std=none",
            "--set",
            "langevin.step_size=-1",
        ],
        "step_size must be",
    ),
    "both forms": (["digits", "--set", "langevin.step_size=0.3", "--set", "langevin.drift=1"], "step_size"),
    "channels": (["digits", "--set", "channels=2"], "channels"),
    "unknown data": (["digits", "--data", "digit"], "did you mean 'digits'"),
    "unknown class": (["digits", "--set", "classes=eleven"], "eleven"),
    "device": (["digits", "--device", "gpu"], "--device"),
    "no such GPU": (["digits", "--device", "cuda:99"], "cuda:99"),
    "threads": (["digits", "--threads", "100000"], "--threads"),
    "precision": (["digits", "--precision", "fp8"], "precision"),
    "seed": (["digits", "--seed", "-1"], "--seed"),
    "nothing to resume": (["--resume"], "no config.toml"),
    "neither preset nor run": ([], "preset"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(mgebm, tmp_path, name):
    arguments, message = BAD[name]
    out = tmp_path / "run"
    assert message in one_line(mgebm("train", *TINY, *arguments, "--out", out))
    assert not out.exists()


def test_bad_data_is_one_line_and_leaves_nothing(mgebm, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    bomb = tmp_path / "bomb.zip"
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with zipfile.ZipFile(bomb, "w") as archive:
        archive.writestr("../outside.png", picture.getvalue())
    truncated = tmp_path / "truncated.zip"
    truncated.write_bytes(bomb.read_bytes()[:40])
    nan = tmp_path / "nan.npy"
    np.save(nan, np.full((4, 8, 8, 3), np.nan, np.float32))
    for source in (empty, bomb, truncated, nan):
        out = tmp_path / "run"
        message = one_line(mgebm("train", "cifar10", "--data", source, *TINY, "--out", out))
        assert source.name in message
        assert not out.exists()
    assert not (tmp_path / "outside.png").exists()


def test_a_folder_in_use_is_refused_and_left_alone(mgebm, run):
    before = sorted(path.name for path in run.rglob("*"))
    assert "--resume" in one_line(mgebm("train", "digits", *TINY, "--out", run))
    assert sorted(path.name for path in run.rglob("*")) == before


def test_a_file_in_place_of_the_folder_is_refused(mgebm, tmp_path):
    (tmp_path / "run").write_text("mine")
    one_line(mgebm("train", "digits", *TINY, "--out", tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_resume_refuses_another_preset_or_another_model(mgebm, run):
    assert "'digits'" in one_line(mgebm("train", "cifar10", "--out", run, "--resume"))
    for change in ("width=0.2", "sizes=1,2,4", "langevin.steps=3", "seed=9"):
        assert change.partition("=")[0] in one_line(
            mgebm("train", "--out", run, "--resume", "--set", change, "--set", "steps=3")
        )


def test_resume_of_a_truncated_checkpoint_falls_back_or_says_so(mgebm, run):
    last = run / "checkpoints" / "step_000002" / "model.safetensors"
    last.write_bytes(last.read_bytes()[:100])
    result = mgebm("train", "--out", run, "--resume", "--set", "steps=3")
    assert result.exit_code == 0 and "truncated" in result.stderr, result.output
    for path in run.glob("checkpoints/*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert "truncated" in one_line(mgebm("train", "--out", run, "--resume", "--set", "steps=4"))


def test_divergence_is_exit_code_1(mgebm, tmp_path, monkeypatch):
    import mgebm_fast.learning

    def diverge(*args, **kwargs):
        raise DivergenceError("cascade: grid 2 (size 4): the chain became non-finite at step 7")

    monkeypatch.setattr(mgebm_fast.learning, "train", diverge)
    message = one_line(mgebm("train", "digits", *TINY, "--out", tmp_path / "run"), code=1)
    assert "grid 2" in message and "step 7" in message


def test_the_environment_shows_the_traceback(mgebm, tmp_path, monkeypatch):
    monkeypatch.setenv("MGEBM_DEBUG", "1")
    result = mgebm("train", "digts", "--out", tmp_path / "run")
    assert result.exit_code == 2 and "Traceback" in result.stderr and "error: preset" in result.stderr


def test_ctrl_c_saves_says_how_to_go_on_and_exits_with_130(tmp_path, mgebm):
    out = tmp_path / "run"
    arguments = [word.replace("steps=2", "steps=100000") if word == "steps=2" else word for word in TINY]
    said = tmp_path / "said"
    process = forked.start(said, main, ["train", "digits", *arguments, "--out", str(out)])
    deadline = time.monotonic() + 200  # an interrupt before the first update has nothing to resume
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline and process.is_alive():
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(200)
    errors = said.read_text()
    assert process.exitcode == 130, errors
    assert f"mgebm train --out {out} --resume" in errors and "Traceback" not in errors
    made = int(max((out / "checkpoints").iterdir()).name.removeprefix("step_"))
    assert made >= 1
    assert mgebm("train", "--out", out, "--resume", "--set", f"steps={made + 1}").exit_code == 0


def test_a_preset_and_a_toml_file_name_data_as_the_option_does(mgebm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mgebm("train", "digits", *TINY, "--set", "steps=0", "--out", "earlier")
    (tmp_path / "digits").mkdir()
    (tmp_path / "mine.toml").write_text('name = "mine"\nbase = "digits"\nsteps = 0\n')
    for name, called in (("digits", "digits"), ("mine.toml", "mine")):
        result = mgebm("train", name, "--out", "run")
        assert result.exit_code == 2 and not (tmp_path / "run").exists()
        assert f"data of {called!r}: 'digits' is a built-in set and also lies in this folder" in result.stderr
    taken = mgebm("train", "mine.toml", *TINY, "--set", "steps=0", "--data", "builtin:digits", "--out", "run")
    assert taken.exit_code == 0, taken.output
    assert mgebm("train", "--out", "earlier", "--resume").exit_code == 0  # a run keeps the set that it began with


def test_a_run_starts_from_another(mgebm, trained, pictures, tmp_path):
    result = mgebm("train", "--from", trained, "--data", pictures, "--set", "batch_size=2", "--out", tmp_path / "tuned")
    assert result.exit_code == 0, result.output
    assert f"weights of {trained}: taken: size 2, 4, 8" in "".join(result.stderr.splitlines())
    config = load_config(tmp_path / "tuned" / "config.toml")
    assert config.start_from == str(trained) and config.width == 0.1 and config.data == str(pictures)
    again = mgebm("train", "--out", tmp_path / "tuned", "--resume", "--set", "start_from=elsewhere")
    assert "resume: start_from must be" in one_line(again)
    for arguments, words in (
        (("digits", "--from", trained, "--set", "width=0.3"), "--from: layers of size 2 must be"),
        (("digits", "--from", f"{trained}x"), "does not exist"),
        (("--from", trained, "--resume"), "--from: must be left out beside --resume"),
        (("digits", "--from-optimiser"), "--from-optimiser: must be beside --from RUN"),
    ):
        assert words in one_line(mgebm("train", *arguments, "--out", tmp_path / "no")), arguments
        assert not (tmp_path / "no").exists()


def test_nets_that_are_taken_from_a_run_do_not_wait(mgebm, tmp_path):
    """Where the configuration is that run's too; with a preset it is the preset's."""
    late = (*TINY, "--set", "sizes=1,2,4", "--set", "begin=0,0.5")
    assert mgebm("train", "digits", *late, "--out", tmp_path / "late").exit_code == 0
    for preset, begin in ((), 0.0), (("digits", *late), (0.0, 0.5)):
        out = tmp_path / f"from{len(preset)}"
        assert mgebm("train", *preset, "--from", tmp_path / "late", "--set", "steps=2", "--out", out).exit_code == 0
        assert load_config(out / "config.toml").begin == begin
