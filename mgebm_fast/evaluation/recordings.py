"""What `mgebm sample` writes of a model of videos or of sounds."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import write_npy

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..models import SpatialTemporal

VIDEO_FILES, SOUND_FILES = (".gif", ".mp4", ".png", ".npy"), (".wav", ".png", ".npy")
_SCALE_TO = 96  # pixels of a frame's shorter side in a GIF or MP4
_STRIP = 10  # frames of a video in a picture


def check(model: SpatialTemporal, out: Path, num: int, grids: bool) -> tuple[str, ...]:
    """The endings of the files that a model of recordings can be written as; ValueError for what one cannot hold."""
    if grids:
        raise ValueError("--grids: must be left out for a model of videos or of sounds, which has one size")
    if num > 1 and out.suffix.lower() == ".wav":
        raise ValueError(f"--out: must be a folder to hold {num} sounds, got {out}, which holds one")
    return VIDEO_FILES if model.is_video else SOUND_FILES


def write(model: SpatialTemporal, x: Tensor, out: Path, kind: str, first_sample: int) -> None:
    """Write recordings x (N, C, *size), in the model's units, whole or not at all."""
    if kind == "folder":
        _write_folder(model, x, out, first_sample)
    elif model.is_video:
        frames = model.to_uint8(x).permute(0, 2, 3, 4, 1).cpu().numpy()
        _VIDEO[kind](model, frames, out)
    else:
        from ..learning.methods.spatial_temporal import as_sound

        _SOUND[kind](model, [as_sound(model, clip) for clip in x], out)


def _beside(videos: np.ndarray) -> np.ndarray:
    """(N, T, H, W, C) -> (T, H', W', 3): side by side and enlarged, with gaps."""
    import numpy as np

    from ..pictures import image_grid

    scale = max(1, round(_SCALE_TO / min(videos.shape[2:4])))
    frames = videos.transpose(1, 0, 4, 2, 3)
    columns = len(videos) if len(videos) < 5 else None
    gap = 2 if len(videos) > 1 else 0
    return np.stack([image_grid(frame, scale=scale, gap=gap, columns=columns) for frame in frames])


def _gif(model: SpatialTemporal, videos: np.ndarray, out: Path) -> None:
    from ..data.video import write_gif

    write_gif(out, _beside(videos), model.rate)


def _mp4(model: SpatialTemporal, videos: np.ndarray, out: Path) -> None:
    from ..data.video import write_mp4

    write_mp4(out, _beside(videos), model.rate)


def _strip(model: SpatialTemporal, videos: np.ndarray, out: Path) -> None:
    """A row of frames of each video, in order."""
    from ..pictures import image_grid, save_png

    length = videos.shape[1]
    shown = min(_STRIP, length)
    rows = videos[:, [i * length // shown for i in range(shown)]]
    frames = rows.reshape(-1, *rows.shape[2:]).transpose(0, 3, 1, 2)
    save_png(out, image_grid(frames, columns=shown, scale=max(1, round(64 / min(rows.shape[2:4])))))


def _video_array(model: SpatialTemporal, videos: np.ndarray, out: Path) -> None:
    write_npy(out, videos.transpose(0, 4, 1, 2, 3))


def _wav(model: SpatialTemporal, sounds: list[np.ndarray], out: Path) -> None:
    from ..data.sound import write_wav

    write_wav(out, sounds[0], model.rate)


def _plot(model: SpatialTemporal, sounds: list[np.ndarray], out: Path) -> None:
    """The waveform of each sound beside its spectrum over time."""
    import numpy as np

    from ..data.sound import spectrogram, waveform
    from ..pictures import image_grid, save_png

    pictures = [draw(samples) for samples in sounds for draw in (waveform, spectrogram)]
    save_png(out, image_grid(np.stack(pictures)[:, None], columns=2, gap=6))


def _sound_array(model: SpatialTemporal, sounds: list[np.ndarray], out: Path) -> None:
    import numpy as np

    write_npy(out, np.stack(sounds)[:, None])


def _write_folder(model: SpatialTemporal, x: Tensor, out: Path, first_sample: int) -> None:
    """A folder of frames for one video, a folder of such folders for more; a wav file for each sound."""
    from ..data.sound import write_wav
    from ..files import folder_beside, synchronise
    from ..learning.methods.spatial_temporal import as_sound
    from ..pictures import save_png

    out = out.resolve()  # a link to a folder stays one
    with folder_beside(out) as temporary:
        for i, clip in enumerate(x, start=first_sample):
            if not model.is_video:
                write_wav(temporary / f"sample_{i:05d}.wav", as_sound(model, clip), model.rate)
                continue
            folder = temporary if len(x) == 1 else temporary / f"sample_{i:05d}"
            folder.mkdir(exist_ok=True)
            for t, frame in enumerate(model.to_uint8(clip).permute(1, 2, 3, 0).cpu().numpy()):
                save_png(folder / f"frame_{t:05d}.png", frame, durable=False)
        synchronise(temporary, inside=True)
        if out.is_dir():  # one that holds things was let through by --overwrite
            _remove_samples(out)
            shutil.copytree(temporary, out, dirs_exist_ok=True)
            synchronise(out, inside=True)
        else:
            os.replace(temporary, out)
        synchronise(out.parent)


def _remove_samples(out: Path) -> None:
    """What an earlier `_write_folder` wrote, and nothing else."""
    for old in [*out.glob("*"), *out.glob("sample_*/*")]:
        if _OURS.fullmatch(old.relative_to(out).as_posix()) and old.is_file():
            old.unlink()
    for folder in out.glob("sample_*"):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


_OURS = re.compile(r"sample_\d{5,}\.wav|(sample_\d{5,}/)?frame_\d{5,}\.png")
_VIDEO: dict[str, Callable[[SpatialTemporal, np.ndarray, Path], None]] = {
    ".gif": _gif, ".mp4": _mp4, ".png": _strip, ".npy": _video_array,
}  # fmt: skip
_SOUND: dict[str, Callable[[SpatialTemporal, list[np.ndarray], Path], None]] = {
    ".wav": _wav, ".png": _plot, ".npy": _sound_array,
}  # fmt: skip
