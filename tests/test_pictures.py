from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

from mgebm_fast.pictures import BACKGROUND, image_grid, labelled_panel, save_png


def batch(n: int, channels: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 200, (n, channels, height, width), dtype=np.uint8)


@pytest.mark.parametrize("gap", [0, 1, 3])
@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("n, columns", [(1, None), (5, 3), (7, None), (4, 9)])
def test_every_image_stands_where_it_should_and_only_gaps_are_white(n, columns, scale, gap):
    images = batch(n, 3, 5, 6)
    grid = image_grid(images, columns=columns, gap=gap, scale=scale)
    per_row = min(n, columns or int(np.ceil(np.sqrt(n))))
    rows = -(-n // per_row)
    h, w = 5 * scale, 6 * scale
    assert grid.dtype == np.uint8
    assert grid.shape == (rows * (h + gap) + gap, per_row * (w + gap) + gap, 3)
    background = np.ones(grid.shape[:2], bool)
    for i, image in enumerate(images):
        top, left = gap + (i // per_row) * (h + gap), gap + (i % per_row) * (w + gap)
        cell = grid[top : top + h, left : left + w]
        np.testing.assert_array_equal(cell, image.transpose(1, 2, 0).repeat(scale, 0).repeat(scale, 1))
        background[top : top + h, left : left + w] = False
    assert (grid[background] == BACKGROUND).all()


@pytest.mark.parametrize("channels, shown", [(1, (0, 0, 0)), (2, (0, 0, 0)), (3, (0, 1, 2)), (5, (0, 1, 2))])
def test_channels_shown(channels, shown):
    images = batch(1, channels, 4, 4)
    np.testing.assert_array_equal(image_grid(images, gap=0), images[0, list(shown)].transpose(1, 2, 0))


def test_a_tensor_gives_the_same_picture_as_its_array():
    images = batch(6, 1, 8, 8)
    np.testing.assert_array_equal(image_grid(torch.from_numpy(images)), image_grid(images))


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 3, 4), np.uint8), np.zeros((2, 1, 4, 4), np.float32), np.zeros((0, 1, 4, 4), np.uint8)],
)
def test_grid_refuses_what_is_not_a_batch_of_pictures(images):
    with pytest.raises(ValueError, match=r"image_grid: images must be uint8 \(N, C, H, W\)"):
        image_grid(images)


@pytest.mark.parametrize("argument", [{"columns": 0}, {"gap": -1}, {"scale": 0}])
def test_grid_refuses_numbers_out_of_range(argument):
    with pytest.raises(ValueError, match=f"image_grid: {next(iter(argument))} must"):
        image_grid(batch(2, 1, 4, 4), **argument)


def test_panel_shows_all_sizes_equally_large_with_exact_replication():
    coarse, fine = batch(4, 1, 2, 2, seed=1), batch(4, 1, 8, 8, seed=2)
    panel = labelled_panel([("", coarse), ("", fine)], columns=2, gap=3, cell=40, margin=10)
    body = image_grid(fine, columns=2, gap=3, scale=5)
    left = image_grid(coarse, columns=2, gap=3, scale=20)
    assert left.shape == body.shape
    height, width = body.shape[:2]
    np.testing.assert_array_equal(panel[-10 - height : -10, 10 : 10 + width], left)
    np.testing.assert_array_equal(panel[-10 - height : -10, 20 + width : 20 + 2 * width], body)


def test_panel_draws_titles_and_makes_room_for_long_ones():
    images = batch(1, 1, 4, 4)
    plain, titled = labelled_panel([("", images)]), labelled_panel([("4×4, data", images)])
    assert (titled < 100).sum() > (plain < 100).sum(), "the title leaves dark ink"
    assert labelled_panel([("a very long title " * 5, images)]).shape[1] > titled.shape[1]
    assert len({len(labelled_panel([(title, images)])) for title in ("data", "g(z)", "4x4")}) == 1, "as high as another"


def test_panel_wraps_after_across_and_takes_shapes_that_do_not_divide():
    panels = [(f"{s}", batch(3, 3, s, s)) for s in (3, 8)] * 2 + [("flat", batch(2, 1, 4, 8))]
    one_row, two_columns = labelled_panel(panels), labelled_panel(panels, across=2)
    assert one_row.shape[1] > two_columns.shape[1]
    assert two_columns.shape[0] > 2.5 * (one_row.shape[0] - 24)


def test_panel_refuses_nothing():
    with pytest.raises(ValueError, match="labelled_panel: panels must be a non-empty list"):
        labelled_panel([])


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3)])
def test_png_reads_back_bit_for_bit(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    save_png(tmp_path / "x.png", array)
    with Image.open(tmp_path / "x.png") as picture:
        np.testing.assert_array_equal(
            np.asarray(picture), array.reshape(array.shape[:2]) if shape[2:] == (1,) else array
        )
    assert os.listdir(tmp_path) == ["x.png"]


def test_a_failed_write_leaves_the_old_picture_and_no_rest(tmp_path, monkeypatch):
    target = tmp_path / "x.png"
    save_png(target, np.zeros((4, 4), np.uint8))
    before = target.read_bytes()

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mgebm_fast.pictures.os.replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_png(target, np.ones((4, 4), np.uint8))
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.png"]


def test_png_refuses_floats(tmp_path):
    with pytest.raises(ValueError, match="save_png: array must be uint8"):
        save_png(tmp_path / "x.png", np.zeros((4, 4)))
    assert os.listdir(tmp_path) == []
