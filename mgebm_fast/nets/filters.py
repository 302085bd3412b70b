"""Fixed filters for FRAME: Gabor functions, differences of Gaussians, and the pixel itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_ENVELOPE = 0.5  # standard deviation of a Gabor filter's Gaussian, in wavelengths
_SURROUND = 1.6  # of a DoG's outer Gaussian to its inner one, near a Laplacian (Marr and Hildreth, 1980)


def filter_bank(
    scales: Sequence[float], orientations: int = 8, *, channels: int = 1, signs: bool = True
) -> Tensor:  # (K, channels, k, k) float32
    """The filters, each with Σ|F| = 1, and with mean 0 but for the pixel's: an even and an odd Gabor filter for every
    wavelength of `scales` (in pixels) and orientation, on the mean of the channels; a DoG filter for every scale, and
    the pixel itself, on each channel.

        Gabor  exp(−(u² + v²)/2s²) · cos or sin(2πu/w),  (u, v) the pixel turned by θ,  s = w/2
        DoG    G(w/4) − G(1.6 w/4)

    `signs`: every filter, and its negative right after it, so that relu of both is |response|.
    k = 2⌈largest wavelength⌉ + 1.

    Source: Zhu, Wu, Mumford (Neural Computation 1997; IJCV 1998).
    """
    if not scales or any(not math.isfinite(w) or w < 1 for w in scales):
        raise ValueError(f"filter_bank: scales must be wavelengths of at least 1 pixel, got {list(scales)}")
    if orientations < 1:
        raise ValueError(f"filter_bank: orientations must be at least 1, got {orientations}")
    half = math.ceil(max(scales))
    y, x = torch.meshgrid(*[torch.arange(-half, half + 1, dtype=torch.float64)] * 2, indexing="ij")
    square = x.square() + y.square()
    grey, each = [], [(square == 0).double()]
    for wavelength in scales:
        envelope = torch.exp(-square / (2 * (_ENVELOPE * wavelength) ** 2))
        for turn in range(orientations):
            angle = math.pi * turn / orientations
            phase = 2 * math.pi / wavelength * (x * math.cos(angle) + y * math.sin(angle))
            even, odd = envelope * phase.cos(), envelope * phase.sin()
            # An even filter must not see brightness; what it loses has the shape of the envelope.
            grey += [even - envelope * (even.sum() / envelope.sum()), odd]
        each.append(_gaussian(square, wavelength / 4) - _gaussian(square, _SURROUND * wavelength / 4))
    filters = [f.expand(channels, *f.shape) / channels for f in grey]
    for f in each:
        for channel in range(channels):
            alone = torch.zeros(channels, *f.shape, dtype=f.dtype)
            alone[channel] = f
            filters.append(alone)
    bank = torch.stack([f / f.abs().sum() for f in filters])
    if signs:
        bank = torch.stack([bank, -bank], 1).flatten(0, 1)
    return bank.float()


def _gaussian(square: Tensor, std: float) -> Tensor:
    bell = torch.exp(-square / (2 * std**2))
    return bell / bell.sum()
