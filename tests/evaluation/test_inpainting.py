"""Occlusions and in-painting: shares, independence, the figures in float64, and what is held."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import mgebm_fast as mg
from mgebm_fast.errors import DataError
from mgebm_fast.evaluation.inpainting import HIDDEN, inpaint
from mgebm_fast.sampling.occlusions import KINDS, occlusion, read_mask


class Pull(torch.nn.Module):
    """E = ‖x − target‖²/2, whose noise-free step of drift 1 ends at the target."""

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target

    def forward(self, x):
        return (x - self.target).square().flatten(1).sum(1) / 2


class Flat(torch.nn.Module):
    """E = 0: no chain moves but by its noise."""

    def forward(self, x):
        return 0 * x.flatten(1).sum(1)


def model(target=0.5, channels=3, noise_std=0.0, sizes=(1, 2, 4, 8)):
    langevin = mg.Langevin(steps=2, drift=1.0, noise_std=noise_std)
    made = mg.MultiGrid(
        sizes, channels=channels, langevin=langevin, value_range=(-1.0, 1.0), nets=[Pull(target)] * (len(sizes) - 1)
    )
    made.set_colours(torch.zeros(1, channels))
    return made


def pictures(n, channels=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


# occlusions


@pytest.mark.parametrize("size", [2, 7, 8, 33])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_hides_its_share(kind, size):
    masks = occlusion(kind, 40, size, seed=1)
    assert masks.shape == (40, 1, size, size) and masks.dtype == torch.bool
    counts = masks.flatten(1).sum(1)
    if kind == "square":
        assert (counts == (size // 2) ** 2).all()
    elif kind == "pepper":
        assert (counts == round(0.6 * size**2)).all()
    else:  # a stamp of the brush at most is more than a quarter
        stamp = math.pi * (max(0.6, size / 28) + 1) ** 2
        assert (counts >= round(size**2 / 4)).all() and (counts <= size**2 / 4 + stamp).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_a_function_of_seed_and_sample(kind):
    whole = occlusion(kind, 70, 12, seed=3)
    assert torch.equal(whole[66:], occlusion(kind, 4, 12, seed=3, first_sample=66))
    assert not torch.equal(whole, occlusion(kind, 70, 12, seed=4))
    assert len(whole.flatten(1).unique(dim=0)) > 30  # a square has 49 places


def test_squares_are_everywhere():
    masks = occlusion("square", 4900, 12, seed=2)[:, 0]
    rows, columns = masks.any(2), masks.any(1)
    assert (rows.sum(1) == 6).all() and (columns.sum(1) == 6).all()
    assert (rows[:, :, None] & columns[:, None, :] == masks).all()
    top, left = rows.int().argmax(1), columns.int().argmax(1)
    counts = torch.bincount(top * 7 + left, minlength=49)
    # chi-squared with 48 degrees of freedom: mean 48, standard deviation 9.8; above 100 with probability 2e-5
    assert float(((counts - 100.0).square() / 100).sum()) < 100


def test_pepper_is_even_and_doodles_are_strokes():
    pepper, doodle = (occlusion(kind, 2000 if kind == "pepper" else 20, 16, seed=5)[:, 0] for kind in KINDS[:0:-1])
    share = pepper.double().mean(0)
    expected = round(0.6 * 256) / 256
    assert (share - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / 2000)
    pieces = [ndimage.label(np.asarray(mask), structure=np.ones((3, 3)))[1] for mask in doodle]
    assert max(pieces) <= 6, pieces  # as many strokes, at most; 64 scattered pixels would make some 30 pieces


def test_masks_are_read_from_pictures_and_arrays(tmp_path):
    values = np.zeros((6, 6), np.uint8)
    values[2:4, 1:] = 255
    Image.fromarray(values).save(tmp_path / "mask.png")
    Image.fromarray(values).convert("RGB").save(tmp_path / "colour.png")
    np.save(tmp_path / "mask.npy", values > 0)
    np.save(tmp_path / "two.npy", np.stack([values, 255 - values]))
    for name in ("mask.png", "colour.png", "mask.npy"):
        mask = read_mask(tmp_path / name, 6)
        assert mask.shape == (1, 1, 6, 6) and np.array_equal(mask[0, 0].numpy(), values > 0), name
    assert read_mask(tmp_path / "two.npy", 6).shape == (2, 1, 6, 6)
    with pytest.raises(DataError, match="must be 8 × 8.*got \\(6, 6\\)"):
        read_mask(tmp_path / "mask.png", 8)
    with pytest.raises(DataError, match="did you mean 'square'"):
        read_mask("sqare", 8)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match="cannot be read"):
        read_mask(tmp_path / "text.png", 8)
    for values, got in ((np.full((6, 6), np.nan), "NaN"), (np.full((6, 6), "x"), "<U1")):
        np.save(tmp_path / "no_mask.npy", values)
        with pytest.raises(DataError, match=f"must hold bools or numbers, got {got}"):
            read_mask(tmp_path / "no_mask.npy", 6)


def test_unknown_kinds_are_told():
    with pytest.raises(ValueError, match="kind must be one of square, doodle, pepper, got 'peper' .did you mean"):
        occlusion("peper", 3, 8)
    with pytest.raises(ValueError, match="size at least 2"):
        occlusion("square", 3, 1)


# in-painting


@pytest.mark.parametrize("kind", KINDS)
def test_known_pixels_stay_and_hidden_ones_are_the_models(kind):
    images, masks = pictures(12), occlusion(kind, 12, 8, seed=1)
    result = inpaint(model(target=0.5), images, masks)
    hidden = masks.expand_as(images)
    assert torch.equal(result.completed[~hidden], images[~hidden])
    assert (result.completed[hidden] == round(255 * 0.75)).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_figures_are_those_of_float64(channels):
    images, masks = pictures(9, channels), occlusion("doodle", 9, 8, seed=2)
    made = model(target=0.1, channels=channels, noise_std=0.2)
    result = inpaint(made, images, masks, seed=4)
    known = made.from_uint8(images)
    filled = made.sample(9, seed=4, mask=masks, known=known).numpy().astype(np.float64).clip(-1, 1)
    x = images.numpy().astype(np.float64) / 127.5 - 1
    grey = np.empty_like(x)
    for i, mask in enumerate(masks.numpy()):
        for c in range(channels):
            hidden = mask[0]
            grey[i, c] = np.where(hidden, x[i, c][~hidden].mean(), x[i, c])
    for y, error, psnr in (
        (filled, result.error, result.psnr),
        (grey, result.error_mean_fill, result.psnr_mean_fill),
    ):
        for i, mask in enumerate(masks.numpy()):
            difference = (x[i] - y[i])[:, mask[0]]
            assert float(error[i]) == pytest.approx(np.abs(difference).mean() / 2, rel=1e-6)
            assert float(psnr[i]) == pytest.approx(10 * math.log10(4 / np.square(x[i] - y[i]).mean()), rel=1e-6)
    figures = result.figures()
    assert figures["error"] == pytest.approx(float(result.error.mean()))
    assert figures["occluded_share"] == pytest.approx(float(masks.double().mean()))


def test_a_perfect_fill_has_no_error_and_no_finite_psnr():
    images = torch.full((3, 1, 8, 8), 255, dtype=torch.uint8)
    result = inpaint(model(target=1.0, channels=1), images, occlusion("square", 3, 8))
    figures = result.figures()
    assert figures["error"] == pytest.approx(0.0, abs=1e-7) and torch.equal(result.completed, images)
    assert figures["psnr_mean_fill"] is None  # a mean of equal pixels: exactly the image


def test_noise_is_by_sample():
    images, masks = pictures(6), occlusion("pepper", 6, 8)
    made = model(noise_std=0.3)
    whole = inpaint(made, images, masks, seed=1, first_sample=10)
    part = inpaint(made, images[4:], masks[4:], seed=1, first_sample=14)
    assert torch.equal(whole.completed[4:], part.completed)
    assert not torch.equal(whole.completed, inpaint(made, images, masks, seed=2, first_sample=10).completed)


def test_the_picture_has_three_rows():
    images, masks = pictures(5), occlusion("square", 5, 8, seed=1)
    picture = inpaint(model(), images, masks).picture(most=4)
    colours = {tuple(int(v) for v in colour) for colour in picture.reshape(-1, 3)}
    assert HIDDEN in colours
    assert (picture == HIDDEN).all(2).sum() == int(masks[:4].sum()) * 25  # 8 pixels shown as 40


def test_wrong_arguments_are_told():
    made, images, masks = model(), pictures(4), occlusion("square", 4, 8)
    with pytest.raises(ValueError, match=r"images must be uint8 \(N, 3, 8, 8\), got torch.uint8 \(4, 1, 8, 8\)"):
        inpaint(made, images[:, :1], masks)
    with pytest.raises(ValueError, match="mask must be bool"):
        inpaint(made, images, masks.float())
    with pytest.raises(ValueError, match=r"mask must broadcast to \(4, 1, 8, 8\), got \(3, 1, 8, 8\)"):
        inpaint(made, images, masks[:3])
    masks = masks.clone()
    masks[2] = False
    with pytest.raises(ValueError, match="got none in image 2"):
        inpaint(made, images, masks)


@pytest.mark.parametrize("start", ["noise", "colours"])
def test_a_single_grid_fills_too(start):
    made = mg.sampling.SingleGrid(
        8, start=start, channels=3, langevin=mg.Langevin(steps=2, drift=1.0, noise_std=0.0), value_range=(-1.0, 1.0),
        nets=[Pull(0.5)],
    )  # fmt: skip
    made.set_colours(torch.zeros(1, 3))
    images, masks = pictures(4), occlusion("doodle", 4, 8)
    completed = inpaint(made, images, masks).completed
    hidden = masks.expand_as(images)
    assert torch.equal(completed[~hidden], images[~hidden]) and (completed[hidden] == round(255 * 0.75)).all()


@pytest.mark.parametrize("sizes", [(1, 2, 4), (1, 4)])
def test_what_no_chain_moves_is_the_mean_of_the_known_pixels_around(sizes):
    """A flat energy without noise leaves the start: the held cells of the coarse grids, replicated."""
    still = mg.Langevin(steps=2, drift=1.0, noise_std=0.0)
    if len(sizes) == 2:
        made = mg.sampling.SingleGrid(
            4, start="colours", channels=1, langevin=still, value_range=(-1.0, 1.0), nets=[Flat()]
        )
    else:
        made = mg.MultiGrid(sizes, channels=1, langevin=still, value_range=(-1.0, 1.0), nets=[Flat(), Flat()])
    made.set_colours(torch.full((1, 1), -1.0))
    images = pictures(3, 1, size=4, seed=3)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:3, :2] = True  # the upper left block wholly, half of the one beneath it
    completed = inpaint(made, images, mask).completed[:, 0].double()
    x, known = images[:, 0].double(), ~mask
    overall = x[:, known].mean(1)
    beneath = x[:, 3, :2].mean(1) if len(sizes) == 3 else overall
    # between the grids a value is a float, and rounded to eight bits once
    assert (completed[:, 0, 0] - overall).abs().max() <= 0.51
    assert (completed[:, 2, 0] - beneath).abs().max() <= 0.51


def test_the_code_of_the_page_runs():
    page = Path(__file__).resolve().parents[2] / "docs" / "inpainting.md"
    names = {"model": model(channels=1), "images": pictures(5, 1)}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert names["result"].completed.shape == (5, 1, 8, 8)
