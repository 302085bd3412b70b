"""Energies as scores: ranks, AUROC, both against scikit-learn and by hand, and the figures of a set."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from sklearn.metrics import roc_auc_score

import mgebm_fast as mg
from mgebm_fast.data import ImageData
from mgebm_fast.evaluation import scoring
from mgebm_fast.evaluation.scoring import auroc, compare, percentile, score

CHAIN = mg.Langevin(2, drift=0.5, noise_std=0.1, reference_std=2.0)


def model(norm="none"):
    return mg.MultiGrid(
        (1, 2, 4), channels=1, langevin=CHAIN, norm=norm, variant="compact", width=0.1, value_range=(-1.0, 1.0)
    )


def images(n, seed=0, name="set"):
    return ImageData(np.random.default_rng(seed).integers(0, 256, (n, 1, 4, 4), dtype=np.uint8), name=name)


def test_percentiles_are_shares_below_with_ties_by_half():
    among = np.array([3.0, 1.0, 2.0, 2.0])
    assert percentile(np.array([0.0, 1.0, 2.0, 2.5, 9.0]), among).tolist() == [0.0, 12.5, 50.0, 75.0, 100.0]


def test_auroc_is_scikit_learns_ties_included():
    draw = np.random.default_rng(0)
    inside, outside = draw.integers(0, 9, 50).astype(float), draw.integers(3, 12, 70).astype(float)
    labels = np.repeat([0, 1], [50, 70])
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(labels, np.concatenate([inside, outside])))
    assert auroc(inside, inside + 100) == 1 and auroc(inside, inside - 100) == 0 and auroc(inside, inside) == 0.5


def test_scores_are_the_models_energies_in_every_batch(monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK", 3)
    net, data = model(), images(8)
    found = score(net, data, reference=True)
    expected = net.energies(torch.from_numpy(data.images), reference=True)
    assert list(found.energies) == ["2", "4", "sum"] and found.names == tuple("01234567")
    for size in (2, 4):
        np.testing.assert_allclose(found.energies[str(size)], expected[size].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.energies["sum"], found.energies["2"] + found.energies["4"])


def test_with_batch_statistics_an_images_energy_is_its_own():
    net = model("batch")
    for energy, size in zip(net.nets, (2, 4), strict=True):
        with energy.observing():
            energy(torch.rand(8, 1, size, size))
    together, alone = score(net, images(6)), score(net, images(6).subset([4]))
    np.testing.assert_allclose(together.energies["sum"][4:5], alone.energies["sum"], rtol=1e-5)


def test_a_set_is_measured_against_two_others():
    training, inside, outside = (
        scoring.Scores(name, tuple(map(str, range(3))), {"2": np.array(values), "sum": np.array(values)})
        for name, values in (("t", [0.0, 1.0, 2.0]), ("i", [1.0, 1.1, 0.9]), ("o", [-5.0, 5.0, 6.0]))
    )
    found = compare(outside, training, inside)
    assert found["auroc"]["sum"] == pytest.approx(2 / 3) and found["auroc"]["typical"] == 1.0
    assert [image["percentile"] for image in found["images"]] == [0.0, 100.0, 100.0] and found["percentile"] == 100.0
    assert [image["name"] for image in scoring.in_order(found["images"])] == ["0", "1", "2"]
    alone = compare(outside, None, None)
    assert alone["auroc"] is None and alone["percentile"] is None and alone["mean"]["sum"] == 2.0


def test_other_images_are_refused():
    with pytest.raises(ValueError, match=r"images must be at least one of shape \(1, 4, 4\)"):
        score(model(), ImageData(np.zeros((2, 1, 8, 8), np.uint8)))
    with pytest.raises(ValueError, match="at least one"):
        score(model(), images(0))


def test_tables_leave_the_sizes_out_where_a_line_has_no_room():
    sizes = [2, 4, 8, 16, 32, 64]
    keys = [*map(str, sizes), scoring.SUM]
    one = {
        "name": "photographs", "num": 1, "percentile": 12.5, "mean": dict.fromkeys(keys, -1.25),
        "auroc": dict.fromkeys([*keys, "typical"], 0.625),
        "images": [{"name": "a picture.png", "energies": dict.fromkeys(keys, -12.375), "percentile": 12.5}],
    }  # fmt: skip
    result = {
        "sets": [one], "sizes": sizes, "reference": False, "notes": [], "against": {"num": 9, "name": "photographs"},
    }  # fmt: skip

    def shown(width: int) -> str:
        console = Console(width=width, file=io.StringIO())
        console.print(scoring.format_scores(result, width))
        return console.file.getvalue()

    assert "E 64×64" in shown(200) and "64×64" in shown(200).partition("AUROC")[2] and "note" not in shown(200)
    narrow = " ".join(shown(90).split())
    images, areas = narrow.partition("AUROC against 9 images of photographs")[::2]
    assert "64" not in images and "64×64" in areas  # each table by itself
    assert "…" not in narrow and "--csv and --json have them" in narrow
    assert "-12.375" in narrow and "typical" in narrow
    assert "64" not in shown(50) and "…" not in shown(50) and max(map(len, shown(50).splitlines())) <= 50
    one["images"][0]["name"] = "a" * 70 + ".png"  # folded: figures are not left out for a name
    result["sizes"] = [2, 4]
    assert "E 4×4" in shown(80) and "…" not in shown(80)
