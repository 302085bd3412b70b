"""One policy for every image: orientation, alpha, colour, crop and resize, the same for files, arrays and items.

1. EXIF orientation applied
2. centre crop to a square
3. alpha composited on white; palette, 1-bit, 16-bit, CMYK, YCbCr and HSV brought to 8-bit grey or RGB
4. grey -> 3 channels by replication; colour -> grey by ITU-R 601 luma, (19595 R + 38470 G + 7471 B) / 65536
5. to size x size: a whole-number reduction is the exact block mean, rounded half up, so that an image and the
   model's own pyramid agree; any other change is Pillow's antialiased bicubic
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .encoded import decoded, strips

if TYPE_CHECKING:
    from PIL import Image

POLICY_VERSION = 2  # part of the cache key: raise it whenever the pixels of any image change

EXTENSIONS = ".avif .bmp .gif .heic .heif .jfif .jp2 .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split()


def decode(data: bytes, size: int, channels: int) -> np.ndarray:
    """An encoded image -> (channels, size, size) uint8. ValueError or OSError with the reason where it cannot be."""
    return decoded(data, lambda image: convert(image, size, channels), size)


def read_grey(data: bytes) -> np.ndarray:
    """An encoded image -> (H, W) uint8, its luma, as it is stored."""
    return decoded(data, lambda image: np.asarray(image.convert("L")))


def convert(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """A Pillow image -> (channels, size, size) uint8, channels 1 or 3, by the policy above."""
    image.load()
    image = _upright(image)
    side = min(image.size)
    if side < 1:
        raise ValueError(f"an image of {image.width} x {image.height} pixels")
    if image.width != image.height:
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    _check_mode(image)
    factor = side // size if side % size == 0 else 0
    # In strips, of whole blocks where those are averaged: conversions of a large image would take its memory again.
    rows = max(1, 256 // factor) * factor if factor else 256
    pixels = np.empty((side // factor, size, channels) if factor else (side, side, channels), np.uint8)
    for start, part in strips(image, rows):
        strip = _eight_bit(part, channels)
        if factor:
            pixels[start // factor : (start + len(strip)) // factor] = block_mean(strip[None], factor)[0]
        else:
            pixels[start : start + len(strip)] = strip
    return fit(pixels[None], size)[0]


def fit(images: np.ndarray, size: int) -> np.ndarray:
    """Centre crop and resize: (N, H, W, C) uint8 -> (N, C, size, size) uint8, contiguous."""
    n, height, width, channels = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, top : top + side, left : left + side]
    if side % size == 0:
        images = block_mean(images, side // size)
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    out = np.empty((n, channels, size, size), np.uint8)
    for image, target in zip(images, out, strict=True):
        _bicubic(image, target)
    return out


def block_mean(images: np.ndarray, factor: int) -> np.ndarray:
    """Exact mean of factor x factor blocks, rounded half up: (N, H, W, C) uint8 -> (N, H/factor, W/factor, C)."""
    if factor == 1:
        return images
    n, height, width, channels = images.shape
    rows = images.reshape(n, height // factor, factor, width * channels).sum(axis=2, dtype=np.uint32)
    sums = rows.reshape(n, height // factor, width // factor, factor, channels).sum(axis=3, dtype=np.uint64)
    area = factor * factor
    return ((2 * sums + area) // (2 * area)).astype(np.uint8)


def match_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """(N, H, W, C) uint8 -> (N, H, W, channels): as it is, grey replicated, or RGB to luma. ValueError otherwise."""
    have = images.shape[-1]
    if have == channels:
        return images
    if have == 1:
        return np.repeat(images, channels, axis=-1)
    if have == 3 and channels == 1:
        red, green, blue = (images[..., i : i + 1].astype(np.uint32) for i in range(3))
        return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).astype(np.uint8)
    raise ValueError(f"{have} channels, which cannot become {channels}")


def _bicubic(image: np.ndarray, target: np.ndarray) -> None:
    """(side, side, C) -> target (C, size, size), one channel at a time unless Pillow knows the pixel as RGB."""
    from PIL import Image

    shape = target.shape[1:]
    if image.shape[-1] == 3:
        resized = Image.fromarray(np.ascontiguousarray(image)).resize(shape, Image.Resampling.BICUBIC)
        target[:] = np.asarray(resized).transpose(2, 0, 1)
        return
    for c in range(image.shape[-1]):
        channel = Image.fromarray(np.ascontiguousarray(image[..., c]))
        target[c] = np.asarray(channel.resize(shape, Image.Resampling.BICUBIC))


def _upright(image: Image.Image) -> Image.Image:
    from PIL import Image

    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # broken metadata of a sound image can raise anything; its pixels are still good
        orientation = 1
    turn = Image.Transpose
    moves = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(moves[orientation]) if orientation in moves else image


def _has_alpha(image: Image.Image) -> bool:
    """An alpha channel, a palette with one, or one colour or palette entry that is named as transparent."""
    palette = image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")
    return palette or image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _check_mode(image: Image.Image) -> None:
    """ValueError for pixels whose range is unknown."""
    if image.mode == "F":
        raise ValueError("32-bit float pixels, whose range is unknown: save it as 8- or 16-bit, or as an .npy array")
    if image.mode == "I":
        low, high = image.getextrema()
        if low < 0 or high > 65535:  # type: ignore[operator]
            raise ValueError(f"32-bit pixels in [{low}, {high}], beyond 16 bits")


def _eight_bit(image: Image.Image, channels: int) -> np.ndarray:
    """A Pillow image of any mode -> (H, W, channels) uint8."""
    from PIL import Image

    if image.mode == "I" or image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.int64)
        narrow = ((wide + 128) // 257).astype(np.uint8)
        narrow[wide == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(narrow)
    elif _has_alpha(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if image.mode not in ("L", "RGB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels[..., None] if channels == 1 else pixels
