"""Occlusions and in-painting: shares, independence, the figures in float64, and what is held."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

import mgebm_fast as mg
from mgebm_fast.data import ImageData, load
from mgebm_fast.errors import DataError, DivergenceError
from mgebm_fast.evaluation.inpainting import HIDDEN, LENGTHS, inpaint, length_images, pick_length
from mgebm_fast.evaluation.labels import labels_of
from mgebm_fast.models.latent import Inference
from mgebm_fast.models.occlusions import KINDS, occlusion, read_mask


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
    made = mg.models.SingleGrid(
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
        made = mg.models.SingleGrid(
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


# the length of chains


class Slope(torch.nn.Module):
    """E = −Σx: a noise-free step of drift d adds d to every pixel."""

    def forward(self, x):
        return -x.flatten(1).sum(1)


def climbing(steps=8, drift=1 / 64, grids=1, **arguments):
    """A model whose chains add `drift` a step, K = `steps`; one net makes it a single grid."""
    langevin = mg.Langevin(steps=steps, drift=drift, noise_std=0.0)
    rest = {"channels": 1, "langevin": langevin, "value_range": (-1.0, 1.0), "nets": [Slope()] * grids, **arguments}
    made = mg.MultiGrid([1, 2, 4, 8], **rest) if grids == 3 else mg.models.SingleGrid(8, start="colours", **rest)
    made.set_colours(torch.zeros(1, 1))
    return made


RIGHT = torch.zeros(8, 8, dtype=torch.bool)
RIGHT[:, 4:] = True


def halves(n, rise):
    """Images whose left half is −1 and whose right half lies `rise` above it, as model units."""
    images = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    images[..., 4:] = round(127.5 * rise)
    return images


def refining():
    generator = mg.nets.Generator(2, [mg.nets.DeconvSpec(1, 8, 8)])
    return mg.models.CoopNets(
        8, generator, Inference(2, 0.1, 0.3), complete_steps=2, channels=1, value_range=(-1.0, 1.0), nets=[Slope()],
        langevin=mg.Langevin(steps=6, drift=0.01, noise_std=0.0),
    )  # fmt: skip


@pytest.mark.parametrize(("length", "expected"), [(0.25, [1, 2, 5]), (0.5, [2, 4, 10]), (1.0, [3, 9, 20]),
                                                  (2.0, [6, 18, 40]), (0.01, [1, 1, 1])])  # fmt: skip
def test_every_grid_takes_its_share_of_steps(length, expected):
    """K = 3, 9, 20: max(1, round(length · K)), halves to even."""
    dynamics = [mg.Langevin(steps=k, drift=2.0**-10, noise_std=0.0) for k in (3, 9, 20)]
    made = climbing(grids=3, langevin=dynamics)
    counted = []
    mask, known = torch.ones(2, 1, 8, 8, dtype=torch.bool), torch.zeros(2, 1, 8, 8)
    x = made.sample(2, mask=mask, known=known, length=length, callback=lambda grid, step, x: counted.append(grid))
    assert [counted.count(grid) for grid in (1, 2, 3)] == expected
    assert (x == sum(expected) * 2.0**-10).all(), "a step adds its drift"


@pytest.mark.parametrize("made", [
    climbing(steps=6),
    mg.models.SingleGrid(8, start="noise", sample_steps=6, channels=1, langevin=mg.Langevin(2, drift=0.01,
                           noise_std=0.0), nets=[Slope()]),
    mg.models.GenerativeConvNet(8, [mg.nets.ConvSpec(2, 3, 1)], sample_steps=6, channels=1),
    mg.models.Frame(8, layers=[mg.nets.ConvSpec(2, 3, 1)], leapfrog_steps=2, sample_steps=6, channels=1),
    mg.models.Frame(8, layers=[mg.nets.ConvSpec(2, 3, 1)], sample_steps=6, channels=1),
    refining(),
], ids=["single", "sample-steps", "convnet", "hamiltonian", "frame", "cooperative"])  # fmt: skip
@pytest.mark.parametrize(("length", "steps"), [(0.5, 3), (1.0, 6), (2.0, 12)])
def test_every_model_with_a_chain_has_a_length(made, length, steps):
    counted = []
    made.sample(2, length=length, callback=lambda grid, step, x: counted.append(step))
    assert counted == list(range(steps))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("grids", [1, 3])
def test_the_length_that_fits_is_picked(length, grids):
    """Hidden pixels lie as far above the known ones as chains of this length climb."""
    made, images = climbing(grids=grids), halves(5, 8 * length / 64)
    images[..., 4:] *= grids  # the right half has no known pixel at any size: it climbs on every grid
    picked = pick_length(made, images, RIGHT)
    assert picked.length == length and picked.num == 5 and list(picked.errors) == list(LENGTHS)
    found = [inpaint(made, images, RIGHT, length=other) for other in LENGTHS]
    assert [float(result.error.mean()) for result in found] == pytest.approx(list(picked.errors.values()), abs=1e-6)
    assert found[0].figures()["length"] == 0.25


def test_a_tie_takes_the_length_of_a_sample():
    picked = pick_length(model(channels=1), pictures(3, 1), RIGHT)  # every chain ends at the target
    assert len(set(picked.errors.values())) == 1 and picked.length == 1.0


@pytest.mark.parametrize(("short", "expected"), [(1, 0.5), (2, 0.5), (3, 1.0), (8, 1.0)])
def test_a_length_stays_unless_the_gain_exceeds_its_doubt(short, expected):
    """Of 12 images `short` gain as much by chains of length 1 as each other one does by chains of half of it."""
    images = halves(12, 4 / 64)
    images[:short] = halves(short, 8 / 64)
    picked = pick_length(climbing(), images, RIGHT)
    gains = np.repeat([-1.0, 1.0], [short, 12 - short])
    clear = gains.mean() > 2 * gains.std(ddof=1) / math.sqrt(12)
    assert clear == (expected == 0.5) and picked.length == expected
    assert pick_length(climbing(), images[-1:], RIGHT).length == 1.0, "one image tells no spread"


def test_the_pick_is_a_function_of_the_seed_and_has_noise_of_its_own():
    made, images = model(channels=1, noise_std=0.3), pictures(6, 1)
    first, again, other = (pick_length(made, images, "doodle", seed=seed) for seed in (1, 1, 2))
    assert first == again and first.errors != other.errors
    measured = inpaint(made, images, occlusion("doodle", 6, 8, seed=1), seed=1)
    assert float(measured.error.mean()) not in first.errors.values()
    # one mask serves images in turn
    pair = torch.stack([RIGHT, ~RIGHT])[:, None]
    assert pick_length(made, images, pair, seed=1) == pick_length(made, images, pair.repeat(3, 1, 1, 1), seed=1)


def test_a_length_that_diverges_is_not_picked():
    class Cliff(torch.nn.Module):
        def forward(self, x):
            flat = x.flatten(1)
            return -flat.sum(1) * torch.where(flat.amax(1) > bound, torch.nan, 1.0)

    made = climbing(nets=[Cliff()])
    bound = -1 + 5 / 64
    picked = pick_length(made, halves(3, 1.0), RIGHT)
    assert picked.length == 0.5 and picked.errors[1.0] is None and picked.errors[2.0] is None
    assert picked.figures()["length_errors"]["2"] is None
    bound = -2.0
    with pytest.raises(DivergenceError):
        pick_length(made, halves(3, 1.0), RIGHT)


def test_a_generator_alone_has_no_length():
    parts = refining()
    made = mg.models.GeneratorModel(parts.generator, parts.inference, complete_steps=2)
    assert pick_length(made, pictures(3, 1), "square").figures() == {
        "length": 1.0, "length_errors": {}, "length_images": 0
    }  # fmt: skip
    with pytest.raises(
        ValueError, match="length must be 1 for a GeneratorModel, whose images go through no chain, got 2"
    ):
        inpaint(made, pictures(3, 1), RIGHT, length=2)
    for wrong in (0, -1.0, math.nan, math.inf, True, "2"):
        with pytest.raises(ValueError, match="length must be a finite number > 0, got"):
            inpaint(climbing(), pictures(3, 1), RIGHT, length=wrong)


def test_training_images_are_a_choice_by_the_seed():
    images = pictures(90, 1)
    images[:, 0, 0, 0] = torch.arange(90)
    data = ImageData(images.numpy())
    chosen = length_images(data, 3)
    assert len(chosen) == 64 == len(chosen[:, 0, 0, 0].unique())
    assert torch.equal(chosen, length_images(data, 3)) and not torch.equal(chosen, length_images(data, 4))
    assert len(length_images(ImageData(images[:5].numpy()))) == 5
    # the same are read alone
    whole, few = (load("digits", size=8, channels=1, most=most, seed=3) for most in (None, 64))
    assert torch.equal(few.batch(slice(None)), length_images(whole, 3)) and len(few.labels) == 64
    with pytest.raises(DataError, match="most must be at least 1, got 0"):
        load("digits", size=8, channels=1, most=0)


class PullByClass(torch.nn.Module):
    """E(x, y) = ‖x − t_y‖²/2 with t_y = ±0.5, by the first label plane."""

    def forward(self, x):
        target = torch.where(x[:, 1:2] > 0, 0.5, -0.5)
        return (x[:, :1] - target).square().flatten(1).sum(1) / 2


def by_class():
    made = mg.MultiGrid(
        (1, 2, 4), channels=1, classes=("light", "dark"), nets=[PullByClass()] * 2, value_range=(-1.0, 1.0),
        langevin=mg.Langevin(steps=2, drift=1.0, noise_std=0.0),
    )  # fmt: skip
    made.set_colours(torch.zeros(2, 1), torch.tensor([0, 1]))
    return made


def test_images_are_filled_as_of_their_own_class():
    generator, images = by_class(), pictures(6, channels=1, size=4)
    labels, mask = torch.tensor([0, 1, 1, 0, 0, 1]), occlusion("square", 6, 4)
    light, dark = (generator.to_uint8(torch.tensor([target])) for target in (0.5, -0.5))
    completed = inpaint(generator, images, mask, labels=labels).completed
    for image, hidden, label in zip(completed, mask, labels, strict=True):
        assert (image[hidden] == (dark if label else light)).all()
    of_class = torch.where(labels == 0, light, dark)[:, None, None, None].expand_as(images).contiguous()
    assert pick_length(generator, of_class, "square", labels=labels).errors[1.0] < 0.002
    assert pick_length(generator, of_class, "square").errors[1.0] > 0.1, "classes are drawn"
    data = ImageData(images.numpy(), 1 - labels.numpy(), ("dark", "light"))
    assert torch.equal(labels_of(generator, data, np.array([5, 0])), labels[[5, 0]])
    assert labels_of(generator, ImageData(images.numpy()), slice(None)) is None
    assert labels_of(generator, replace(data, class_names=("dark", "b")), slice(None)) is None
    assert labels_of(model(), data, slice(None)) is None
    with pytest.raises(ValueError, match="inpaint: labels must be from 0 to 1"):
        inpaint(generator, images, mask, labels=labels + 1)
    with pytest.raises(ValueError, match="inpaint: labels must be None"):
        inpaint(model(), pictures(2), occlusion("square", 2, 8), labels=labels[:2])
