"""Sounds: samples out of a wav file at one rate, back into one, and pictures of a waveform and of its spectrum."""

from __future__ import annotations

import io
import math
import os
import warnings
import wave
from fractions import Fraction
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..files import write_bytes
from .arrays import read_npy
from .clips import Clips
from .foreign import MAX_RECORDING_BYTES, check_regular, expand, reading
from .simulated import simulated_chimes

ENDINGS = (".wav", ".wave")
OTHER_SOUNDS = (".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".ogg", ".opus")
BUILT_IN = "simulated:chimes"
RATE = 11025.0
PEAK = 0.9  # the largest magnitude that a sound is scaled to


def is_sound(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a sound: the built-in one, or a file by its ending."""
    return os.fspath(name) == BUILT_IN or Path(name).suffix.lower() in (*ENDINGS, *OTHER_SOUNDS)


def load_sound(
    source: str | os.PathLike[str] | np.ndarray, length: int, *, rate: float | None = None, hop: int = 1
) -> Clips:
    """Clips (1, L) float32 of a sound, scaled so that its largest magnitude is 0.9.

    Args:
        source: `simulated:chimes`; a wav file of 8 to 32 bits or of floats, whose channels are averaged; an array or
            .npy file (samples,).
        length: L, samples.
        rate: samples a second, to which the sound is brought by a polyphase filter. None: its own.
        hop: samples between the beginnings of two clips.

    Raises DataError: no sound, a damaged or silent one, one with fewer than L samples.
    """
    own = rate or RATE
    if isinstance(source, np.ndarray):
        name, samples = "array", _checked(source, "array")
    elif os.fspath(source) == BUILT_IN:
        name, samples = BUILT_IN, simulated_chimes(max(60000, length), round(own))
    else:
        path = expand(source)
        name = path.name
        if path.suffix.lower() == ".npy" and path.exists():
            check_regular(path, MAX_RECORDING_BYTES)
            samples = _checked(read_npy(path), name)
        else:
            samples, own = read_wav(path)
    if rate is not None and rate != own:
        from scipy.signal import resample_poly

        ratio = Fraction(rate / own).limit_denominator(1000)
        made = len(samples) * ratio
        if not 1 <= made <= MAX_RECORDING_BYTES // 8:
            raise DataError(
                f"{name} must come to 1 … {MAX_RECORDING_BYTES // 8} samples at its rate, got {float(made):g} at "
                f"{rate:g} a second"
            )
        samples = resample_poly(samples, ratio.numerator, ratio.denominator)
    peak = float(np.abs(samples).max(initial=0.0))
    if not 1e-30 < peak < math.inf:  # NaN is neither; below, the scale would overflow
        raise DataError(f"{name} must be a sound of finite samples that are not all zero")
    scaled = np.ascontiguousarray(samples * (PEAK / peak), np.float32)
    return Clips(scaled[None], length, hop, rate or own, name)


def read_wav(path: str | os.PathLike[str]) -> tuple[np.ndarray, float]:
    """(samples (L,) float32 in [-1, 1], samples a second) of a wav file; several channels are averaged."""
    from scipy.io import wavfile

    path = Path(path)
    if not path.exists() or path.is_dir():
        got = "a folder" if path.is_dir() else "which does not exist"
        raise DataError(f"a sound must be a .wav file, an .npy array or {BUILT_IN}, got {str(path)!r}, {got}")
    check_regular(path, MAX_RECORDING_BYTES)
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"a sound must be a .wav file or an .npy array, got {path.name}")
    with reading(path, "a wav file"), warnings.catch_warnings():
        warnings.simplefilter("ignore", wavfile.WavFileWarning)  # of chunks that are no samples
        rate, samples = wavfile.read(path)
        kind = samples.dtype
        samples = samples.astype(np.float64)
        if kind.kind in "iu":
            middle = 128.0 if kind == np.uint8 else 0.0
            samples = (samples - middle) / (128.0 if kind == np.uint8 else -float(np.iinfo(kind).min))
        samples = samples if samples.ndim == 1 else samples.mean(axis=1)
        if not rate > 0:
            raise ValueError(f"it states {rate} samples a second")
    return samples.astype(np.float32), float(rate)


def write_wav(path: str | os.PathLike[str], samples: np.ndarray, rate: float = RATE) -> Path:
    """(L,) floats in [-1, 1] as 16 bits, rounded and clamped. The file appears whole or not at all."""
    encoded = io.BytesIO()
    with wave.open(encoded, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(round(rate))
        file.writeframes(np.rint(np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return write_bytes(path, encoded.getbuffer())


def waveform(samples: np.ndarray, height: int = 96, width: int = 480) -> np.ndarray:
    """(height, width) uint8: each column spans what the samples (L,) of its share reach, -1 at the bottom, 1 on top."""
    picture = np.full((height, width), 255, np.uint8)
    row = np.clip((1 - np.asarray(samples, float)) / 2 * (height - 1), 0, height - 1)
    for column, part in enumerate(np.array_split(row, width)):
        if len(part):
            picture[int(part.min()) : int(math.ceil(part.max())) + 1, column] = 40
    return picture


def spectrogram(samples: np.ndarray, height: int = 96, width: int = 480, window: int = 512) -> np.ndarray:
    """(height, width) uint8: strength of frequencies over time, 0 to half the rate upwards, dark is strong; 70 dB.

    Short-time Fourier transforms of `window` Hann-weighted samples.
    """
    samples = np.pad(np.asarray(samples, float), window // 2)
    starts = np.linspace(0, len(samples) - window, width).astype(int)
    parts = np.stack([samples[s : s + window] for s in starts]) * np.hanning(window)
    strength = np.abs(np.fft.rfft(parts))[:, 1:].T[::-1]  # (window / 2, width)
    rows = np.array_split(strength, height)
    reduced = np.stack([row.max(axis=0) if len(row) else np.zeros(width) for row in rows])
    decibels = 20 * np.log10(np.maximum(reduced / (window / 8), 1e-9))  # 0: a sine of amplitude 1/4 and more
    return np.rint(255 * np.clip(-decibels / 70, 0, 1)).astype(np.uint8)


def _checked(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim != 1 or array.dtype.kind not in "fiu" or not len(array):
        raise DataError(f"{name} must be a sound, numbers of shape (samples,), got {array.dtype} {array.shape}")
    return array.astype(np.float64)
