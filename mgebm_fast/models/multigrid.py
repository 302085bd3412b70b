"""MultiGrid: a ladder of energy nets, the dynamics of each, and the stored colours that sampling starts from."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise
from ..gradient.plan import Energy
from ..nets import EnergyNet, multigrid_net
from ..sampling.cascade import GridCallback, cascade
from ..sampling.corrected import Corrected
from ..sampling.coupling import coupling
from ..sampling.langevin import Langevin
from . import storage
from .model import Model


class MultiGrid(Model):
    """The multi-grid energy-based model (Gao et al., CVPR 2018): one net for each size but the first.

    Args:
        sizes: 1 = s₀ < s₁ < …, each dividing the next.
        channels: of the images.
        langevin: the dynamics, one for all grids or one a net. Default: the paper's, 30 steps of size 0.3 with the
            reference N(0, 50²) and pixels clamped to `value_range`.
        width, norm, variant, activation, spectral_norm: of the nets, as in `nets.multigrid_net`.
        value_range: (lo, hi), the pixel values of the model's black and white.
        batch_size: samples to a group in `sample`; with norm="batch", whose samples are coupled, the batch size of
            training. Default 100.
        seed: of the initial weights; each net draws from a seed of its own.
        nets: energies to use in place of the built ones, any modules (N, C, s, s) -> (N,).

    State: parameters of the nets, and the buffer `colours` (M, C) float32, the stored distribution of 1×1 images.
    """

    kind = storage.FORMAT  # the name of the class in model files

    def __init__(
        self,
        sizes: Sequence[int] = (1, 4, 16, 64),
        *,
        channels: int = 3,
        langevin: Langevin | Sequence[Langevin] | None = None,
        width: float = 1.0,
        norm: str = "batch",
        variant: str = "B",
        activation: str | None = None,
        spectral_norm: bool = False,
        value_range: tuple[float, float] = (0.0, 255.0),
        batch_size: int | None = None,
        seed: int = 0,
        nets: Iterable[nn.Module] | None = None,
    ) -> None:
        super().__init__(sizes, channels, value_range, batch_size, "MultiGrid")
        self.width, self.variant = width, variant
        noise.check_seed(seed, "MultiGrid")
        if nets is None:
            nets = [
                multigrid_net(
                    size, channels, width, norm, variant, activation=activation, spectral_norm=spectral_norm,
                    seed=(seed * len(self.sizes) + grid) % 2**63,
                )
                for grid, size in enumerate(self.sizes[1:], start=1)
            ]  # fmt: skip
        self.nets = nn.ModuleList(nets)
        if len(self.nets) != len(self.sizes) - 1:
            raise ValueError(
                f"MultiGrid: nets must be {len(self.sizes) - 1}, one a size after the first, got {len(self.nets)}"
            )
        norms = [str(getattr(net, "norm", "none")) for net in self.nets]
        self.norm = next((found for found in norms if found != "none"), "none")
        self.langevin = self._per_net(self._default_dynamics() if langevin is None else langevin)

    def _default_dynamics(self) -> Langevin:
        return Langevin(steps=30, step_size=0.3, noise_scale=1.0, reference_std=50.0, clamp=self.value_range)

    def _per_net(self, langevin: Langevin | Sequence[Langevin]) -> tuple[Langevin, ...]:
        dynamics = (langevin,) * len(self.nets) if isinstance(langevin, Langevin) else tuple(langevin)
        if len(dynamics) != len(self.nets) or not all(isinstance(d, Langevin) for d in dynamics):
            raise ValueError(f"MultiGrid: langevin must be a Langevin or {len(self.nets)} of them, got {langevin!r}")
        return dynamics

    def draw_colours(self, n: int, *, seed: int, first_sample: int = 0) -> Tensor:
        """n draws (n, C, 1, 1) from the stored colours; each sample's is a function of (seed, sample id)."""
        if len(self.colours) == 0:
            raise ValueError(
                "sample: the model must hold a colour distribution, got none: train it, or call set_colours"
            )
        where = noise.stream(noise.Purpose.COLOUR_DRAW)
        index = noise.integers(
            len(self.colours), n, seed=seed, step=0, first_sample=first_sample, stream=where, device=self.colours.device
        )
        return self.colours[index][:, :, None, None]

    def cascade(
        self,
        start: Tensor,  # (N, C, 1, 1) float32
        *,
        seed: int | Tensor | None = None,
        first_sample: int | Tensor = 0,
        first_step: int | Sequence[int] = 0,
        purpose: noise.Purpose | int = noise.Purpose.SAMPLING,
        langevin: Langevin | Sequence[Langevin] | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        callback: GridCallback | None = None,
        precision: str = "auto",
        backend: str = "auto",
        graph: bool | None = None,
    ) -> list[Tensor]:
        """The samples at every size, sizes[0] (the start) first; all of `start` as one batch.

        Args:
            start: 1×1 images, in the units of `value_range`.
            seed: None: a fresh one for each call, as in `langevin_sample`.
            first_step: the step counter that the chains begin at, one for all grids or one a net.
            purpose: what the noise is for; a grid's stream is (purpose, index in sizes).
            langevin: dynamics in place of the model's own.
            mask, known: at the finest size, broadcastable to (N, C, S, S). Pixels of `known` where the mask is False
                are held; at coarser sizes a cell is held, at the mean of its block's known pixels, where it has any.
            callback: callback(grid, step, x) after each step, grid the index in sizes, x the live state.
            graph: as in `langevin_sample`; one CUDA graph holds the chains of all grids.

        Raises DivergenceError naming the grid and the step.
        """
        if not isinstance(start, Tensor) or start.dim() != 4 or start.shape[1:] != (self.channels, 1, 1):
            got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
            raise ValueError(f"cascade: start must have shape (N, {self.channels}, 1, 1), got {got}")
        dynamics = self.langevin if langevin is None else self._per_net(langevin)
        return cascade(
            list(self.nets), self.sizes, dynamics, start, seed=seed, first_sample=first_sample, first_step=first_step,
            purpose=purpose, mask=mask, known=known, callback=callback, precision=precision, backend=backend,
            graph=graph,
        )  # fmt: skip

    @property
    def sampling(self) -> tuple[Langevin, ...]:
        """The chains that a sample goes through."""
        return self.langevin

    def measured(self) -> list[tuple[Energy, Langevin | Corrected]]:
        """What a sample goes through, as it is run: each grid's energy and the chain on it."""
        return list(zip(self.nets, self.sampling, strict=True))

    @property
    def coupled(self) -> str:
        return next((why for energy, _ in self.measured() if (why := coupling(energy))), "")

    def _sample_group(
        self, n: int, *, seed: int, first_sample: int, length: float = 1.0, **arguments: Any
    ) -> list[Tensor]:
        """The results at every size of `n` samples that run as one batch; arguments as in `cascade`."""
        start = self.draw_colours(n, seed=seed, first_sample=first_sample)
        return self.cascade(start, seed=seed, first_sample=first_sample, langevin=self.chains(length), **arguments)

    def _run(self, x: Tensor, energy: Energy | None = None, *, length: float = 1.0, **arguments: Any) -> Tensor:
        """A sample's chain from x, in a model of one net; arguments as in `langevin_sample`. None: the net itself."""
        return self.chains(length)[0](
            self.nets[0] if energy is None else energy, x,
            **{
                "stream": noise.stream(noise.Purpose.SAMPLING, 1), "where": f"sample: grid 1 (size {self.sizes[-1]})",
                **arguments,
            },
        )  # fmt: skip

    def freeze_norm(self) -> MultiGrid:
        """A new model whose nets have their running statistics folded in: its chains are independent."""
        nets = [net.freeze_norm() for net in self._energy_nets("frozen")]
        model = self.from_config({**self.config(), "nets": [net.config() for net in nets]})
        # Into the nets that the model was built with: it may hold parts of them elsewhere, and which of them learn.
        model.nets.load_state_dict(nn.ModuleList(nets).state_dict())
        for name in self._of_any_length:
            setattr(model, name, getattr(self, name).clone())
        return model.to(self.colours.device)

    def _energy_nets(self, what: str) -> list[EnergyNet]:
        nets = [net for net in self.nets if isinstance(net, EnergyNet)]
        if len(nets) < len(self.nets):
            other = next(type(net).__name__ for net in self.nets if not isinstance(net, EnergyNet))
            raise ValueError(f"MultiGrid: nets must be EnergyNets to be {what}, got {other}")
        return nets

    def explain(self, n: int | None = None) -> str:
        """What the chain of every grid runs in sampling, and why: the grid in a line, and below it a line a field."""
        lines = []
        for grid, (energy, chain) in enumerate(self.measured(), start=1):
            size = self.sizes[grid]
            x = torch.empty(n or self.batch_size, self.channels, size, size, device=self.colours.device)
            lines.append(f"grid {grid} (size {size})\n" + textwrap.indent(str(chain.explain(energy, x)), "  "))
        return "\n".join(lines)

    def config(self) -> dict[str, Any]:
        """What rebuilds this model but for its weights, in plain JSON types."""
        return {
            "sizes": list(self.sizes),
            "channels": self.channels,
            "width": self.width,
            "variant": self.variant,
            "norm": self.norm,
            "value_range": list(self.value_range),
            "batch_size": self.batch_size,
            "langevin": [dataclasses.asdict(dynamics) for dynamics in self.langevin],
            "nets": [net.config() for net in self._energy_nets("described and stored")],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MultiGrid:
        """The model that `config()` described, with fresh weights and no colours."""
        return cls(config["sizes"], **cls._arguments(config))

    @staticmethod
    def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "channels": config["channels"],
            "langevin": [Langevin(**dynamics) for dynamics in config["langevin"]],
            "width": config["width"],
            "variant": config["variant"],
            "value_range": tuple(config["value_range"]),
            "batch_size": config["batch_size"],
            "nets": [EnergyNet.from_config(net) for net in config["nets"]],
        }
