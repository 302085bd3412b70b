"""`mgebm bench` at tiny sizes: tables, files, JSON, and one clear line for every bad input."""

from __future__ import annotations

import json
import sys

import pytest
from helpers.console import one_line

from mgebm_fast.benchmarks import ops, picture, timing
from mgebm_fast.benchmarks.cases import Case
from mgebm_fast.benchmarks.contenders import CONTENDERS
from mgebm_fast.benchmarks.report import read_csv


@pytest.fixture(autouse=True, scope="module")
def small_ceilings():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(timing.MATRIX_SIZE, "cpu", 64)
        timing.matrix_rate.cache_clear()
        yield
    timing.matrix_rate.cache_clear()


def test_a_table_and_its_file(mgebm, tmp_path):
    result = mgebm("bench", "--tiny", "--only", "4", "--csv", tmp_path / "new", "--device", "cpu")
    assert result.exit_code == 0, result.output
    for name in ("mgebm_auto", "mgebm_fp32", "plain_loop", "seed_loop", "bf16_cast_loop"):
        assert name in result.stdout
        for doing in ("checking", "timing"):  # no terminal: a line for each, at least once
            assert f"2/2  4: {doing} {name}\n" in result.stderr
    rows = read_csv(tmp_path / "new" / "chains.csv")
    assert [row.contender for row in rows if row.ok][:3] == ["mgebm_auto", "mgebm_fp32", "plain_loop"]


def test_a_loop_whose_precision_the_cpu_only_emulates_is_left_out_unless_it_is_named(mgebm, monkeypatch):
    monkeypatch.setattr(timing, "ceilings", lambda device: {"fp32": 9e9, "bf16": 1e9, "copy": 1e9})
    tiny = Case("chains", "4", 4, 1, (4,), width=0.25)
    monkeypatch.setattr(sys.modules[Case.__module__], "cases", lambda *a, **named: [tiny])
    result = mgebm("bench", "--json", "--device", "cpu")
    names = [row["contender"] for row in json.loads(result.stdout)["rows"]]
    assert names == ["mgebm_auto", "mgebm_fp32", "plain_loop", "seed_loop"]
    assert "bf16_cast_loop: left out" in result.stderr
    named = mgebm("bench", "--json", "--device", "cpu", "--against", "bf16_cast_loop")
    assert "bf16_cast_loop" in named.stdout and "left out" not in named.stderr


def test_json_is_one_object_on_stdout(mgebm):
    which = ["--only", "digits", "--against", "mgebm_fp32", "--device", "cpu"]
    result = mgebm("bench", "training", "--tiny", *which, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert [row["contender"] for row in found["rows"]] == ["mgebm_fp32", "plain_loop"]
    assert all(row["status"] == "ok" and row["unit"] == "update" and row["ms"] > 0 for row in found["rows"])


def test_pictures_are_drawn_beside_the_files(mgebm, tmp_path):
    pytest.importorskip("matplotlib")
    result = mgebm("bench", "--tiny", "--only", "4", "--csv", tmp_path, "--plot", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "chains.svg").read_text().lstrip().startswith("<?xml")


def test_lists_every_case_and_contender(mgebm):
    text = mgebm("bench", "--list").stdout
    listed = json.loads(mgebm("bench", "--list", "--json").stdout)
    for name in [case["name"] for case in listed["cases"]] + list(CONTENDERS):
        assert f"  {name} " in text
    assert {contender["name"] for contender in listed["contenders"]} == set(CONTENDERS)


BAD = {
    "table": (["chain"], "did you mean 'chains'"),
    "case": (["--only", "cascad"], "did you mean 'cascade'"),
    "case of another table": (["training", "--only", "64"], "must be one of digits"),
    "contender": (["--against", "plan_loop"], "did you mean 'plain_loop'"),
    "device": (["--device", "gpu"], "--device"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(mgebm, tmp_path, name):
    arguments, message = BAD[name]
    assert message in one_line(mgebm("bench", "--tiny", *arguments, "--csv", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(mgebm, monkeypatch):
    monkeypatch.setattr(picture, "why_not", lambda: "matplotlib is missing: pip install 'mgebm_fast[plot]'")
    assert "mgebm_fast[plot]" in one_line(mgebm("bench", "--tiny", "--plot"))


def test_ops_without_the_source_folder_say_what_to_do(mgebm, monkeypatch):
    monkeypatch.setattr(ops, "repository", lambda: None)
    message = one_line(mgebm("bench", "ops"))
    assert "clone" in message and "mgebm bench ops" in message
