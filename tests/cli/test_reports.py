"""`mgebm evaluate`, `presets`, `doctor`, the help of every command, and `python -m mgebm_fast`."""

from __future__ import annotations

import contextlib
import json
import re
import runpy
import subprocess
import sys

import pytest
from helpers.console import one_line
from typer.testing import CliRunner

import mgebm_fast as mg
from mgebm_fast import __version__, doctor, native
from mgebm_fast.cli import app
from mgebm_fast.evaluation import features
from mgebm_fast.learning import preset_names

COMMANDS = ("train", "sample", "evaluate", "bench", "presets", "doctor")


def test_evaluate_prints_one_object_on_stdout(mgebm, trained):
    result = mgebm("evaluate", trained, "--num", 40, "--seed", 7, "--json")  # a seed whose judges no test has fitted
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert figures["num"] == 40
    for name in ("kid", "fid", "nearest_distance", "confident_share", "class_shares"):
        assert f"{name}_real" in figures
    assert set(figures["class_shares"]) == set("0123456789")
    assert figures["confident_share_noise"] <= 0.02
    for doing in ("drawing 40 samples", "the feature space", "FID and KID"):  # no terminal: lines
        assert f"{doing}\n" in result.stderr


def test_evaluate_takes_other_steps_and_precisions(mgebm, trained, monkeypatch):
    asked = []
    sample = mg.MultiGrid.sample
    monkeypatch.setattr(
        mg.MultiGrid,
        "sample",
        lambda self, *args, **options: asked.append((self.sample_steps, options)) or sample(self, *args, **options),
    )
    result = mgebm("evaluate", trained, "--num", 8, "--seed", 3, "--steps", 3, "--precision", "fp32", "--json")
    assert asked == [(3, {"seed": 3, "precision": "fp32"})] and json.loads(result.stdout)["num"] == 8
    notes = json.loads(result.stdout)["notes"]
    assert {"chains of 3 steps a grid (--steps)", "chains with gradients in fp32 (--precision)"} <= set(notes)
    refused = mgebm("evaluate", trained, "--num", 8, "--steps", 3, "--record")
    assert "--record: must be left out with --steps 3: it is for the model's own samples" in one_line(refused)


def test_evaluate_says_that_a_model_is_from_before_a_collapse(mgebm, run, monkeypatch):
    monkeypatch.setattr(features.feature_space, "__kwdefaults__", {"seed": 0, "visits": 64})
    (run / "collapse.json").write_text(json.dumps({"update": 9, "model": 2, "why": "the gap of size 8 grew"}))
    words = "the run collapsed at update 9; its model is that of update 2, the best from before the collapse"
    assert words in json.loads(mgebm("evaluate", run, "--num", 8, "--json").stdout)["notes"]
    assert words in " ".join(mgebm("evaluate", run, "--num", 8).stdout.split())
    alone = json.loads(mgebm("evaluate", run / "checkpoints/step_000001", "--num", 8, "--json").stdout)
    assert words not in alone["notes"]  # a checkpoint is what it is
    (run / "collapse.json").write_text("{}")
    assert "collapse.json" in one_line(mgebm("evaluate", run, "--num", 8))


def test_a_model_file_alone_needs_data_and_people_get_tables(mgebm, trained, tmp_path):
    alone = tmp_path / "model.safetensors"
    alone.write_bytes((trained / "model.safetensors").read_bytes())
    assert "--data" in one_line(mgebm("evaluate", alone, "--num", 20))
    result = mgebm("evaluate", alone, "--num", 20, "--data", "digits")
    assert result.exit_code == 0, result.output
    assert "20 samples" in result.stdout and "FID" in result.stdout


def test_presets_are_listed(mgebm):
    listed = json.loads(mgebm("presets", "--json").stdout)
    assert [entry["name"] for entry in listed] == preset_names()
    text = mgebm("presets").stdout
    for entry in listed:
        assert entry["name"] in text and entry["description"] in text


def test_doctor_says_what_is_usable_and_why_the_rest_is_not(mgebm):
    report = json.loads(mgebm("doctor", "--json").stdout)
    assert report["package"]["version"] == __version__
    for part in ("native", "cuda", "triton"):
        entry = report[part]
        assert entry["usable"] != bool(entry["why_not"]), (part, entry)
        assert entry["usable"] or entry["how"], (part, entry)
    if native.available():
        assert report["native"]["level"] == native.isa()
        assert "portable" in [level["name"] for level in report["native"]["levels"] if level["usable"]]
    text = mgebm("doctor").stdout
    assert "native C++" in text and "native CUDA" in text and "Triton" in text and "optional packages" in text


def test_doctor_without_the_compiled_module_still_reports(mgebm, monkeypatch):
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "load_error", ImportError("libgomp.so.1: cannot open shared object file"))
    text = doctor.render(doctor.examine())
    assert "libgomp.so.1" in text and doctor.REBUILD in text


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("80;90+PTX", "80", True),
        ("80;90+PTX", "86", True),
        ("80;90+PTX", "75", False),
        ("80;90+PTX", "120", True),
        ("80;90", "100", False),
        ("8.6,9.0a", "80", False),
        ("8.6,9.0a", "90", True),
    ],
)
def test_doctor_knows_which_gpus_a_build_covers(archs, capability, covered):
    assert doctor.covers(archs, capability) is covered


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(mgebm, command):
    result = mgebm(command, "--help")
    assert result.exit_code == 0
    assert f"  mgebm {command}" in result.stdout


@pytest.mark.parametrize("width", [50, 80])
def test_help_is_as_narrow_as_the_terminal_and_its_examples_stay_whole(width):
    def shown(command):
        return CliRunner().invoke(app, [command, "--help"], terminal_width=width).stdout

    for command in COMMANDS:
        assert max(map(len, shown(command).splitlines())) <= width, command
    whole = re.sub(r" \\\n +", " ", shown("score"))
    assert "mgebm score runs/digits letters.npy noise.npy --figure scores.png\n" in whole


def test_an_unknown_command_is_told(mgebm):
    result = mgebm("trian")
    assert result.exit_code == 2 and "trian" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "x", "--num", "0"], "--num: .*0"),
        (["sample", "x", "--num=0"], "--num: .*0"),
        (["sample", "x", "--num", "many"], "--num: .*many"),
        (["evaluate", "x", "--seed", "-1"], "--seed: .*-1"),
        (["sample", "x", "--numm", "3"], "[Nn]o such option.*--numm"),
        (["sample"], "[Mm]issing argument.*RUN"),
    ],
)
def test_wrong_options_are_told_in_one_line_with_what_was_given(mgebm, arguments, message):
    result = mgebm(*arguments)
    (line,) = result.stderr.splitlines()
    assert result.exit_code == 2 and re.match(f"error: {message}", line) and f"mgebm {arguments[0]} -h" in line


def test_python_m_is_the_doctor_and_with_arguments_the_command_line(monkeypatch, capsys):
    for arguments, words in (([], f"mgebm_fast {__version__}"), (["presets"], "digits")):
        monkeypatch.setattr(sys, "argv", ["mgebm_fast", *arguments])
        with contextlib.suppress(SystemExit):
            runpy.run_module("mgebm_fast", run_name="__main__")
        said = capsys.readouterr().out
        assert words in said and (arguments or said.startswith(words))


def test_help_does_not_load_torch():
    code = "import sys, mgebm_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
