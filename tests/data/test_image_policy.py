"""The policy for mixed images: orientation, alpha, colour, crop and resize."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mgebm_fast.data.policy import block_mean, convert, decode, fit, match_channels

EXIF_ORIENTATION = 0x0112


@settings(max_examples=40, deadline=None)
@given(factor=st.integers(1, 9), cells=st.integers(1, 5), channels=st.sampled_from([1, 2, 3]), seed=st.integers(0, 99))
def test_block_mean_is_exact(factor, cells, channels, seed):
    side = factor * cells
    images = np.random.default_rng(seed).integers(0, 256, (2, side, side, channels), np.uint8)
    means = images.reshape(2, cells, factor, cells, factor, channels).astype(np.float64).mean(axis=(2, 4))
    np.testing.assert_array_equal(block_mean(images, factor), np.floor(means + 0.5))


def test_block_mean_of_a_large_block_does_not_overflow():
    images = np.full((1, 4200, 4200, 1), 255, np.uint8)  # 2 x the sum of a block passes 32 bits
    assert block_mean(images, 4200).item() == 255


@pytest.mark.parametrize("size", [1, 4, 8, 16, 32])
def test_whole_number_reduction_of_a_file_is_the_block_mean(size, rng, encode):
    pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
    out = decode(encode(pixels), size, 3)
    assert out.shape == (3, size, size) and out.dtype == np.uint8
    np.testing.assert_array_equal(out, block_mean(pixels[None], 32 // size)[0].transpose(2, 0, 1))


def test_other_sizes_are_antialiased(encode):
    stripes = np.zeros((50, 50), np.uint8)
    stripes[:, ::2] = 255  # a pattern that sampling without a filter would turn into wide bands
    out = decode(encode(stripes), 24, 1)[0]
    assert out[2:-2, 2:-2].min() > 90 and out[2:-2, 2:-2].max() < 165


def test_enlarged_image_keeps_its_mean_and_corners(rng):
    image = rng.integers(0, 256, (1, 8, 8, 3), np.uint8)
    out = fit(image, 20)
    assert out.shape == (1, 3, 20, 20)
    assert abs(out.mean() - image.mean()) < 6
    flat = fit(np.full((1, 8, 8, 2), 77, np.uint8), 20)  # two channels, which Pillow knows as no picture
    assert (flat == 77).all()


@pytest.mark.parametrize(("height", "width"), [(8, 14), (14, 8), (9, 8), (8, 9)])
def test_centre_crop(height, width, rng, encode):
    pixels = rng.integers(0, 256, (height, width), np.uint8)
    top, left = (height - 8) // 2, (width - 8) // 2
    expected = pixels[top : top + 8, left : left + 8]
    np.testing.assert_array_equal(decode(encode(pixels), 8, 1)[0], expected)
    np.testing.assert_array_equal(fit(pixels[None, ..., None], 8)[0, 0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_exif_orientation(orientation, format, rng, encode):
    """What the camera stored, turned as its tag says, is the upright image: EXIF 2.3, table of Orientation."""
    upright = rng.integers(0, 256, (8, 8), np.uint8)
    store = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.T,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    data = encode(np.ascontiguousarray(store(upright)), format, exif=exif)
    np.testing.assert_array_equal(decode(data, 8, 1)[0], upright)


def test_broken_metadata_does_not_lose_the_image(encode):
    pixels = np.full((8, 8), 50, np.uint8)
    data = encode(pixels, exif=b"Exif\x00\x00nonsense")
    assert (decode(data, 8, 1) == 50).all()


def test_alpha_is_composited_on_white(encode):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (200, 0, 0, 255)
    pixels[:, 4:] = (0, 0, 0, 51)  # a fifth of black
    out = decode(encode(pixels), 8, 3)
    assert out[:, 0, 0].tolist() == [200, 0, 0]
    assert out[:, 0, 7].tolist() == [204, 204, 204]


def test_grey_with_alpha_and_transparent_colours(encode):
    grey = Image.fromarray(np.full((8, 8), 40, np.uint8))
    faded = Image.merge("LA", (grey, Image.new("L", (8, 8), 0)))
    assert (decode(encode(faded), 8, 1) == 255).all()
    assert (decode(encode(grey, transparency=40), 8, 1) == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([9, 9, 9, 80, 90, 100])
    assert decode(encode(palette), 8, 3)[:, 0, 0].tolist() == [80, 90, 100]
    assert (decode(encode(palette, transparency=1), 8, 3) == 255).all()


@pytest.mark.parametrize("value", [0, 128, 129, 32768, 65406, 65535])
def test_sixteen_bits(value, encode):
    data = encode(np.full((8, 8), value, np.uint16))
    assert (decode(data, 8, 1) == round(value / 257)).all()


def test_one_bit_and_cmyk(encode):
    bits = Image.fromarray(np.eye(8, dtype=bool))
    np.testing.assert_array_equal(decode(encode(bits), 8, 1)[0], 255 * np.eye(8))
    ink = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert decode(encode(ink, "TIFF"), 8, 3)[:, 0, 0].tolist() == [0, 255, 255]


def test_first_frame_of_an_animation(encode):
    frames = [Image.new("L", (8, 8), value) for value in (30, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data, 8, 1) == 30).all()


def test_colour_and_grey(rng):
    colour = rng.integers(0, 256, (5, 6, 6, 3), np.uint8)
    luma = match_channels(colour, 1)
    exact = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luma[..., 0] - exact).max() <= 0.51
    for image, grey in zip(colour, luma, strict=True):  # files go through Pillow's own conversion: the same numbers
        np.testing.assert_array_equal(convert(Image.fromarray(image), 6, 1)[0], grey[..., 0])
    back = match_channels(luma, 3)
    assert (back == luma).all() and back.shape == colour.shape
    with pytest.raises(ValueError, match="4 channels"):
        match_channels(np.zeros((1, 2, 2, 4), np.uint8), 3)


def test_large_jpeg_keeps_its_content(encode):
    ramp = np.linspace(0, 255, 2048).astype(np.uint8)
    data = encode(np.broadcast_to(ramp, (2048, 2048)).copy(), "JPEG", quality=95)
    out = decode(data, 16, 1)[0].astype(int)  # decoded at a quarter of its size
    expected = block_mean(np.broadcast_to(ramp, (2048, 2048))[None, ..., None], 128)[0, ..., 0]
    assert np.abs(out - expected.astype(int)).max() <= 2


def test_float_pixels_of_a_file_are_refused(encode):
    with pytest.raises(ValueError, match="float pixels"):
        decode(encode(Image.new("F", (8, 8), 0.5), "TIFF"), 8, 1)


def test_formats_that_are_not_listed_are_not_even_tried(encode):
    """Pillow knows more formats than pictures need, some of which run other programs."""
    for format in ("PCX", "SGI", "EPS"):
        with pytest.raises(ValueError, match="unknown format"):
            decode(encode(np.zeros((8, 8), np.uint8), format), 8, 1)


def test_too_many_pixels_are_refused(monkeypatch, encode):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="more than the 100"):
        decode(encode(np.zeros((11, 11), np.uint8)), 8, 1)
    with pytest.raises(Image.DecompressionBombError):
        decode(encode(np.zeros((64, 64), np.uint8)), 8, 1)
