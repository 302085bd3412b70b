"""A moving texture and a sound that are computed, not read: examples for learning from videos and from sounds.

Every number comes from `mgebm_fast.noise`, so a seed gives the same frames and samples everywhere, to rounding.
"""

from __future__ import annotations

import numpy as np

from .. import noise
from ..checks import is_int
from ..errors import DataError

_STREAM = noise.stream(noise.Purpose.SIMULATED_DATA)
_FLAMES, _CHIMES = 0, 1 << 16  # first step counters: the two never share a draw
_OCTAVES = 4
# Intensity -> colour: black, deep red, orange, yellow, near white.
_HEAT = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
_PALETTE = np.array([[8, 4, 6], [120, 18, 6], [226, 92, 12], [252, 190, 60], [255, 248, 214]], float)
# A pentatonic scale from C5, and the partials of a struck tube: frequency ratio, strength, seconds to fall to 1/e.
_NOTES = 523.25 * 2.0 ** (np.array([0, 2, 4, 7, 9, 12, 14, 16]) / 12)
_PARTIALS = ((1.0, 1.0, 0.9), (2.756, 0.45, 0.45), (5.404, 0.2, 0.2))


def simulated_fire(frames: int = 70, height: int = 64, width: int = 64, *, seed: int = 0) -> np.ndarray:
    """A fire: turbulence that rises, flickers and thins out upwards, in the colours of heat.

    Four octaves of value noise on a (time, height, width) lattice, the finer ones rising faster, less a ramp.

    Returns (frames, height, width, 3) uint8. Raises DataError for a length below 1.
    """
    for name, value in (("frames", frames), ("height", height), ("width", width)):
        _check(name, value)
    t, y, x = np.ogrid[:frames, :height, :width]
    up = (height - 1 - y) / max(1, height - 1)  # 0 at the bottom, 1 at the top
    # Flames lean from side to side, more the higher they are.
    sway = 0.06 * width * up * np.sin(2 * np.pi * (t / 23 + 0.6 * up + _uniform(1, seed, _FLAMES)))
    total, weight = np.zeros((frames, height, width)), 0.0
    for octave in range(_OCTAVES):
        cells = 3 * 2**octave
        scale = cells / width
        strength = 0.6**octave
        lattice = _uniform(16 * (2 * cells) * cells, seed, _FLAMES + 1 + octave).reshape(16, 2 * cells, cells)
        rise = 1.6 * height / 64 * (1 + 0.35 * octave)  # pixels a frame
        place = (0.11 * (octave + 1) * t, 0.6 * scale * (y + rise * t), scale * (x + sway))
        total += strength * _value_noise(lattice, *np.broadcast_arrays(*place))
        weight += strength
    centre = np.abs(2 * x / max(1, width - 1) - 1)
    heat = 1.9 * total / weight - 1.05 * up**0.9 - 0.45 * centre**2 + 0.15
    heat = np.clip(heat, 0.0, 1.0)
    return np.rint(np.stack([np.interp(heat, _HEAT, _PALETTE[:, c]) for c in range(3)], -1)).astype(np.uint8)


def simulated_chimes(samples: int = 60000, rate: int = 11025, *, seed: int = 0) -> np.ndarray:
    """Wind chimes: tubes of a pentatonic scale struck at random, about four times a second.

    Each stroke is Σ a_p exp(−t/τ_p) sin(2π f r_p t) over the partials of a free tube below half the rate.

    Returns (samples,) float32 with its largest magnitude at 0.9. Raises DataError for a length or rate below 1.
    """
    _check("samples", samples)
    _check("rate", rate)
    strokes = max(1, round(4 * samples / rate))
    when, which, force = _uniform(3 * strokes, seed, _CHIMES).reshape(3, strokes)
    # One stroke in each of equal spans, the first at the beginning, so that no part is silent.
    starts = ((np.arange(strokes) + np.r_[0.0, when[1:]]) / strokes * samples).astype(int)
    sound = np.zeros(samples)
    for start, note, strength in zip(starts, (which * len(_NOTES)).astype(int) % len(_NOTES), force, strict=True):
        t = np.arange(samples - start) / rate
        for ratio, share, fall in _PARTIALS:
            frequency = _NOTES[note] * ratio
            if frequency < rate / 2:
                sound[start:] += (0.4 + 0.6 * strength) * share * np.exp(-t / fall) * np.sin(2 * np.pi * frequency * t)
    return (0.9 * sound / max(np.abs(sound).max(), 1e-12)).astype(np.float32)


def _check(name: str, value: int) -> None:
    if not is_int(value, 1):
        raise DataError(f"{name} must be a positive int, got {value!r}", "simulated")


def _uniform(count: int, seed: int, step: int) -> np.ndarray:
    """(count,) float64 in (0, 1]."""
    words, _ = noise.words(1, count, seed=seed, step=step, stream=_STREAM)
    return noise.uniform(words).reshape(-1)[:count].double().numpy()


def _value_noise(lattice: np.ndarray, t: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Smooth interpolation of a periodic lattice of values at real places."""
    total = np.zeros(t.shape)
    corners, shares = [], []
    for place in (t, y, x):
        below = np.floor(place)
        part = place - below
        corners.append(below.astype(int))
        shares.append(part * part * (3 - 2 * part))
    for i in (0, 1):
        for j in (0, 1):
            for k in (0, 1):
                share = np.ones(t.shape)
                for offset, part in zip((i, j, k), shares, strict=True):
                    share = share * (part if offset else 1 - part)
                index = (c + o for c, o in zip(corners, (i, j, k), strict=True))
                total += share * lattice[tuple(c % n for c, n in zip(index, lattice.shape, strict=True))]
    return total
