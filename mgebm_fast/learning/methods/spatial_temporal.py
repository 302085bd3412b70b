"""Spatial-temporal generative ConvNet (Xie, Zhu, Wu, CVPR 2017): a video or a sound learnt by persistent chains."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data import builtin, sound, video
from ...data.clips import Clips
from ...errors import ConfigError, DataError
from ...models import SpatialTemporal
from ...nets import ConvSpec
from ..config.keys import (
    MOST_CHANNELS,
    MOST_LENGTH,
    MOST_RATE,
    MOST_SAMPLES,
    MOST_STEPS,
    Choice,
    Many,
    Maybe,
    Real,
    Whole,
    key,
    pick,
)
from ..config.method import Method, register
from ..config.train_config import TrainConfig
from ..config.values import merge
from .baselines import SingleGridRule, Zeros
from .work import work_of_chains

_SHOWN = 16  # frames of a clip in a picture
_SOUND_PICTURE = 96, 480


@dataclasses.dataclass(frozen=True)
class SpatialTemporalConfig:
    """`[spatial-temporal]`: the clips that are learnt from, the net, and its persistent chains."""

    size: tuple = key(
        (20, 32, 32),
        Many(Whole(2, MOST_LENGTH), least=1, most=3),
        "size of a clip: [frames, height, width], or [samples] of a sound",
        fixed=True,
    )
    rate: Any = key(
        None,
        Maybe(Real(0, MOST_RATE, above=True)),
        "frames or samples a second that data are brought to; none: 25 of videos, 11025 of sounds",
        fixed=True,
    )
    hop: int = key(1, Whole(1, MOST_LENGTH), "frames or samples between the beginnings of clips", fixed=True)
    layers: tuple = key(
        ((32, 5, 2), (64, 3, 2)),
        Many(Many(Whole(1, MOST_CHANNELS), 3), least=1, most=64),
        "[channels, kernel, stride] of each layer",
        fixed=True,
    )
    head: str = key(
        "linear", Choice(("linear", "sum")), "linear over the top map, or its sum: places are alike", fixed=True
    )
    bank_size: Any = key(
        None, Maybe(Whole(1, MOST_SAMPLES)), "chains that batches are drawn from; none: as many as a batch", fixed=True
    )
    restart: float = key(
        0.0, Real(0, 1), "probability that a drawn chain starts again from the data's mean", fixed=True
    )
    sample_steps: Any = key(
        None, Maybe(Whole(1, MOST_STEPS)), "further steps of a stored chain that is sampled; none: as in training"
    )


class SpatialTemporalRule(SingleGridRule):
    """`ContrastiveRule` of a `SpatialTemporal`: as many persistent chains as a batch has clips, from the data's mean.

    A batch is clips of one recording, (N, C, T, H, W) uint8 or (N, 1, L) float32 in `value_range`.
    """

    model: SpatialTemporal

    def observed(self, batch: Tensor) -> list[Tensor]:  # -> means (N, C), clips, both float32
        x = self.model.in_units(batch)
        return [x.flatten(2).mean(2), x]

    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        """The persistent chains over clips of the data: frames of each in order, or waveforms and spectra."""
        chains = self.model.bank[:3]
        rows = [("chain", chains), ("data", self.observed(observed[: len(chains)])[1])]
        panels = [
            (f"{title} {i}", pictures_of(self.model, clip))
            for title, clips in rows
            for i, clip in enumerate(clips, start=1)
        ]
        return panels, len(chains)


def pictures_of(model: SpatialTemporal, clip: Tensor) -> Tensor:  # (C, T, H, W) or (1, L), in the model's units
    """A clip as uint8 pictures: evenly spread frames (n, C, H, W), or the waveform and the spectrum (2, 1, h, w)."""
    if model.is_video:
        frames = model.to_uint8(clip).transpose(0, 1)
        shown = min(_SHOWN, len(frames))
        return frames[torch.arange(shown) * len(frames) // shown]
    samples = as_sound(model, clip)
    height, width = _SOUND_PICTURE
    both = np.stack([draw(samples, height, width) for draw in (sound.waveform, sound.spectrogram)])
    return torch.from_numpy(both[:, None])


def as_sound(model: SpatialTemporal, clip: Tensor) -> np.ndarray:  # (1, L) -> (L,)
    """The samples of a clip in [-1, 1]."""
    low, high = model.value_range
    return ((clip[0].cpu() - low) * (2 / (high - low)) - 1).clamp(-1, 1).numpy()


def load_data(
    config: TrainConfig, *, source: Any = None, split: str = "train", strict: bool = False, like: Any = None
) -> Clips:
    """The clips of the recording that a configuration names; all of it, whatever the split.

    Raises DataError: images, a sound for a net of videos, a video for a net of sounds, or what cannot be read.
    """
    source = config.data if source is None else source
    if isinstance(source, Clips):
        return source
    options, size = config.options, _size(config)
    is_video = len(size) == 3
    if isinstance(source, (str, Path)):
        _check_kind(str(source), config, is_video)
    elif not isinstance(source, np.ndarray):
        raise DataError(
            f"must be the path of a recording or an array for the method {config.method!r}, got "
            f"{type(source).__name__}",
            "data",
        )
    if is_video:
        return video.load_video(source, size, config.channels, rate=_rate(config), hop=options.hop)  # type: ignore[arg-type]
    clips = sound.load_sound(source, size[0], rate=_rate(config), hop=options.hop)
    low, high = config.value_range
    units = ((clips.recording + 1) * ((high - low) / 2) + low).astype(np.float32)
    return Clips(units, clips.length, clips.hop, clips.rate, clips.name)


def _check_kind(source: str, config: TrainConfig, is_video: bool) -> None:
    shape = list(_size(config))
    if is_video and sound.is_sound(source):
        raise DataError(
            f"must be a video for a net of size {shape}, got the sound {source} (the preset chimes takes sounds)",
            "data",
        )
    if not is_video and video.is_video(source):
        raise DataError(
            f"must be a sound for a net of size {shape}, got the video {source} (the preset fire takes videos)",
            "data",
        )
    kind = "video" if is_video else "sound"
    images = builtin.is_builtin(source) and not (video.is_video(source) or sound.is_sound(source))
    if images or source.startswith("torchvision:"):
        raise DataError(f"must be a {kind} for the method {config.method!r}, got the images {source}", "data")


def narrow(config: TrainConfig) -> TrainConfig:
    """The configuration with the sizes (1, the last length of a clip), for one net."""
    return merge(config, {"sizes": [1, _size(config)[-1]], "begin": 0.0})


def build_model(config: TrainConfig) -> SpatialTemporal:
    """The untrained model."""
    one = narrow(config)
    options, size = one.options, _size(one)
    if len(size) == 1 and one.channels != 1:
        raise ConfigError(f"channels must be 1 for sounds, size {list(size)}, got {one.channels}")
    if one.shifts:
        raise ConfigError(f"shifts must be 0 for the method 'spatial-temporal', which learns clips, got {one.shifts}")
    if len(size) == 1 and one.flips:
        raise ConfigError(f"flips must be false for sounds, size {list(size)}, whose last dimension is time, got true")
    return SpatialTemporal(
        size,
        [ConvSpec(max(1, round(c * pick(one.width, -1))), kernel, stride) for c, kernel, stride in options.layers],
        head=options.head,
        rate=_rate(one),
        sample_steps=options.sample_steps,
        **one.model_arguments(),
    )


def _size(config: TrainConfig) -> Sequence[int]:
    size = tuple(config.options.size)
    if len(size) not in (1, 3):
        raise ConfigError(f"{config.method}.size must be [frames, height, width] or [samples], got {list(size)}")
    return size


def _rate(config: TrainConfig) -> float:
    """Frames or samples a second."""
    return config.options.rate or (video.RATE if len(_size(config)) == 3 else sound.RATE)


register(
    Method(
        "spatial-temporal",
        "one net over time, of a video or a sound, persistent chains from the data's mean",
        SpatialTemporal,
        SpatialTemporalRule,
        build_model,
        work_of_chains,
        SpatialTemporalConfig,
        narrow=narrow,
        start=Zeros,
        idle=lambda config: {"classes": "with the method 'spatial-temporal', whose recordings have none"},
        takes="clips",
        load_data=load_data,
    )
)
