"""`mgebm compare` end to end: tiny runs, used again, gone on with, and refused where they are others'."""

from __future__ import annotations

import csv
import functools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mgebm_fast.errors import DivergenceError
from mgebm_fast.evaluation.comparison import compare as comparison
from mgebm_fast.evaluation.comparison import table
from mgebm_fast.learning import Run, load_config, work

SEEDS, INPAINTED = ("0", "1"), 20
SMALL = ["--set", "steps=2", "--set", "langevin.steps=2", "--set", "batch_size=32", "--set", "width=0.1"]
SMALL += ["--set", "checkpoint_every=2"]  # of which the best state is measured
ARGUMENTS = ["compare", "digits", "digits-pcd", "--seeds", ",".join(SEEDS), *SMALL, "--num", 40, "--threads", 1]


@pytest.fixture(autouse=True, scope="module")
def few_inpainted():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "Settings", functools.partial(comparison.Settings, inpainted=INPAINTED))
        yield


@pytest.fixture(scope="module")
def compared(mgebm, tmp_path_factory):
    """A comparison, and what it printed."""
    out = tmp_path_factory.mktemp("compared") / "out"
    result = mgebm(*ARGUMENTS, "--json", "--out", out)
    assert result.exit_code == 0, result.output
    return out, json.loads(result.stdout)


@pytest.fixture
def copy(compared, tmp_path):
    return shutil.copytree(compared[0], tmp_path / "out")


@pytest.fixture
def measured_before(compared, monkeypatch):
    """Measuring gives the figures that were measured in the comparison."""
    records = {(run["preset"], run["seed"]): run for run in compared[1]["runs"]}

    def measured(entry, *_):
        record = records[entry.preset, entry.config.seed]
        return {key: value for key, value in record.items() if key not in ("conditions", "crc32")}

    monkeypatch.setattr(comparison, "fit_judges", lambda *_, **__: None)
    monkeypatch.setattr(comparison, "measured", measured)


def stamps(out):
    return {path: path.stat().st_mtime_ns for path in [*out.glob("*/seed-*.json"), *out.glob("*/*/model.safetensors")]}


def test_runs_are_those_of_train(compared, mgebm, tmp_path):
    out, _ = compared
    mgebm("train", "digits-pcd", *SMALL, "--set", "seed=1", "--threads", 1, "--out", tmp_path / "run")
    ours, theirs = (path / "model.safetensors" for path in (out / "digits-pcd" / "seed-1", tmp_path / "run"))
    assert ours.read_bytes() == theirs.read_bytes()
    runs = Run(out / "digits-pcd" / "seed-1"), Run(tmp_path / "run")
    assert runs[0].config == runs[1].config
    timeless = [[{k: v for k, v in r.items() if "seconds" not in k} for r in run.metrics()] for run in runs]
    assert timeless[0] == timeless[1] and "held_out/energy_distance" in timeless[0][-1]


def test_figures_are_those_of_evaluate_and_inpaint(compared, mgebm):
    out, found = compared
    run = out / "digits" / "seed-1"
    figures = found["runs"][1]["figures"]
    assert (found["runs"][1]["preset"], found["runs"][1]["seed"]) == ("digits", 1)
    evaluated = json.loads(mgebm("evaluate", run, "--num", 40, "--seed", 0, "--threads", 1, "--json").stdout)
    for key in ("kid", "fid", "fid_matched", "confident_share", "nearest_distance"):
        assert figures[key] == pytest.approx(evaluated[key], rel=1e-9, abs=1e-12), key
    assert figures["smallest_class_share"] == min(evaluated["class_shares"].values())
    filled = json.loads(mgebm("inpaint", run, "--mask", "pepper", "--num", INPAINTED, "--threads", 1, "--json").stdout)
    assert figures["pepper_error"] == pytest.approx(filled["error"], rel=1e-9)
    lengths = found["runs"][1]["inpainting"]
    assert list(lengths) == ["square", "doodle", "pepper"] and lengths["pepper"]["length"] == filled["length"]
    assert lengths["pepper"]["length_errors"] == pytest.approx(filled["length_errors"], rel=1e-9)
    assert json.loads((out / "digits" / "seed-1.json").read_text())["inpainting"] == lengths
    assert figures["pepper_psnr"] == pytest.approx(filled["psnr"], rel=1e-9)


