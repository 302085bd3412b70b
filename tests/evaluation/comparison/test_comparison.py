"""The table of a comparison against numpy, and the figures of a run's time."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest

from mgebm_fast.errors import ConfigError
from mgebm_fast.evaluation.comparison import compare as comparison
from mgebm_fast.evaluation.comparison import runs as comparison_runs
from mgebm_fast.evaluation.comparison import table as comparison_table
from mgebm_fast.evaluation.comparison.pictures import kid_plot, samples_picture
from mgebm_fast.learning import load_preset, merge

KEYS = [column.key for column in comparison_table.COLUMNS if column.key != "work"]


def record(preset, seed, work=100, **figures):
    return {
        "preset": preset,
        "method": "cd",
        "seed": seed,
        "updates": 5,
        "work": work,
        "num": 50,
        "num_real": 40,
        "feature_space": "a space",
        "recogniser": None,
        "figures": {**dict.fromkeys(KEYS, 1.0), **figures},
        "real": {"kid": 0.0, "confident_share": 0.8, "smallest_class_share": 0.05},
    }


def records():
    rng = np.random.default_rng(0)
    found = []
    for preset, work in (("a", 100), ("b", 103), ("c", 50)):
        for seed in range(4):
            found.append(record(preset, seed, work, **{key: float(rng.normal()) for key in KEYS}))
    return found


def test_means_and_deviations_are_numpys():
    found = records()
    rows = comparison_table.tabulate(found)
    assert [row["preset"] for row in rows] == ["a", "b", "c"] and [row["runs"] for row in rows] == [4, 4, 4]
    assert [row["work"] for row in rows] == [1.0, 1.03, 0.5]
    for row in rows:
        for key in KEYS:
            values = np.array([r["figures"][key] for r in found if r["preset"] == row["preset"]])
            assert row[key] == pytest.approx(values.mean(), rel=1e-12)
            assert row[f"{key}_sd"] == pytest.approx(values.std(ddof=1), rel=1e-12)
    read = list(csv.DictReader(io.StringIO(comparison_table.table_csv(rows))))
    assert [float(row["kid_sd"]) for row in read] == pytest.approx([row["kid_sd"] for row in rows])
    runs = list(csv.DictReader(io.StringIO(comparison_table.figures_csv(found))))
    assert len(runs) == 12 and [float(run["fid"]) for run in runs] == [r["figures"]["fid"] for r in found]


def best(values: dict[str, list[float]], key: str) -> list[str]:
    found = [record(name, seed, **{key: value}) for name, of in values.items() for seed, value in enumerate(of)]
    return [row["preset"] for row in comparison_table.tabulate(found) if row[f"{key}_best"]]


def test_the_best_is_marked_where_its_lead_exceeds_the_spread():
    # means 1 and 2, deviations 0.5 and 0.5: the spread of a difference is 0.707
    assert best({"a": [0.5, 1.0, 1.5], "b": [1.5, 2.0, 2.5]}, "kid") == ["a"]
    assert best({"a": [0.5, 1.0, 1.5], "b": [1.1, 1.6, 2.1]}, "kid") == [], "0.6 is less"
    assert best({"a": [0.5, 1.0, 1.5], "b": [1.5, 2.0, 2.5]}, "square_psnr") == ["b"], "higher is better"
    assert best({"a": [0.5, 1.0, 1.5], "b": [1.5, 2.0, 2.5], "c": [0.7, 1.2, 1.7]}, "kid") == [], "a third is near"
    assert best({"a": [1.0], "b": [9.0]}, "kid") == [], "one seed has no spread"
    # held-out images: 0.8; a model that is recognised more often is not better for it
    assert best({"a": [0.94, 0.95, 0.96], "b": [0.77, 0.78, 0.79]}, "confident_share") == ["b"]
    assert best({"a": [1.0, 1.1], "b": [9.0, 9.1]}, "seconds") == [], "time is a cost that the cores hang on"
    assert best({"a": [1.0, 1.1], "b": [9.0, 9.1]}, "nearest_distance") == [], "a low one is no praise"


def test_markdown_marks_the_best_and_shows_the_twins():
    found = [record("a", seed, kid=1 + seed / 10) for seed in range(3)]
    found += [record("b", seed, kid=7 + seed / 10) for seed in range(3)]
    text = comparison_table.markdown(comparison_table.tabulate(found), found)
    assert "| `a` | **1.1000 ± 0.1000** |" in text and "| `b` | 7.1000 ± 0.1000 |" in text
    assert "| held-out images | 0.0000 | – |" in text
    assert "over seeds 0, 1, 2" in text and "a space" in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert all(line.count("|") == above.count("|") for above, line in zip(lines, lines[1:]) if line.startswith("|---"))


def test_a_run_without_figures_is_told_and_left_out_of_the_mean():
    found = [record("a", seed, kid=float(seed)) for seed in range(3)]
    found += [
        {key: record("b", 0)[key] for key in ("preset", "method", "seed", "updates", "work")} | {"failed": "boom"}
    ]
    rows = comparison_table.tabulate(found)
    assert (rows[1]["runs"], rows[1]["failed"], rows[1]["kid"]) == (0, 1, None) and rows[0]["kid"] == 1.0
    assert "b: 1 of 1 runs diverged" in comparison_table.markdown(rows, found)
    assert "boom" in comparison_table.figures_csv(found)


def test_time_is_the_median_update_and_the_sum_of_all():
    metrics = [{"step": 20, "seconds_per_update": 3.0}, {"step": 40, "seconds_per_update": 1.0}]
    metrics += [{"step": 45, "seconds_per_update": 2.0}]
    assert comparison.timing(metrics) == {"seconds_an_update": 2.0, "seconds": 20 * 3.0 + 20 * 1.0 + 5 * 2.0}
    # a run that went back to 30 after it diverged, whose records after 20 are those of the second attempt
    back = [metrics[0], {"step": 30, "rollbacks": 1, "diverged_at": 39}, *metrics[1:]]
    assert comparison.timing(back) == comparison.timing(metrics)
    assert comparison.timing([])["seconds"] is None and comparison.timing(back[1:2])["seconds"] is None


@pytest.mark.parametrize("base", ["digits", "cifar10"])
def test_the_contenders_of_a_base(base):
    expected = [f"{base}-{name}" for name in ("single-grid", "cd", "pcd", "short-run", "cooperative")]
    assert comparison_runs.contenders(base) == expected
    with pytest.raises(ConfigError, match="must be named, since none is based on it"):
        comparison_runs.contenders("frame")


def test_what_cannot_be_compared_is_refused():
    digits = load_preset("digits")
    for other, message in (
        (load_preset("cifar10"), "data of 'cifar10' is 'photos' and of 'digits' 'digits'"),
        (merge(digits, {"name": "big", "sizes": [1, 4, 16]}), "the finest of sizes of 'big' is 16 and of 'digits' 8"),
        (digits, "must differ in name, got 'digits' twice"),
        (load_preset("fire"), "must be of images, got 'fire'"),
    ):
        with pytest.raises(ConfigError, match=message):
            comparison_runs.check_alike([digits, other])


def test_pictures_have_a_row_a_method_and_a_png():
    torch = pytest.importorskip("torch")
    data = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    one, three = (samples_picture(data, [(f"method {i}", data)] * n) for i, n in enumerate((1, 3)))
    assert three.shape[0] == 2 * one.shape[0] - 6 and three.shape[1] == one.shape[1]
    pytest.importorskip("matplotlib")
    assert kid_plot(records()).startswith(b"\x89PNG")
