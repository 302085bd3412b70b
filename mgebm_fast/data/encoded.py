"""Encoded images: opened by Pillow within bounds of memory, and 16-bit colour read to the last bit.

At most PIXELS_AT_ONCE are decoded at a time over all threads (about 12 bytes each, 0.8 GB); a larger image, of up to
Pillow's MAX_IMAGE_PIXELS, is decoded alone.
"""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
PIXELS_AT_ONCE = 64 << 20

# A photograph far larger than needed is decoded at 1/2, 1/4 or 1/8 by the JPEG transform itself, down to no less
# than this many pixels a side and 4 x size: three times faster, and still far above the final size.
_DRAFT_SIDE = 512
_PNG = b"\x89PNG\r\n\x1a\n"
_HEIF_BRANDS = (b"heic", b"heif", b"heim", b"heis", b"heix", b"mif1", b"msf1")
# Layouts of 16-bit colour, of which Pillow keeps the high bytes, and the layouts by which it would give the low ones.
_GREY_ALPHA = "LA;16B"
_OTHER_BYTES = {_GREY_ALPHA: "RGBA"}
for _mode in ("RGB", "RGBA", "RGBX"):
    _OTHER_BYTES |= {f"{_mode};16B": f"{_mode};16L", f"{_mode};16L": f"{_mode};16B"}
    _OTHER_BYTES[f"{_mode};16N"] = f"{_mode};16{'B' if sys.byteorder == 'little' else 'L'}"


class _Budget:
    """Admits threads while the pixels they hold stay within a limit; a single thread may exceed it."""

    def __init__(self, most: int) -> None:
        self._most, self._held, self._changed = most, 0, threading.Condition()

    @contextlib.contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + pixels <= self._most)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


_budget = _Budget(PIXELS_AT_ONCE)


def decoded(data: bytes, use: Callable[[Image.Image], np.ndarray], size: int | None = None) -> np.ndarray:
    """`use` of the decoded image, a JPEG no larger than `size` needs. ValueError or OSError where there is none.

    A PNG whose notes, colour profile or the like Pillow refuses, as too large or damaged, is read without them.
    """
    if not data:
        raise ValueError("empty file")
    try:
        return _decoded(data, use, size)
    except Exception:
        bare = _without_notes(data)
        if bare is None:
            raise
        return _decoded(bare, use, size)


def _decoded(data: bytes, use: Callable[[Image.Image], np.ndarray], size: int | None) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        image = _open(data)
    except UnidentifiedImageError:
        if _is_heif(data) and not _heif_opens():
            raise ValueError("HEIC, which pip install 'mgebm_fast[heic]' lets it read") from None
        raise ValueError("not an image, or of an unknown format") from None
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels, more than the {limit} that Pillow allows")
    if size is not None:
        side = max(4 * size, _DRAFT_SIDE)
        image.draft(None, (side, side))  # of JPEGs only: other formats ignore it
    with _budget.of(image.width * image.height):
        _round_sixteen_bits(image, data)
        image.load()
        return use(image)


def _open(data: bytes) -> Image.Image:
    from PIL import Image

    Image.init()
    if _is_heif(data):
        _heif_opens()
    return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS


@functools.cache
def _heif_opens() -> bool:
    """Whether Pillow opens HEIC files: it does once pillow-heif, where that is installed, has told it how."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener(thumbnails=False)
    return True


def strips(image: Image.Image, rows: int = 256) -> Iterator[tuple[int, Image.Image]]:
    """(first row, part) of an image from top to bottom: what is made of a part takes little memory."""
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _round_sixteen_bits(image: Any, data: bytes) -> None:
    """Makes 16-bit RGB, RGBA and grey + alpha of PNG and TIFF round(v / 257), where Pillow keeps the high byte of v.

    The low bytes are decoded as the high ones of the other byte order; those of grey + alpha, with the high ones, as
    four channels of 8 bits.
    """
    from PIL import Image

    names = {tile.args if isinstance(tile.args, str) else tile.args[0] for tile in image.tile}
    name = names.pop() if len(names) == 1 and image.format in ("PNG", "TIFF") else ""
    other = _OTHER_BYTES.get(name)
    if other is None:
        return
    low: Any = _open(data)
    low.tile = [
        tile._replace(args=other if isinstance(tile.args, str) else (other, *tile.args[1:])) for tile in low.tile
    ]
    image.load()
    transparent = image.info.pop("transparency", None)  # a colour of 16-bit numbers
    for (top, high_part), (_, low_part) in zip(strips(image), strips(low), strict=True):
        if name == _GREY_ALPHA:
            pairs = np.asarray(low_part).astype(np.uint32)
            wide = (pairs[..., ::2] * 256 + pairs[..., 1::2])[..., [0, 0, 0, 1]]
        else:
            wide = np.asarray(high_part).astype(np.uint32) * 256 + np.asarray(low_part)
        narrow = ((wide + 128) // 257).astype(np.uint8)
        if transparent is not None:
            narrow[(wide == np.asarray(transparent)).all(-1)] = 255
        image.paste(Image.fromarray(narrow), (0, top))


def _without_notes(data: bytes) -> bytes | None:
    """A PNG of the chunks alone that its pixels, their transparency and its orientation are made of; None for another
    file, or one that has no others."""
    if not data.startswith(_PNG):
        return None
    kept, place = [_PNG], len(_PNG)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf"):
            kept.append(data[place:end])
        place = end
    bare = b"".join(kept)
    return bare if len(bare) < min(place, len(data)) else None
