"""Pictures of image batches: grids with gaps, titled panels of grids, and PNG files written atomically."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .files import write_bytes

BACKGROUND = 255  # white: gaps stay visible beside dark and mid-grey pictures alike
INK = (40, 40, 40)


def image_grid(
    images: Any,  # (N, C, H, W) uint8, numpy array or tensor on any device
    *,
    columns: int | None = None,  # default: the nearest to a square, ceil(sqrt(N))
    gap: int = 2,
    scale: int = 1,
) -> np.ndarray:  # (H', W', 3) uint8
    """One picture of all images, row by row, with `gap` white pixels between and around them.

    Each image is enlarged `scale` times by pixel replication (the gap is not). Channels: 1 or 2 show the first
    as grey; 3 or more show the first three as red, green, blue. ValueError for another shape or dtype, or none.
    """
    if scale < 1:
        raise ValueError(f"image_grid: scale must be at least 1, got {scale}")
    pictures = _as_rgb("image_grid", images)
    height, width = pictures.shape[1] * scale, pictures.shape[2] * scale
    return _lay_out("image_grid", _enlarge(pictures, height, width), columns, gap)


def labelled_panel(
    panels: Sequence[tuple[str, Any]],  # (title, images (N, C, h, w) uint8); sizes may differ between panels
    *,
    across: int | None = None,  # panels side by side in one row; default: all of them
    columns: int | None = None,  # images side by side in one panel
    gap: int = 4,
    cell: int | None = None,  # pixels of the longer side of each image in the picture
    margin: int = 12,
) -> np.ndarray:  # (H', W', 3) uint8
    """Grids of images under their titles, every image at the same size whatever the size of its pixels.

    Coarse grids are enlarged by nearest neighbour (exact replication where their size divides `cell`). By
    default `cell` is the smallest multiple of the finest image that has at least 40 pixels. For the samples of
    every size over the data at that size, pass all samples, then all data, with `across` the number of sizes.
    """
    if not panels:
        raise ValueError("labelled_panel: panels must be a non-empty list of (title, images), got none")
    across = len(panels) if across is None else across
    if across < 1:
        raise ValueError(f"labelled_panel: across must be at least 1, got {across}")
    pictures = [_as_rgb("labelled_panel", images) for _, images in panels]
    finest = max((p.shape[1:3] for p in pictures), key=max)
    cell = max(finest) * math.ceil(40 / max(finest)) if cell is None else cell
    if cell < 1:
        raise ValueError(f"labelled_panel: cell must be at least 1, got {cell}")
    blocks = []
    for (title, _), p in zip(panels, pictures, strict=True):
        height, width = (max(1, round(cell * side / max(p.shape[1:3]))) for side in p.shape[1:3])
        blocks.append(_titled(title, _lay_out("labelled_panel", _enlarge(p, height, width), columns, gap), gap))

    rows = [blocks[i : i + across] for i in range(0, len(blocks), across)]
    widths = [max(row[i].shape[1] for row in rows if i < len(row)) for i in range(min(across, len(blocks)))]
    heights = [max(block.shape[0] for block in row) for row in rows]
    canvas = _canvas(sum(heights) + margin * (len(rows) + 1), sum(widths) + margin * (len(widths) + 1))
    top = margin
    for row, height in zip(rows, heights, strict=True):
        left = margin
        for block, width in zip(row, widths, strict=False):
            canvas[top : top + block.shape[0], left : left + block.shape[1]] = block
            left += width + margin
        top += height + margin
    return canvas


def save_png(path: str | os.PathLike[str], array: np.ndarray, *, durable: bool = True) -> Path:
    """Write (H, W), (H, W, 1) or (H, W, 3) uint8 as a PNG, atomically; `durable` as in `files.write_bytes`."""
    from PIL import Image

    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(
            f"save_png: array must be uint8 (H, W), (H, W, 1) or (H, W, 3), got {array.dtype} {tuple(array.shape)}"
        )
    encoded = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(encoded, format="PNG")
    return write_bytes(path, encoded.getbuffer(), durable=durable)


def _as_rgb(where: str, images: Any) -> np.ndarray:
    """(N, C, H, W) uint8 of any channel count -> (N, H, W, 3) uint8."""
    if hasattr(images, "detach"):
        images = images.detach().cpu().numpy()
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(
            f"{where}: images must be uint8 (N, C, H, W) with at least one image, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
    shown = images[:, :3] if images.shape[1] >= 3 else np.repeat(images[:, :1], 3, axis=1)
    return shown.transpose(0, 2, 3, 1)


def _enlarge(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest neighbour by cell centres; exact replication where the sizes divide."""
    rows = (2 * np.arange(height) + 1) * pictures.shape[1] // (2 * height)
    cols = (2 * np.arange(width) + 1) * pictures.shape[2] // (2 * width)
    return pictures[:, rows[:, None], cols[None, :]]


def _lay_out(where: str, pictures: np.ndarray, columns: int | None, gap: int) -> np.ndarray:
    """(N, h, w, 3) -> one picture, row by row."""
    if columns is not None and columns < 1:
        raise ValueError(f"{where}: columns must be at least 1, got {columns}")
    if gap < 0:
        raise ValueError(f"{where}: gap must not be negative, got {gap}")
    n, height, width, _ = pictures.shape
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    canvas = _canvas(rows * (height + gap) + gap, columns * (width + gap) + gap)
    for i, picture in enumerate(pictures):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def _titled(title: str, picture: np.ndarray, indent: int) -> np.ndarray:
    """`picture` under its title, widened where the title needs more room."""
    from PIL import Image, ImageDraw, ImageFont

    title = title.replace("×", "x")  # the font that comes with Pillow has no multiplication sign
    font = ImageFont.load_default(15)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left, _, right, _ = measure.multiline_textbbox((0, 0), title, font=font)
    tall = "\n".join("Ag" for _ in title.splitlines() or [""])  # titles side by side are as high, descenders or not
    bottom = measure.multiline_textbbox((0, 0), tall, font=font)[3]
    header, width = math.ceil(bottom) + 7, max(picture.shape[1], math.ceil(right - left) + 2 * indent)
    canvas = _canvas(header + picture.shape[0], width)
    text = Image.fromarray(np.ascontiguousarray(canvas[:header]))
    ImageDraw.Draw(text).multiline_text((indent, 0), title, font=font, fill=INK)
    canvas[:header] = np.asarray(text)
    canvas[header:, : picture.shape[1]] = picture
    return canvas


def _canvas(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), BACKGROUND, np.uint8)
