"""Videos: frames out of a file or a folder at one size and rate, and back into GIF, MP4 or a folder of PNG files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..files import write_bytes
from .arrays import read_npy
from .clips import Clips
from .encoded import decoded
from .foreign import MAX_RECORDING_BYTES, bounded_bytes, check_regular, expand, reading
from .policy import match_channels
from .simulated import simulated_fire

ENDINGS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
BUILT_IN = "simulated:fire"
RATE = 25.0  # frames a second of what says none


def is_video(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a video: the built-in one, or a file by its ending."""
    return os.fspath(name) == BUILT_IN or Path(name).suffix.lower() in ENDINGS


def load_video(
    source: str | os.PathLike[str] | np.ndarray,
    size: tuple[int, int, int],  # (T, H, W)
    channels: int,
    *,
    rate: float | None = None,
    hop: int = 1,
) -> Clips:
    """Clips (C, T, H, W) uint8 of a video.

    Args:
        source: `simulated:fire`; a file that `av` reads (GIF needs Pillow alone); a folder of frames, in the order of
            their names; an array or .npy file (frames, H, W) or (frames, H, W, C) of uint8.
        channels: 1 grey, 3 colour.
        rate: frames a second; of a source with more or fewer, the frame on show at each time is taken. None: its own.
        hop: frames between the beginnings of two clips.

    Frames are cut to the shape H:W around their middle, and resized by the means of the areas that pixels cover.

    Raises DataError: no video, a damaged one, one with fewer than T frames.
    """
    length, height, width = size
    frames: Iterable[np.ndarray]
    if isinstance(source, np.ndarray):
        name, own, frames = "array", RATE, _checked(source, "array")
    elif os.fspath(source) == BUILT_IN:
        name, own, frames = BUILT_IN, RATE, simulated_fire(70, height, width)
    else:
        path = expand(source)
        name, (frames, own) = path.name, _open(path)
    fitted = _fit(_at_rate(frames, own, rate), height, width, channels, name)
    return Clips(np.ascontiguousarray(fitted.transpose(3, 0, 1, 2)), length, hop, rate or own, name)


def write_gif(path: str | os.PathLike[str], frames: np.ndarray, rate: float = RATE) -> Path:
    """Frames (T, H, W, 3) uint8 as a GIF that repeats for ever; whole or not at all. GIF counts in 1/100 s."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in np.ascontiguousarray(frames)]
    # One palette: with one for each frame, colours that do not change flicker.
    sheet = Image.fromarray(np.concatenate(list(frames[:: max(1, len(frames) // 16)])))
    palette = sheet.quantize(255, Image.Quantize.MEDIANCUT)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    encoded = io.BytesIO()
    duration = max(20, round(100 / rate) * 10)
    pictures[0].save(encoded, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return write_bytes(path, encoded.getbuffer())


def write_mp4(path: str | os.PathLike[str], frames: np.ndarray, rate: float = RATE) -> Path:
    """Frames (T, H, W, 3) uint8 as H.264, or MPEG-4 where `av` has no encoder for that; whole or not at all."""
    from fractions import Fraction

    av = _av(f"writing {Path(path).name}")
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    encoded = io.BytesIO()
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(encoded, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "16"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return write_bytes(path, encoded.getbuffer())


def _open(path: Path) -> tuple[Iterator[np.ndarray], float]:
    """Frames (H, W, C) uint8 one by one, and how many there are a second."""
    if not path.exists():
        raise DataError(f"{str(path)!r} is not a file, a folder of frames or the built-in video ({BUILT_IN})")
    if path.is_dir():
        pictures = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not pictures:
            raise DataError(f"{path} must hold the frames of a video as pictures, got none")
        return (_picture(p) for p in pictures), RATE
    check_regular(path)
    if path.suffix.lower() == ".npy":
        return iter(_checked(read_npy(path, mmap_mode="r"), path.name)), RATE
    if path.suffix.lower() == ".gif":
        return _gif(path)
    if not is_video(path):
        raise DataError(
            f"a video must be a folder of frames, an .npy array, or a file to end in {', '.join(ENDINGS)}, "
            f"got {path.name}"
        )
    return _file(path)


def _picture(path: Path) -> np.ndarray:
    with reading(path, "a frame"):
        return decoded(bounded_bytes(path), lambda image: np.asarray(image.convert("RGB")))


def _gif(path: Path) -> tuple[Iterator[np.ndarray], float]:
    from PIL import Image, ImageSequence

    with reading(path, "a GIF"), Image.open(path, formats=["GIF"]) as image:
        durations = float(image.info.get("duration", 0))

    def frames() -> Iterator[np.ndarray]:
        with reading(path, "a GIF"), Image.open(path, formats=["GIF"]) as image:
            for frame in ImageSequence.Iterator(image):
                yield np.asarray(frame.convert("RGB"))

    return frames(), 1000 / durations if durations > 0 else RATE


def _file(path: Path) -> tuple[Iterator[np.ndarray], float]:
    av = _av(f"reading {path.name}")
    with reading(path, "a video"), av.open(str(path)) as container:
        if not container.streams.video:
            raise DataError(f"{path} holds no video")
        average = container.streams.video[0].average_rate

    def frames() -> Iterator[np.ndarray]:
        with reading(path, "a video"), av.open(str(path)) as container:
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")

    return frames(), float(average) if average else RATE


def _av(what: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(f"{what} needs the package av: pip install 'mgebm_fast[video]'") from error
    return av


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    """(frames, H, W, C) of an array of frames; DataError where it is none."""
    array = array[..., None] if array.ndim == 3 else array
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise DataError(
            f"{name} must be a video, uint8 (frames, H, W) or (frames, H, W, 3), got {array.dtype} {array.shape}"
        )
    return array


def _at_rate(frames: Iterable[np.ndarray], own: float, rate: float | None) -> Iterator[np.ndarray]:
    """The frames on show at the times 0, 1/rate, 2/rate, …"""
    taken = 0
    for index, frame in enumerate(frames):
        if rate is None:
            yield frame
            continue
        while taken * own < (index + 1) * rate:
            yield frame
            taken += 1


def _fit(frames: Iterable[np.ndarray], height: int, width: int, channels: int, name: str) -> np.ndarray:
    """Centre crop to height:width, means of areas: (T, height, width, channels) uint8."""
    from PIL import Image

    fitted: list[np.ndarray] = []
    for frame in frames:
        if (len(fitted) + 1) * height * width * channels > MAX_RECORDING_BYTES:
            raise DataError(
                f"{name} must come to at most {MAX_RECORDING_BYTES} bytes of pixels at its size and rate, "
                f"which {len(fitted)} frames reach"
            )
        rows, columns = frame.shape[:2]
        scale = min(rows / height, columns / width)
        top, left = (rows - scale * height) / 2, (columns - scale * width) / 2
        frame = match_channels(frame[None], channels)[0]
        image = Image.fromarray(np.ascontiguousarray(frame.squeeze(-1) if channels == 1 else frame))
        if (rows, columns) != (height, width):
            box = (left, top, left + scale * width, top + scale * height)
            image = image.resize((width, height), Image.Resampling.BOX, box=box)
        fitted.append(np.asarray(image).reshape(height, width, channels))
    if not fitted:
        raise DataError(f"{name} holds no frames")
    return np.stack(fitted)
