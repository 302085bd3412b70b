"""The nets of the multi-grid EBM (Gao et al., CVPR 2018, arXiv 1709.08868), and a small family for other sizes."""

from __future__ import annotations

from typing import Any

from ..checks import one_of, positive_int, positive_number
from ..errors import Refused
from .energy_net import ConvSpec, EnergyNet
from .residual import ResidualNet

VARIANTS = ("A", "B", "compact", "residual")

_PUBLISHED = {
    4: (ConvSpec(96, 5, 2), ConvSpec(128, 3), ConvSpec(256, 3)),
    16: (ConvSpec(96, 5, 2), ConvSpec(128, 3), ConvSpec(256, 3), ConvSpec(512, 3)),
}
_PUBLISHED_64 = {
    "A": (ConvSpec(64, 5, 2), ConvSpec(128, 3, 2), ConvSpec(256, 3)),
    "B": (ConvSpec(64, 5, 2), ConvSpec(128, 5, 2), ConvSpec(256, 5, 2), ConvSpec(512, 5, 2)),
}
_COMPACT_BASE, _COMPACT_CAP = 32, 128


def compact_layers(size: int) -> tuple[ConvSpec, ...]:
    """A small net for any size: 3×3 convolutions, the first at full resolution, then stride 2 with twice the channels
    (to a cap) until the map is 4×4 or odd; size 4 halves once as well, and sizes up to 8 get one more at stride 1."""
    layers = [ConvSpec(_COMPACT_BASE, 3)]
    channels, extent = _COMPACT_BASE, size
    while extent % 2 == 0 and (extent > 4 or extent == size == 4):
        channels, extent = min(2 * channels, _COMPACT_CAP), extent // 2
        layers.append(ConvSpec(channels, 3, 2))
    if size <= 8:
        layers.append(ConvSpec(2 * _COMPACT_BASE, 3))
    return tuple(layers)


def residual_stages(size: int) -> tuple[int, ...]:
    """The channels of each stage of a small residual net for any size: 32, then twice as many (to a cap) each time that
    the map is halved, until it is 4×4 or odd; size 4 halves once as well."""
    stages, extent = [_COMPACT_BASE], size
    while extent % 2 == 0 and (extent > 4 or extent == size == 4):
        stages.append(min(2 * stages[-1], _COMPACT_CAP))
        extent //= 2
    return tuple(stages)


def multigrid_layers(size: int, variant: str = "B", width: float = 1.0) -> tuple[ConvSpec, ...]:
    """The convolutions of the net at `size`: published at 4, 16 and 64 for "A" and "B", compact elsewhere."""
    one_of(variant, VARIANTS[:3], "variant", "multigrid_layers")
    size = positive_int(size, "size", "multigrid_layers")
    width = positive_number(width, "width", "multigrid_layers")
    if variant == "compact" or size not in (4, 16, 64):
        layers = compact_layers(size)
    else:
        layers = _PUBLISHED_64[variant] if size == 64 else _PUBLISHED[size]
    return tuple(ConvSpec(_widened(spec.channels, width), spec.kernel, spec.stride) for spec in layers)


def multigrid_net(
    size: int,
    channels: int = 3,
    width: float = 1.0,
    norm: str | None = None,
    variant: str = "B",
    *,
    depth: int = 1,
    activation: str | None = None,
    spectral_norm: bool = False,
    seed: int = 0,
) -> EnergyNet | ResidualNet:
    """The energy net of one grid: (N, channels, size, size) -> (N,).

    | size | variant | layers (kernel, stride, channels), then linear to 1 |
    |---|---|---|
    | 4 | A, B | 5 s2 96; 3 s1 128; 3 s1 256 |
    | 16 | A, B | 5 s2 96; 3 s1 128; 3 s1 256; 3 s1 512 |
    | 64 | A | 5 s2 64; 3 s2 128; 3 s1 256, with ReLU |
    | 64 | B | 5 s2 64; 5 s2 128; 5 s2 256; 5 s2 512 |
    | any other, or "compact" | | `compact_layers` |
    | any | residual | a `ResidualNet` of `residual_stages`, `depth` blocks each |

    `width` multiplies the hidden channels; `depth` is 1 but for residual nets. `norm` None is "batch", which residual
    nets do not have: for these it is "none". `activation` None is the variant's own: LeakyReLU 0.2, but ReLU in 64 "A",
    and SiLU in residual nets.
    """
    one_of(variant, VARIANTS, "variant", "multigrid_net")
    size = positive_int(size, "size", "multigrid_net")
    width = positive_number(width, "width", "multigrid_net")
    if norm == "frozen":
        raise ValueError(
            "multigrid_net: norm must be batch or none, got 'frozen': train with 'batch', then freeze_norm()"
        )
    if variant == "residual":
        if norm not in (None, "none"):
            raise Refused(
                "norm", "be none for variant 'residual', which has no normalisation", repr(norm), "multigrid_net"
            )
        stages = [_widened(channels, width) for channels in residual_stages(size)]
        return ResidualNet(
            size, channels, stages, depth=depth, activation=activation or "silu", spectral_norm=spectral_norm,
            seed=seed,
        )  # fmt: skip
    if depth != 1:
        raise Refused("depth", "be 1 for a variant without residual blocks", repr(depth), "multigrid_net")
    layers = multigrid_layers(size, variant, width)
    if activation is None:
        activation = "relu" if variant == "A" and size == 64 else "leaky_relu"
    return EnergyNet(
        size, channels, layers, norm=norm or "batch", activation=activation, spectral_norm=spectral_norm, seed=seed
    )


def _widened(channels: int, width: float) -> int:
    return max(1, round(channels * width))


def from_config(config: dict[str, Any], *, seed: int = 0) -> EnergyNet | ResidualNet:
    """The net whose `config()` this is, of whichever class, with fresh weights."""
    kind: type[EnergyNet | ResidualNet] = ResidualNet if config.get("kind") == ResidualNet.name else EnergyNet
    return kind.from_config(config, seed=seed)
