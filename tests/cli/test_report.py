"""`mgebm report`: one page that needs nothing beside it, whole in a narrow window, and small."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.console import one_line
from PIL import Image

from mgebm_fast.evaluation import page as module
from mgebm_fast.evaluation.page import page
from mgebm_fast.learning import Run, load_preset
from mgebm_fast.learning.run import checkpoint

from .conftest import TINY


@pytest.fixture(scope="module")
def written(mgebm, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "deep" / "both.html"
    result = mgebm("report", trained, trained / "checkpoints" / "step_000002", "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{out}, " in result.stderr
    return out


def test_a_page_holds_pictures_curves_facts_and_nothing_from_elsewhere(written, trained):
    text = written.read_text()
    assert len(text) < 5e6 and text.count("<section>") == 2
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in text.replace("http-equiv", "")
    for words in (
        "energy gap",
        "gradient norm",
        "samples of seed 0 above, training images below",
        "2 of 2",
        "multigrid",
    ):
        assert words in text, words
    pictures = sorted((trained / "samples").glob("*.png"))
    first = text.partition("</section>")[0]
    assert first.count('<img alt="update ') == len(pictures) and first.count(" hidden>") == len(pictures) - 1
    assert "size 8</span>" in first and first.count("<polyline") >= 3
    assert "steps = 2" in first and "mgebm sample" in first


def test_what_a_run_lacks_is_said_and_names_are_escaped(run):
    broken = run.with_name("a<b>&c")
    run.rename(broken)
    shutil.rmtree(broken / "samples")
    (broken / "metrics.jsonl").unlink()
    (broken / "model.safetensors").unlink()
    shutil.rmtree(broken / "checkpoints")
    text = page([Run(broken)])
    assert "a&lt;b&gt;&amp;c" in text and "<b>" not in text
    for words in ("No pictures yet", "No records yet", "has no model to use", "not finished", "--resume"):
        assert words in text, words


def test_a_run_that_stopped_or_collapsed_is_not_reported_as_finished(run):
    config = run / "config.toml"
    assert "not finished" not in page([Run(run)]) and Run(run).finished
    config.write_text(re.sub(r"(?m)^steps = 2$", "steps = 4", config.read_text(), count=1))  # longer, and stopped
    text = page([Run(run)])
    assert "2 of 4, not finished" in text and f"mgebm train --out {run} --resume" in text and not Run(run).finished
    (run / "collapse.json").write_text(json.dumps({"update": 3, "model": 1, "why": "the gap of size 8 grew"}))
    text = page([Run(run)])
    assert "the run collapsed at update 3; its model is that of update 1" in text and not Run(run).finished
    assert "not finished" not in text and "--resume" not in text and "mgebm sample" in text


def test_figures_that_were_measured_are_drawn_and_put_on_a_card(mgebm, run, tmp_path):
    first, last = run / "checkpoints" / "step_000001", run
    for path in (last, first, first):
        result = mgebm("evaluate", path, "--num", 40, "--record", "--json")
        assert result.exit_code == 0, result.output
    assert [record["step"] for record in Run(run).evaluations()] == [1, 2]
    assert len((run / "evaluations.jsonl").read_text().splitlines()) == 3
    kid = Run(run).evaluations()[0]["samples, classifier/kid"]
    assert kid == json.loads(result.stdout)["kid"]
    text = page([Run(run)])
    assert "KID, lower is nearer" in text and "measured at 2" in text and "samples, classifier</span>" in text
    assert mgebm("export", run, tmp_path / "shared", "--to", "pretrained").exit_code == 0
    card = (tmp_path / "shared" / "README.md").read_text()
    own = Run(run).evaluations()[1]["samples, classifier/kid"]
    assert f"| samples, classifier/kid | {own:.6g} |" in card and "mgebm evaluate" in card
    for path in ("digits", run / "samples", tmp_path / "shared"):
        result = mgebm("evaluate", path, "--record")
        assert result.exit_code == 2 and "run" in one_line(result)
    assert "--record: run must be the folder of a trained run" in one_line(result)


@pytest.mark.parametrize("option", [("--data", "texture:brick"), ("--precision", "fp32"), ("--by-size",)])
def test_figures_of_other_data_or_chains_are_not_recorded(mgebm, run, option):
    line = one_line(mgebm("evaluate", run, "--num", 8, "--record", *option))
    assert f"--record: must be left out with {' '.join(option)}: it is for the" in line
    assert not (run / "evaluations.jsonl").exists()


def test_figures_of_a_checkpoint_that_was_set_aside_are_not_recorded(mgebm, run):
    aside = checkpoint.set_aside(run / "checkpoints" / "step_000002", "replaced")
    line = one_line(mgebm("evaluate", aside, "--num", 8, "--record"))
    assert line == f"error: --record: run must be one of the run's checkpoints, got {aside}, which was set aside"
    pattern = re.search(r"for step in runs/digits/(\S+);", (Path(__file__).parents[2] / "docs" / "cli.md").read_text())
    for name in ("step_000010", "step_000300.damaged"):
        (run / "checkpoints" / name).mkdir()
    assert sorted(path.name for path in run.glob(pattern[1])) == ["step_000000", "step_000001", "step_000010"]


def test_figures_against_the_data_of_the_run_are_recorded_where_these_are_named(mgebm, run):
    assert mgebm("evaluate", run, "--num", 8, "--record", "--data", "digits").exit_code == 0
    assert len(Run(run).evaluations()) == 1


def test_facts_are_those_of_the_method_and_of_what_is_there(mgebm, run, tmp_path):
    text = page([Run(run / "checkpoints" / "step_000001")])
    assert "<td>1 of 2</td>" in text and "--resume" not in text and "pictures are in the folder of the run" in text
    assert "<td>3600 of 3600</td>" in page([Run("digits")])
    one = Run(run)
    one.config = load_preset("digits-abp")
    assert "<td>1 → 2 → 4 → 8</td>" in text and "mgebm diagnose" in text
    assert "<td>8</td>" in (alone := page([one])) and "mgebm diagnose" not in alone
    with (run / "metrics.jsonl").open("w") as file:
        file.write('{"step": 1, "size_8/gap": 0.25}\n')
    single = page([Run(run)])
    assert single.count("<circle") == 1 and ">0.25</text>" in single


def test_many_large_pictures_are_thinned_out(run, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    for step in range(3, 60):
        Image.fromarray(noise).save(run / "samples" / f"step_{step:06d}.png")
    monkeypatch.setattr(module, "MOST_BYTES", 1_000_000)
    text = page([Run(run)])
    assert len(text) < 1_100_000 and text.count('<img alt="update ') >= 2 and 'alt="update 59"' in text
    monkeypatch.setattr(module, "MOST_BYTES", 100_000)  # less than one of them
    assert len(page([Run(run)])) < 200_000


def test_other_inputs_are_refused(mgebm, trained, tmp_path):
    assert "--out: must end in .html" in one_line(mgebm("report", trained, "--out", tmp_path / "x.pdf"))
    assert "does not exist" in one_line(mgebm("report", tmp_path / "none", "--out", tmp_path / "x.html"))
    assert not (tmp_path / "x.html").exists()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no headless chromium")
def test_nothing_is_cut_off_in_a_narrow_window_and_the_slider_works(written, tmp_path):
    probe = (
        "<script>const box = document.querySelector('.slider'), range = box.querySelector('input');"
        "range.value = 0; range.dispatchEvent(new Event('input'));"
        "document.title = [document.documentElement.scrollWidth <= innerWidth, box.querySelector('output').textContent,"
        " box.querySelectorAll('img:not([hidden])').length].join(' ');</script>"
    )
    path = tmp_path / "probe.html"
    path.write_text(written.read_text() + probe)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=400,900", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=60)
    assert re.search(r"<title>true update \d+ 1</title>", done.stdout), done.stdout[:300] + done.stderr[-300:]
    assert "CONSOLE" not in done.stderr


def test_a_picture_has_each_sample_over_its_nearest_training_image(mgebm, trained, tmp_path):
    out = tmp_path / "deep" / "near.png"
    result = mgebm("report", trained, "--out", out, "--seed", 3)
    assert result.exit_code == 0, result.output
    run = Run(trained)
    model, images = run.model(), run.data("train").images
    samples = model.to_uint8(model.sample(16, seed=3)).numpy()
    drawn = np.asarray(Image.open(out))
    assert drawn.shape == (4 * 42 + 2, 8 * 42 + 2, 3)
    for k in (0, 7, 13):
        row, column = 2 * (k // 8), k % 8
        cells = [drawn[2 + 42 * r :, 2 + 42 * column :, 0][:40:5, :40:5] for r in (row, row + 1)]
        apart = ((images[:, 0].astype(int) - samples[k, 0]) ** 2).sum((1, 2))
        assert np.array_equal(cells[0], samples[k, 0]) and np.array_equal(cells[1], images[apart.argmin(), 0])
    assert mgebm("report", trained, trained, "--out", out).exit_code == 2


def test_training_keeps_the_page_and_logs_where_it_is_told(mgebm, trained, tmp_path, monkeypatch):
    """A page at each time of pictures, atomically, of what is there by then; the model is that of a run without it."""
    import sys
    import types

    from mgebm_fast import files

    calls, pages = [], []
    service = types.SimpleNamespace(
        init=lambda **options: calls.append("init") or object(),
        log=lambda values, step: calls.append(step),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", service)
    write = files.write_bytes

    def watched(path, content, **options):
        if path.name == "report.html":
            pages.append(content.decode())
        return write(path, content, **options)

    monkeypatch.setattr(files, "write_bytes", watched)
    out = tmp_path / "watched"
    settings = (*TINY, "--set", "checkpoint_every=1", "--set", "sample_every=1", "--set", "log_every=1")
    result = mgebm("train", "digits", *settings, "--report", "--logger", "trackio", "--out", out)
    assert result.exit_code == 0, result.output
    assert len(pages) == 2 and "1 of 2, not finished" in pages[0] and "<td>2 of 2</td>" in pages[1]
    assert (out / "report.html").read_text() == pages[1] and pages[1].count('<img alt="update ') == 2
    assert calls == ["init", 1, 2, "finish"] and not (out / "tensorboard").exists()
    assert (out / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()


def test_a_logger_that_is_missing_is_reported_before_anything_is_written(mgebm, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    result = mgebm("train", "digits", *TINY, "--logger", "wandb", "--out", tmp_path / "run")
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert "--logger: wandb must be installed (pip install wandb)" in one_line(result)