def test_the_table_is_of_the_figures(compared):
    out, found = compared
    with (out / "figures.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(run["preset"], run["seed"]) for run in runs] == [(p, s) for p in ("digits", "digits-pcd") for s in SEEDS]
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row, pair in zip(rows, (runs[:2], runs[2:]), strict=True):
        kids = np.array([float(run["kid"]) for run in pair])
        assert float(row["kid"]) == pytest.approx(kids.mean()) and float(row["kid_sd"]) == pytest.approx(
            kids.std(ddof=1)
        )
    assert float(rows[0]["work"]) == 1.0 and found["table"][1]["work"] == pytest.approx(float(rows[1]["work"]))
    text = (out / "table.md").read_text()
    assert "| `digits-pcd` |" in text and "| held-out images |" in text and "| mean of the known pixels |" in text
    with Image.open(out / "samples.png") as picture:
        assert picture.height > 3 * 40  # data, and two methods
    assert found["real"]["kid"] is not None


def test_what_is_there_is_used(copy, mgebm):
    before = stamps(copy)
    result = mgebm(*ARGUMENTS, "--out", copy)
    assert result.exit_code == 0 and stamps(copy) == before and len(before) == 8
    assert "training" not in result.stderr and "measuring" not in result.stderr
    assert "Samples" in result.stdout and "In-painting" in result.stdout and "Cost" in result.stdout


def test_a_part_that_is_missing_is_made_again_and_equal(copy, compared, mgebm):
    (copy / "digits" / "seed-0.json").unlink()
    changed = copy / "digits" / "seed-1.json"  # the figures of another run, or damaged
    changed.write_text(changed.read_text().replace('"kid": ', '"kid": 1', 1))
    shutil.rmtree(copy / "digits-pcd" / "seed-1")
    found = json.loads(mgebm(*ARGUMENTS, "--json", "--out", copy).stdout)
    timeless = [
        [{k: v for k, v in run["figures"].items() if "seconds" not in k} for run in of["runs"]]
        for of in (found, compared[1])
    ]
    assert timeless[0] == timeless[1]


def test_a_model_from_before_a_collapse_is_measured_and_the_table_says_so(copy, mgebm):
    record = {"update": 9, "model": 2, "why": "the gap of size 8 grew"}
    (copy / "digits" / "seed-1" / "collapse.json").write_text(json.dumps(record))
    (copy / "digits" / "seed-1.json").unlink()
    runs = json.loads(mgebm(*ARGUMENTS, "--json", "--out", copy).stdout)["runs"]
    words = "the run collapsed at update 9; its model is that of update 2, the best from before the collapse"
    assert [run.get("collapse") for run in runs] == [None, words, None, None] and runs[1]["figures"]["kid"] is not None
    assert f"digits, seed 1: {words}." in (copy / "table.md").read_text()


def test_an_unfinished_run_goes_on(copy, compared, mgebm):
    run = copy / "digits" / "seed-0"
    shutil.rmtree(run)
    shorter = [*SMALL, "--set", "steps=1", "--set", "checkpoint_every=1"]
    mgebm("train", "digits", *shorter, "--threads", 1, "--out", run)
    (run / "model.safetensors").unlink()
    (run / "config.toml").write_text((compared[0] / "digits" / "seed-0" / "config.toml").read_text())
    result = mgebm(*ARGUMENTS, "--json", "--out", copy)
    assert result.exit_code == 0, result.output
    assert "digits, seed 0: going on with 2 updates" in result.stderr
    assert [record["step"] for record in Run(run).metrics()] == [1, 2], "the first update is not made again"
    assert json.loads(result.stdout)["runs"][0]["figures"]["kid"] == compared[1]["runs"][0]["figures"]["kid"]


def test_another_run_in_the_place_is_refused(copy, mgebm):
    before = stamps(copy)
    result = mgebm(*ARGUMENTS, "--set", "optimiser.lr=0.5", "--out", copy)
    assert result.exit_code == 2 and stamps(copy) == before
    assert "optimiser.lr must be 0.5, as this comparison trains digits, seed 0, got 0.004" in result.stderr
    assert mgebm(*ARGUMENTS, "--set", "log_every=1", "--out", copy).exit_code == 0, "a run stays what it is under that"


def test_other_settings_are_measured_again(copy, mgebm, measured_before):
    before = stamps(copy)
    assert mgebm(*ARGUMENTS[:-4], "--num", 30, "--threads", 1, "--out", copy).exit_code == 0
    changed = {path for path, stamp in stamps(copy).items() if stamp != before[path]}
    assert changed == set(copy.glob("*/seed-*.json"))


def test_a_generator_can_be_named(tmp_path, mgebm):
    result = mgebm("compare", "digits", "digits-abp", *SMALL, "--set", "seed=0", "--num", 20, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "--seeds" in result.stderr
    result = mgebm(
        "compare", "digits", "digits-abp", "--seeds", "3", *SMALL, "--num", 20, "--no-picture", "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)["runs"][1]["figures"]
    assert all(value is not None for value in figures.values())
    assert not (tmp_path / "out" / "kid.png").exists()


def test_a_run_that_diverges_is_reported_and_the_others_stand(tmp_path, mgebm, monkeypatch, measured_before):
    whole = comparison.train

    def train(config, **arguments):
        if config.method == "pcd":
            raise DivergenceError("training: size_8/gap became non-finite at update 2")
        return whole(config, **arguments)

    monkeypatch.setattr(comparison, "train", train)
    result = mgebm(*ARGUMENTS[:3], "--seeds", "0", *SMALL, "--num", 20, "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert "became non-finite" in found["runs"][1]["failed"] and found["runs"][0]["figures"]["kid"] is not None
    assert "digits-pcd: 1 of 1 runs diverged" in (tmp_path / "out" / "table.md").read_text()


def test_an_interrupt_while_figures_are_measured_says_how_to_go_on(copy, mgebm, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    (copy / "digits-pcd" / "seed-1.json").write_text('{"conditions": {"version"')
    before = stamps(copy)
    monkeypatch.setattr(comparison, "measured", interrupted)
    result = mgebm(*ARGUMENTS, "--out", copy)
    assert result.exit_code == 130 and stamps(copy) == before
    assert "interrupted; " in result.stderr and "mgebm compare digits digits-pcd --out" in result.stderr


def test_equal_work_chooses_the_updates(tmp_path, mgebm, monkeypatch, measured_before):
    chosen = ["compare", "digits", "digits-pcd", "--seeds", "0", *SMALL, "--set", "steps=30", "--num", 20]
    result = mgebm(*chosen, "--equal-work", "--json", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    first, other = (
        load_config(tmp_path / "out" / name / "seed-0" / "config.toml") for name in ("digits", "digits-pcd")
    )
    assert first.steps == 30 and other.steps != 30
    assert work(first) == pytest.approx(work(other), rel=0.5 / other.steps)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "train", interrupted)
    result = mgebm(*chosen, "--equal-work", "--out", tmp_path / "other")
    assert result.exit_code == 130 and "--equal-work" in result.stderr.splitlines()[-1], result.stderr


def test_models_that_made_no_update_have_no_share_of_work(compared):
    rows = table.tabulate([{**run, "work": 0} for run in compared[1]["runs"]])
    assert [row["work"] for row in rows] == [None, None] and all(row["kid"] is not None for row in rows)
    assert "None" not in table.markdown(rows, compared[1]["runs"])


@pytest.mark.parametrize("seeds", ["", "a", "0,0", "-1", "1,,2", str(2**64)])
def test_seeds_are_checked(seeds, mgebm, tmp_path):
    result = mgebm("compare", "digits", "--seeds", seeds, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "--seeds: must be different whole numbers" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_that_learnt_from_other_images_is_refused(copy, mgebm):
    path = copy / "digits" / "seed-0" / "data.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "0" * 64, "names": None, "content": None}))
    result = mgebm(*ARGUMENTS, "--out", copy)
    assert result.exit_code == 2 and "data must be the images that digits, seed 0 learnt from" in result.stderr
