"""`mgebm score`, and `mgebm sample --best`: what is printed, written and refused."""

from __future__ import annotations

import csv
import io
import json
import shutil

import numpy as np
import pytest
from helpers.console import one_line
from PIL import Image

import mgebm_fast as mg


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    draw = np.random.default_rng(0)
    np.save(folder / "noise.npy", draw.integers(0, 256, (9, 1, 8, 8), dtype=np.uint8))
    for name in ("a", "b"):
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def figures(result):
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_every_image_has_its_energies_and_its_place(mgebm, trained, sets):
    noise = sets / "noise.npy"
    found = figures(mgebm("score", trained, noise, sets / "a.png", sets / "b.png", "--sort", "--json"))
    assert found["training"] == {"name": "digits", "num": 1437} and found["against"]["num"] == 360
    files, scored = found["sets"]
    assert files["num"] == 2 and {image["name"] for image in files["images"]} == {
        str(sets / "a.png"),
        str(sets / "b.png"),
    }
    model = mg.load(trained)
    energies = model.energies(mg.data.load(noise, size=8, channels=1, split="all").batch(slice(None)))
    total = sum(energies.values()).numpy()
    assert [int(image["name"]) for image in scored["images"]] == np.argsort(total, kind="stable").tolist()
    first = scored["images"][0]
    assert first["energies"]["sum"] == pytest.approx(total.min(), rel=1e-4)
    assert first["energies"]["8"] == pytest.approx(float(energies[8][int(first["name"])]), rel=1e-4)
    training = model.energy(mg.data.load("digits", size=8, channels=1).batch(slice(None))).numpy()
    below = (training < total.min()).mean() * 100
    assert first["percentile"] == pytest.approx(below, abs=0.1)
    assert set(scored["auroc"]) == {"2", "4", "8", "sum", "typical"} and any(
        "typical" in note for note in found["notes"]
    )


def test_a_set_against_itself_is_at_chance(mgebm, trained, sets):
    noise = sets / "noise.npy"
    (found,) = figures(mgebm("score", trained, noise, "--against", noise, "--json"))["sets"]
    assert list(found["auroc"].values()) == pytest.approx([0.5] * 5)


def test_a_file_and_a_picture_are_written_and_a_table_printed(mgebm, trained, sets, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "deep"
    result = mgebm(
        "score", trained, sets / "noise.npy", "--csv", out / "x.csv", "--figure", out / "x.png", "--reference"
    )
    assert result.exit_code == 0, result.output
    assert (
        "percentile" in result.stdout and "AUROC" in result.stdout and "no chain of this model has a" in result.stdout
    )
    rows = list(csv.DictReader(io.StringIO((out / "x.csv").read_text())))
    assert list(rows[0]) == ["set", "name", "energy_2", "energy_4", "energy_8", "sum", "percentile"]
    assert len(rows) == 9
    parts = sum(float(rows[0][f"energy_{size}"]) for size in (2, 4, 8))
    assert float(rows[0]["sum"]) == pytest.approx(parts, abs=1e-6)
    assert np.asarray(Image.open(out / "x.png").convert("L")).std() > 5


def test_a_model_file_alone_has_no_percentiles_unless_it_is_told_its_data(mgebm, trained, sets, tmp_path):
    file = shutil.copy(trained / "model.safetensors", tmp_path / "alone.safetensors")
    found = figures(mgebm("score", file, sets / "noise.npy", "--json"))
    assert found["training"] is None and found["sets"][0]["percentile"] is None and found["sets"][0]["auroc"] is None
    assert any(note.startswith("no percentiles: ") and "--data" in note for note in found["notes"])
    assert figures(mgebm("score", file, sets / "noise.npy", "--data", "digits", "--json"))["training"]["num"] == 1437


def test_what_cannot_be_scored_is_refused(mgebm, trained, sets, tmp_path):
    noise = sets / "noise.npy"
    assert "IMAGES: " in one_line(mgebm("score", trained, tmp_path / "nothing"))
    assert "--split: must be all, train or held_out, got 'test'" in one_line(
        mgebm("score", trained, noise, "--split", "test")
    )
    assert one_line(mgebm("score", trained, noise, "--against", tmp_path)).startswith("error: --against: no images in")
    assert "--figure: must end in .png" in one_line(mgebm("score", trained, noise, "--figure", tmp_path / "x.jpg"))
    assert "did you mean" in one_line(mgebm("score", f"{trained}x", noise))
    (tmp_path / "text.png").write_text("no picture")
    assert "text.png cannot be read as a picture" in one_line(mgebm("score", trained, tmp_path / "text.png"))


def test_the_best_samples_are_those_of_lowest_energy(mgebm, trained, tmp_path):
    for name, options in (("all", ()), ("best", ("--best", 3))):
        result = mgebm("sample", trained, "--num", 8, *options, "--out", tmp_path / f"{name}.npy")
        assert result.exit_code == 0, result.output
    assert "3 of lowest energy of 8 samples" in result.stderr
    drawn, best = (np.load(tmp_path / f"{name}.npy") for name in ("all", "best"))
    data = mg.data.load(drawn, size=8, channels=1, split="all")
    order = np.argsort(mg.load(trained).energy(data.batch(slice(None))).numpy(), kind="stable")[:3]
    assert np.array_equal(best, drawn[order])
    result = mgebm("sample", trained, "--num", 8, "--best", 3, "--out", tmp_path / "folder")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == sorted(f"sample_{i:05d}.png" for i in order)
    shown = np.asarray(Image.open(tmp_path / "folder" / f"sample_{order[0]:05d}.png"))
    assert np.array_equal(shown, drawn[order[0], 0])
    assert "--best: must be at most --num, 8, got 9" in one_line(
        mgebm("sample", trained, "--num", 8, "--best", 9, "--out", tmp_path / "x.npy")
    )
