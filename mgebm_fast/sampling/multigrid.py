"""MultiGrid: a ladder of energy nets, the dynamics of each, and the stored colours that sampling starts from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import noise
from ..errors import CheckpointError
from ..nets import EnergyNet, multigrid_net
from . import storage
from .cascade import GridCallback, cascade, check_known, check_sizes
from .langevin import Langevin
from .pipeline import piped

DEFAULT_GROUP = 100


class MultiGrid(nn.Module):
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
    _of_any_length: tuple[str, ...] = ("colours",)
    colours: Tensor

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
        super().__init__()
        self.sizes = check_sizes(sizes)
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"MultiGrid: channels must be a positive int, got {channels!r}")
        low, high = map(float, value_range)
        if not -float("inf") < low < high < float("inf"):
            raise ValueError(f"MultiGrid: value_range must be finite (low, high) with low < high, got ({low}, {high})")
        batch_size = DEFAULT_GROUP if batch_size is None else batch_size
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"MultiGrid: batch_size must be a positive int or None, got {batch_size!r}")
        self.channels, self.value_range, self.batch_size = channels, (low, high), batch_size
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
        # Nets that carry no `norm` are taken to treat samples alone.
        self.norm = next((net.norm for net in self.nets if getattr(net, "norm", "none") != "none"), "none")
        self.langevin = self._per_net(self._default_dynamics() if langevin is None else langevin)
        self.register_buffer("colours", torch.empty(0, channels))

    def _default_dynamics(self) -> Langevin:
        return Langevin(steps=30, step_size=0.3, noise_scale=1.0, reference_std=50.0, clamp=self.value_range)

    def _per_net(self, langevin: Langevin | Sequence[Langevin]) -> tuple[Langevin, ...]:
        dynamics = (langevin,) * len(self.nets) if isinstance(langevin, Langevin) else tuple(langevin)
        if len(dynamics) != len(self.nets) or not all(isinstance(d, Langevin) for d in dynamics):
            raise ValueError(f"MultiGrid: langevin must be a Langevin or {len(self.nets)} of them, got {langevin!r}")
        return dynamics

    @torch.no_grad()
    def set_colours(self, colours: Tensor) -> None:  # (M, C) or (M, C, 1, 1)
        """Store the distribution of 1×1 images, in the units of `value_range`, that `sample` draws its starts from."""
        if colours.dim() == 4 and colours.shape[2:] == (1, 1):
            colours = colours[:, :, 0, 0]
        if colours.dim() != 2 or colours.shape[1] != self.channels or len(colours) == 0:
            raise ValueError(f"set_colours: colours must have shape (M, {self.channels}), got {tuple(colours.shape)}")
        if not bool(torch.isfinite(colours).all()):
            raise ValueError("set_colours: colours must be finite, got NaN or infinite values")
        self.colours = colours.detach().to(self.colours.device, torch.float32, copy=True)

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
        seed: int | Tensor,
        first_sample: int | Tensor = 0,
        first_step: int | Sequence[int] = 0,
        purpose: noise.Purpose = noise.Purpose.SAMPLING,
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
            first_step: the step counter that the chains begin at, one for all grids or one a net.
            purpose: what the noise is for; a grid's stream is (purpose, index in sizes).
            langevin: dynamics in place of the model's own.
            mask, known: at the finest size, broadcastable to (N, C, S, S). Pixels of `known` where the mask is False
                are held; at coarser sizes a cell is held, at the mean of its block, where its whole block is known.
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

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        first_sample: int = 0,
        batch_size: int | None = None,
        return_grids: bool = False,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        callback: GridCallback | None = None,
        precision: str = "auto",
        backend: str = "auto",
        graph: bool | None = None,
        pipeline: bool = False,
    ) -> Tensor | list[Tensor]:
        """n samples (n, C, S, S) float32 in `value_range`, with no data: starts are drawn from the stored colours.

        Runs groups of `batch_size` (default: the model's). With norm="batch" the last group is filled with further
        samples and trimmed, since a chain depends on its group; sample(10) is then the beginning of sample(50), and
        `first_sample` gives the same pictures where it is a multiple of the group. With other norms chains are
        independent and groups only bound the memory.

        Args:
            mask, known: as in `cascade`, for (n, C, S, S); fillers repeat the last sample's.
            return_grids: give the list of results at every size instead.
            pipeline: on a CUDA device, run a group's coarse grids while the group before it is at the fine ones, each
                grid on a stream of its own. The samples are the same.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"sample: n must be a positive int, got {n!r}")
        group = self.batch_size if batch_size is None else batch_size
        if isinstance(group, bool) or not isinstance(group, int) or group < 1:
            raise ValueError(f"sample: batch_size must be a positive int or None, got {batch_size!r}")
        noise.check_seed(seed, "sample")
        finest = (n, self.channels, self.sizes[-1], self.sizes[-1])
        held = check_known(known, mask, finest, self.colours.device, "sample")

        def draw() -> list[list[Tensor]]:
            groups = []
            for begin in range(0, n, group):
                wanted = min(group, n - begin)
                size = group if self.norm == "batch" else wanted
                rows = [min(i, n - 1) for i in range(begin, begin + size)]
                results = self._sample_group(
                    size,
                    seed=seed,
                    first_sample=first_sample + begin,
                    mask=None if held is None else held[1][rows],
                    known=None if held is None else held[0][rows],
                    callback=callback,
                    precision=precision,
                    backend=backend,
                    graph=graph,
                )
                groups.append([grid[:wanted] for grid in results])
            return groups

        groups = piped(draw, self.colours.device, len(self.nets), callback) if pipeline else draw()
        grids = [torch.cat(parts) for parts in zip(*groups, strict=True)]
        return grids if return_grids else grids[-1]

    def _sample_group(self, n: int, *, seed: int, first_sample: int, **arguments: Any) -> list[Tensor]:
        """The results at every size of `n` samples that run as one batch; arguments as in `cascade`."""
        start = self.draw_colours(n, seed=seed, first_sample=first_sample)
        return self.cascade(start, seed=seed, first_sample=first_sample, **arguments)

    def to_uint8(self, x: Tensor) -> Tensor:
        """round(255 (x − lo) / (hi − lo)) as uint8, values outside the range clamped."""
        low, high = self.value_range
        return ((x - low) * (255.0 / (high - low))).round().clamp(0, 255).to(torch.uint8)

    def from_uint8(self, x: Tensor) -> Tensor:
        """lo + (hi − lo) x / 255 as float32: the model's units of 8-bit pixels."""
        low, high = self.value_range
        return x.float() * ((high - low) / 255.0) + low

    def freeze_norm(self) -> MultiGrid:
        """A new model whose nets have their running statistics folded in: its chains are independent."""
        nets = [net.freeze_norm() for net in self._energy_nets("frozen")]
        model = self.from_config({**self.config(), "nets": [net.config() for net in nets]})
        model.nets = nn.ModuleList(nets)
        for name in self._of_any_length:
            setattr(model, name, getattr(self, name).clone())
        return model

    def _energy_nets(self, what: str) -> list[EnergyNet]:
        nets = [net for net in self.nets if isinstance(net, EnergyNet)]
        if len(nets) < len(self.nets):
            other = next(type(net).__name__ for net in self.nets if not isinstance(net, EnergyNet))
            raise ValueError(f"MultiGrid: nets must be EnergyNets to be {what}, got {other}")
        return nets

    def explain(self, n: int | None = None) -> str:
        """One line a grid: what its chain runs, and why."""
        lines = []
        for grid, (net, dynamics) in enumerate(zip(self.nets, self.langevin, strict=True), start=1):
            size = self.sizes[grid]
            x = torch.empty(n or self.batch_size, self.channels, size, size, device=self.colours.device)
            lines.append(f"grid {grid} (size {size}): {dynamics.explain(net, x)}")
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

    def save(self, path: str | os.PathLike, *, ema: Mapping[str, Tensor] | None = None) -> None:
        """Write one .safetensors file, configuration included, whole or not at all.

        `ema`: averages of some of the state's tensors, by their names in `state_dict()`; `load` prefers them.
        """
        tensors = dict(self.state_dict())
        unknown = [name for name in ema or {} if name not in tensors]
        if unknown:
            raise ValueError(f"save: ema must hold names of the model's state, got {unknown[0]!r}")
        tensors.update({storage.EMA + name: tensor for name, tensor in (ema or {}).items()})
        storage.write(path, tensors, self.config(), self.kind)

    @classmethod
    def load(cls, path: str | os.PathLike, *, device: torch.device | str = "cpu", ema: bool = True) -> MultiGrid:
        """The model stored at `path`: a model file, a checkpoint folder, or a run folder (its final model, else its
        newest checkpoint), with the averaged weights where there are any and `ema` is not False. A file says which
        class it holds, this one or one derived from it.

        Raises CheckpointError: no such file, truncated, not a model, or tensors that do not fit its configuration.
        """
        file = storage.find(path)
        classes = {
            cls.kind: cls,
            **{derived.kind: derived for derived in cls.__subclasses__() if "kind" in vars(derived)},
        }
        kind, config, tensors = storage.read_one_of(file, list(classes))
        try:
            model = classes[kind].from_config(config)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: the model's configuration is wrong: {error}") from error
        model._set_state(tensors, ema, str(file))
        return model.to(device)

    def load_weights(self, path: str | os.PathLike, *, ema: bool = True) -> None:
        """Take the weights and colours stored at `path` into this model; CheckpointError where they do not fit it."""
        file = storage.find(path)
        _, config, tensors = storage.read_one_of(file, (self.kind,))
        own = self.config()
        for key in ("sizes", "channels", "nets"):
            if config.get(key) != own[key]:
                what = "with other nets" if key == "nets" else f"of {key} {config.get(key)}, this one has {own[key]}"
                raise CheckpointError(f"{file}: stored from a model {what}")
        self._set_state(tensors, ema, str(file))

    @torch.no_grad()
    def _set_state(self, tensors: Mapping[str, Tensor], ema: bool, where: str) -> None:
        if ema:
            tensors = storage.averaged(tensors)
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith(storage.EMA)}
        expected = self.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            if name not in state or name not in expected:
                fault = "missing" if name in expected else "not of this model"
                raise CheckpointError(f"{where}: tensor {name!r} is {fault}")
            got, want = tuple(state[name].shape), tuple(expected[name].shape)
            fits = got[1:] == want[1:] and len(got) == len(want) if name in self._of_any_length else got == want
            if not fits or state[name].dtype != expected[name].dtype:
                wanted = f"{want} {expected[name].dtype}"
                raise CheckpointError(f"{where}: tensor {name!r} must be {wanted}, got {got} {state[name].dtype}")
        for name in self._of_any_length:
            setattr(self, name, state[name].to(self.colours.device, copy=True))
        self.load_state_dict(state)
