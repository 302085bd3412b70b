"""EnergyModel, the base of models of energy nets: the nets, the dynamics of each, and their description."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import noise, ops
from ..checks import positive_number
from ..errors import CheckpointError, DivergenceError, Refused
from ..gradient import frozen_parameters
from ..gradient.plan import Energy
from ..nets import EnergyNet, ResidualNet, ScoreNet, from_config, multigrid_net
from ..nets.energy_net import NORMS
from ..ops.varying import Schedule, is_varying
from ..sampling.corrected import Corrected
from ..sampling.coupling import coupling
from ..sampling.langevin import Langevin
from ..sampling.metropolis import squares
from .model import Model

AnyEnergyModel = TypeVar("AnyEnergyModel", bound="EnergyModel")
# Nets that are stored with their configuration; a subclass has code of its own.
_OWN_NETS: tuple[type[ScoreNet], ...] = (EnergyNet, ResidualNet)


class EnergyModel(Model):
    """One energy net, and Langevin dynamics, for each size but the first.

    Args:
        sizes: 1 = s₀ < s₁ < …, each dividing the next.
        channels: of the images.
        langevin: the dynamics, one for all grids or one a net. Default: the paper's, 30 steps of size 0.3 with the
            reference N(0, 50²) and pixels clamped to `value_range`.
        width: of the nets, as in `nets.multigrid_net`; one for all, or a sequence of one a net.
        norm, variant, depth, activation, spectral_norm: as there, of all nets.
        value_range: (lo, hi), the pixel values of the model's black and white.
        batch_size: samples to a group in `sample`; with norm="batch", whose samples are coupled, the batch size of
            training. Default 100.
        seed: of the initial weights; each net draws from a seed of its own.
        classes: names of the classes of a class-conditional `MultiGrid`; none elsewhere.
        nets: energies to use in place of the built ones, any modules (N, C, s, s) -> (N,). A file holds the weights of
            modules that are no `EnergyNet` or `ResidualNet`, and no code: `load_weights` takes them into a model built
            with such nets.

    State: parameters of the nets, and the buffer `colours` (M, C) float32, the stored distribution of 1×1 images.
    """

    # of each chain of a sample, where a class has them; of every one where it is a tuple; None: those of `langevin`
    sample_steps: int | tuple[int, ...] | None = None

    def __init__(
        self,
        sizes: Sequence[int] = (1, 4, 16, 64),
        *,
        channels: int = 3,
        langevin: Langevin | Sequence[Langevin] | None = None,
        width: float | Sequence[float] = 1.0,
        norm: str | None = None,
        variant: str = "B",
        depth: int = 1,
        activation: str | None = None,
        spectral_norm: bool = False,
        value_range: tuple[float, float] = (0.0, 255.0),
        batch_size: int | None = None,
        seed: int = 0,
        nets: Iterable[nn.Module] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(sizes, channels, value_range, batch_size)
        self.classes = tuple(classes)
        self.width, self.variant = self._widths(width), variant
        seed = noise.check_seed(seed, self.kind)
        widths = self.width if isinstance(self.width, tuple) else (self.width,) * (len(self.sizes) - 1)
        if nets is None:
            nets = [
                multigrid_net(
                    size, channels + len(self.classes), net_width, norm, variant, depth=depth, activation=activation,
                    spectral_norm=spectral_norm,
                    seed=(seed * len(self.sizes) + grid) % 2**63,
                )
                for grid, (size, net_width) in enumerate(zip(self.sizes[1:], widths, strict=True), start=1)
            ]  # fmt: skip
        nets = list(nets)
        if len(nets) != len(self.sizes) - 1:
            wanted = f"{len(self.sizes) - 1}, one a size after the first"
            raise ValueError(f"{self.kind}: nets must be {wanted}, got {len(nets)}")
        if others := [type(net).__name__ for net in nets if not isinstance(net, nn.Module)]:
            raise TypeError(f"{self.kind}: nets must be torch modules, got a {others[0]}")
        for size, net in zip(self.sizes[1:], nets, strict=True):
            if isinstance(net, ScoreNet):
                takes, shape = (net.channels, *net.size), self.input_shape(size)
                if takes[: 1 if net.any_size else None] != shape[: 1 if net.any_size else None]:
                    raise Refused(f"net of size {size}", f"take {shape}", f"{takes}", self.kind)
        self.nets = nn.ModuleList(nets)
        self.norm = next((found for found in map(norm_of, nets) if found != "none"), "none")
        paper = Langevin(steps=30, step_size=0.3, noise_scale=1.0, reference_std=50.0, clamp=self.value_range)
        self.langevin = self._per_net(paper if langevin is None else langevin)

    def _widths(self, width: float | Sequence[float]) -> float | tuple[float, ...]:
        """A width as it was given, checked: of all nets, or of each."""
        if not isinstance(width, Sequence) or isinstance(width, str):
            return positive_number(width, "width", self.kind)
        if len(width) != len(self.sizes) - 1:
            wanted = f"be a number, or {len(self.sizes) - 1} of them, one a size after the first"
            raise Refused("width", wanted, list(width), self.kind)
        return tuple(positive_number(own, "width", self.kind) for own in width)

    def _per_net(self, langevin: Langevin | Sequence[Langevin]) -> tuple[Langevin, ...]:
        dynamics = (langevin,) * len(self.nets) if isinstance(langevin, Langevin) else tuple(langevin)
        if len(dynamics) != len(self.nets) or not all(isinstance(d, Langevin) for d in dynamics):
            raise ValueError(f"{self.kind}: langevin must be a Langevin or {len(self.nets)} of them, got {langevin!r}")
        return dynamics

    @property
    def sampling(self) -> tuple[Langevin, ...]:
        steps = self.sample_steps
        each = steps if isinstance(steps, tuple) else (steps,) * len(self.langevin)
        return tuple(chain if own is None else chain.of_length(own) for own, chain in zip(each, self.langevin))

    @property
    def active_nets(self) -> list[nn.Module]:
        """The energies in use, one a size after the first: nets, or the layers of them that make the energy."""
        return list(self.nets)

    def law(self, chain: Langevin) -> Langevin | Corrected:
        """The chain that runs for a description of one: itself, unless the class corrects it."""
        return chain

    def measured(self) -> list[tuple[Energy, Langevin | Corrected]]:
        """What a sample goes through, as it is run: each grid's energy and the chain on it."""
        return list(zip(self.active_nets, map(self.law, self.sampling), strict=True))

    @property
    def coupled(self) -> str:
        return next((why for energy, _ in self.measured() if (why := coupling(energy))), "")

    def sample_shape(self, size: int) -> tuple[int, ...]:
        """(C, …) of a sample at one of `sizes`."""
        return self.channels, size, size

    def input_shape(self, size: int) -> tuple[int, ...]:
        """(C + number of classes, …) of what the net of a size takes."""
        channels, *rest = self.sample_shape(size)
        return channels + len(self.classes), *rest

    def energies(
        self,
        x: Tensor,  # (N, C, S, S) uint8, or float32 in `value_range`; at the finest size
        *,
        reference: bool = False,
    ) -> dict[int, Tensor]:
        """The energies of images at every size that has a net, {size: (N,) float32}, low where data are likely.

        E_s(x_s) = −f_s(x_s), x_s the block means of x at size s; with `reference` U_s = E_s + ‖x_s − m‖²/2σ² where the
        chain at that size has a Gaussian reference N(m, σ²I), of a schedule the last σ. Each is known up to a constant
        of its own: compare images at one size of one model, and no sizes or models with each other.

        Batch statistics (norm="batch") couple the images, which are then one batch; `freeze_norm()` gives a model in
        which an image's energy is its own. Gradients go to x where it requires them; there are none to the weights.

        Raises TypeError, ValueError: x is not as above, or not finite. DivergenceError: an energy is not finite.
        """
        return self._by_size(x, reference, self._energies, "energies")

    def _by_size(
        self, x: Tensor, reference: bool, of_part: Callable[[Tensor, bool], list[Tensor]], where: str
    ) -> dict[int, Tensor]:
        """What `of_part` finds at every size for checked images, in parts of a batch."""
        shape = self.sample_shape(self.sizes[-1])
        if not isinstance(x, Tensor) or x.dtype not in (torch.uint8, torch.float32):
            got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{where}: x must be a uint8 or float32 tensor, got {got}")
        if tuple(x.shape[1:]) != shape:
            raise Refused("x", f"have shape (N, {', '.join(map(str, shape))})", tuple(x.shape), where)
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise ValueError(f"{where}: x must be finite, got NaN or infinite pixels")
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            parts = [of_part(part, reference) for part in ([x] if self.coupled else x.split(self.batch_size))]
        found = {size: torch.cat([part[grid] for part in parts]) for grid, size in enumerate(self.sizes[1:])}
        for size, energies in found.items():
            if bool((wrong := ~torch.isfinite(energies)).any()):
                image = int(wrong.nonzero()[0, 0])
                got = f"{float(energies[wrong][0])} for image {image} at size {size}"
                raise DivergenceError(f"{where}: must be finite, got {got}")
        return found

    def energy(self, x: Tensor, *, reference: bool = False) -> Tensor:  # (N, C, S, S) -> (N,)
        """The sum of `energies` over the sizes, (N,) float32; arguments and errors as there."""
        return torch.stack(list(self.energies(x, reference=reference).values())).sum(0)

    def _energies(self, x: Tensor, reference: bool) -> list[Tensor]:
        found = []
        for net, chain, at_size in zip(self.active_nets, self.sampling, self._at_sizes(self.in_units(x)), strict=True):
            with frozen_parameters(net):
                energies = net(at_size)
            if reference and (std := chain.reference_std) is not None:
                variance = 1 / chain.by_step()[-1].inverse_variance if is_varying(std) else std**2
                energies = energies + squares(at_size[:, : self.channels] - chain.reference_mean) / (2 * variance)
            found.append(energies.float())
        return found

    def _at_sizes(self, x: Tensor) -> list[Tensor]:
        """Images as each net takes them."""
        return [*ops.pyramid(x, self.sizes[1:-1]), x]

    def explain(self, n: int | None = None) -> str:
        """What the chain of every grid runs in sampling, and why: the grid in a line, and below it a line a field."""
        lines = []
        for grid, (energy, chain) in enumerate(self.measured(), start=1):
            size = self.sizes[grid]
            x = torch.empty(
                n or self.batch_size, *self.input_shape(size), dtype=torch.float32, device=self.colours.device
            )
            lines.append(f"grid {grid} (size {size})\n" + textwrap.indent(str(chain.explain(energy, x)), "  "))
        return "\n".join(lines)

    def freeze_norm(self: AnyEnergyModel) -> AnyEnergyModel:
        """A new model whose nets have their running statistics folded in: its chains are independent."""
        nets = [net.freeze_norm() for net in self.energy_nets("frozen")]
        model = self.from_config({**self.config(), "nets": [net.config() for net in nets]})
        frozen = nn.ModuleList(nets).state_dict()
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("nets.")}
        # Fold into the nets that the model was built with: it may refer to parts of them elsewhere.
        model.load_state_dict({**own, **{f"nets.{name}": tensor for name, tensor in frozen.items()}})
        return model.to(self.colours.device)

    def energy_nets(self, what: str, *kinds: type[ScoreNet]) -> list[ScoreNet]:
        """The nets, which must be of the package's classes, of `kinds` where some are given, to be `what`, else
        ValueError."""
        kinds = kinds or _OWN_NETS
        nets = [net for net in self.nets if isinstance(net, ScoreNet) and type(net) in kinds]
        if len(nets) < len(self.nets):
            other = next(type(net).__name__ for net in self.nets if type(net) not in kinds)
            names = " or ".join(f"{kind.__name__}s" for kind in kinds)
            raise ValueError(f"{self.kind}: nets must be {names} to be {what}, got {other}")
        return nets

    def config(self) -> dict[str, Any]:
        """What rebuilds this model but for its weights, in plain JSON types."""
        return {
            "sizes": list(self.sizes),
            "channels": self.channels,
            "width": list(self.width) if isinstance(self.width, tuple) else self.width,
            "variant": self.variant,
            "norm": self.norm,
            "value_range": list(self.value_range),
            "batch_size": self.batch_size,
            "langevin": [_stored(chain) for chain in self.langevin],
            "nets": [_described(net) for net in self.nets],
            **({"classes": list(self.classes)} if self.classes else {}),
        }

    @staticmethod
    def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `EnergyModel` that a configuration holds, but for the sizes."""
        foreign = sorted({str(net["module"]) for net in config["nets"] if "module" in net})
        if foreign:
            raise CheckpointError(
                f"holds the weights of nets of one's own, {', '.join(foreign)}, and not their code: build the model "
                "with nets=[…] as it was trained, and call its load_weights(path)"
            )
        return {
            "channels": config["channels"],
            "langevin": [_chain(stored) for stored in config["langevin"]],
            "width": config["width"],
            "variant": config["variant"],
            "value_range": tuple(config["value_range"]),
            "batch_size": config["batch_size"],
            "nets": [from_config(net) for net in config["nets"]],
        }


def _stored(chain: Langevin) -> dict[str, Any]:
    """A chain as plain values; Refused where a number is a tensor or an array."""
    for name in chain.varying:
        if not isinstance(value := getattr(chain, name), (tuple, Schedule)):
            got = f"one of shape {tuple(value.shape)}"
            raise Refused(f"langevin's {name}", "hold no tensor or array to be stored; lists and schedules can", got)
    return dataclasses.asdict(chain)


def _chain(stored: Mapping[str, Any]) -> Langevin:
    """The chain that `_stored` wrote."""
    numbers: dict[str, Any] = {name: Schedule(**v) if isinstance(v, dict) else v for name, v in stored.items()}
    return Langevin(**numbers)


def norm_of(net: nn.Module) -> str:
    """The normalisation that a net names in its attribute `norm`; "none", samples alone, where it is none of NORMS."""
    norm = getattr(net, "norm", "none")
    return norm if isinstance(norm, str) and norm in NORMS else "none"


def _described(net: nn.Module) -> dict[str, Any]:
    """What a net of the package is rebuilt from; of a module of another class its name, which holds no code."""
    if isinstance(net, ScoreNet) and type(net) in _OWN_NETS:
        return net.config()
    return {"module": f"{type(net).__module__}.{type(net).__qualname__}"}
