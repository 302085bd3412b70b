"""The update that contrastive methods share: every net learns from observed images against what its chain made."""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import noise, ops
from ...errors import DivergenceError
from ...gradient import energy_gradient
from ...models import MultiGrid
from ...nets import EnergyNet
from ...sampling import graphs
from ..config.keys import pick
from ..config.train_config import TrainConfig
from .ema import Average
from .model_rule import ModelRule
from .optim import build_optimiser, condition_, map_areas, norm, rate_factor, step


class ContrastiveRule(ModelRule):
    """One update of all nets of a model from one observed batch:

        observed    = block means of the batch at every size (+ data noise)
        synthesised = what the method's chains make, `synthesise`
        loss of a net = mean E(observed) − mean E(synthesised) + energy_l2 · mean(E(observed)² + E(synthesised)²)

    and one optimiser step of each net on its own loss.

    With norm="batch" observed and synthesised images are normalised apart, and the running statistics follow the
    observed ones; otherwise they pass through the net as one batch. `images` is the size of the data set, which
    turns updates into epochs.

    A batch of several parts (`batch_parts`, here or over ranks) is learnt from part by part, from the same weights and
    buffers; gradients, energies and the buffers that follow the data are averaged (`learning.distributed`).
    """

    model: MultiGrid

    def __init__(self, model: MultiGrid, config: TrainConfig, *, images: int) -> None:
        self.model, self.config, self.images = model, config, images
        self.parameters = [[p for p in net.parameters() if p.requires_grad] for net in model.nets]
        self.optimisers = [build_optimiser(p, config.optimiser, i) for i, p in enumerate(self.parameters)]
        self.divisors: list[list[float] | None] = [None] * len(model.nets)
        if config.optimiser.per_layer_divide:
            areas = [map_areas(net) for net in model.nets]
            self.divisors = [[a.get(id(q), 1.0) for q in p] for a, p in zip(areas, self.parameters, strict=True)]
        self.average = Average(model, config.stabilise.ema) if config.stabilise.ema else None
        model.langevin = config.dynamics()
        self.annealed = any(factor != 1.0 for factor in config.noise_factors(config.steps))
        self.precision = config.precision
        # What observed images move: running statistics and power iterations.
        self.buffers = [buffer for net in model.nets for buffer in net.buffers()]
        self.averaged = [b for b in self.buffers if b.is_floating_point()] if config.batch_parts > 1 else []
        averaged = [*sum(self.parameters, []), *self.averaged]
        self.length = sum(tensor.numel() for tensor in averaged) + 2 * len(model.nets) + 1

    @property
    def nets(self) -> Sequence[nn.Module]:
        """The energies at the present update, one a size after the first."""
        return list(self.model.nets)

    @abc.abstractmethod
    def synthesise(self, observed: list[Tensor], iteration: int, first_sample: int) -> list[Tensor]:
        """One synthesised batch a net, float32, by chains under the present weights and `model.langevin`.

        `observed` holds the batch at every size, without data noise at sizes[0] and with it at the others;
        `first_sample` is the place of its first image in the whole batch of the update.
        """

    def chain_of_one(self, start: Tensor, iteration: int, ids: int | Tensor) -> Tensor:
        """Where the training chains of a model of one net, numbered `ids`, come to from `start` at this update."""
        chain = self.model.langevin[0]
        return chain(
            self.nets[0], start, seed=self.config.seed, first_sample=ids, first_step=iteration * chain.steps,
            stream=noise.stream(self.purpose(noise.Purpose.TRAINING_CHAIN), 1), precision=self.precision,
            where=f"training: grid 1 (size {self.model.sizes[-1]})",
        )  # fmt: skip

    def observed(self, batch: Tensor) -> list[Tensor]:  # (N, C, S, S) -> float32 at every size
        """The batch at every size in the model's units; bytes are 0 … 255, floats are in those units already."""
        device = self.model.colours.device
        grids = ops.pyramid(batch.to(device, non_blocking=True), self.model.sizes)
        return [self.model.from_uint8(grid) for grid in grids] if batch.dtype == torch.uint8 else grids

    def update(self, batch: Tensor, iteration: int, *, detail: bool = False) -> dict[str, float]:
        with graphs.unread() as healthy:
            metrics = self._update(batch, iteration, detail, healthy)
        if metrics is None:  # a chain from a graph overflowed 16 bits, or diverged: without graphs it says so itself
            metrics = self._update(batch, iteration, detail, [])
        assert metrics is not None
        return metrics

    def _update(self, batch: Tensor, iteration: int, detail: bool, healthy: list[Tensor]) -> dict[str, float] | None:
        """The metrics; None, with nothing changed, where one of the chains that `healthy` is told of was not."""
        config, model = self.config, self.model
        factors = config.noise_factors(iteration)
        if self.annealed:  # also back at 1, where a run went back to its beginning
            model.langevin = config.dynamics(factors)
        before = [buffer.clone() for buffer in self.buffers]
        shown: list[Tensor] = []

        def learn(images: Tensor, first_sample: int) -> list[Tensor]:
            if self.averaged:
                torch._foreach_copy_(self.buffers, before)
            gradients, energies, synthesised = self._learn(images, first_sample, iteration, factors)
            if detail and not shown:
                shown.extend(synthesised)
            whole = torch.stack(healthy).all().float() if healthy else torch.ones_like(energies[0])
            return [*sum(gradients, []), *energies, whole, *(b.clone() for b in self.averaged)]

        try:
            values = self.ranks.mean(learn, batch, config.batch_parts, self.length)
            gradients = [[values.pop(0) for _ in parameters] for parameters in self.parameters]
            measured = [m for parts in gradients for m in (values.pop(0), values.pop(0), norm(parts))]
            whole = values.pop(0)
            spoilt = (torch.stack(measured).isfinite().all() & (whole == 1)).logical_not().float()
            ratios = [self._gradient_to_noise(index, x) for index, x in enumerate(shown)]
            schedule = self._apply(gradients, iteration, spoilt)
            # The one look at the device. What is not finite was not applied: `spoilt` kept it out without a look.
            read = torch.stack([whole, *measured, *(ratio for ratio in ratios if ratio is not None)]).tolist()
            all_healthy, numbers = read[0] == 1, read[1:]
            if all_healthy:
                self._check_finite(numbers, iteration)
        except Exception:
            self._put_back(before)
            raise
        if not all_healthy:
            self._put_back(before)
            return None
        for buffer, mean in zip(self.averaged, values, strict=True):
            buffer.copy_(mean)
        if self.average is not None:
            self.average.update(iteration)
        return self._metrics(numbers, schedule, factors, ratios)

    def _put_back(self, before: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers, before, strict=True):
            buffer.copy_(value)

    def _learn(
        self, batch: Tensor, first_sample: int, iteration: int, factors: Sequence[float]
    ) -> tuple[list[list[Tensor]], list[Tensor], list[Tensor]]:
        """Of one part: each net's gradients, two mean energies a net (observed, synthesised), synthesised images."""
        means, *images = self.observed(batch)
        images = [
            self._with_noise(x, grid, iteration, factors[grid - 1], first_sample)
            for grid, x in enumerate(images, start=1)
        ]
        synthesised = self.synthesise([means, *images], iteration, first_sample)
        gradients, energies = [], []
        for grid, net in enumerate(self.nets, start=1):
            on_real, on_chain = self._energies(net, images[grid - 1], synthesised[grid - 1])
            loss = on_real.mean() - on_chain.mean()
            if weight := self.config.stabilise.energy_l2:
                loss = loss + weight * (on_real.square().mean() + on_chain.square().mean())
            parameters = self.parameters[grid - 1]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            gradients.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)])
            energies += [on_real.detach().mean(), on_chain.detach().mean()]
        return gradients, energies, synthesised

    def _apply(self, gradients: list[list[Tensor]], iteration: int, spoilt: Tensor) -> float:
        """One step of every optimiser, none where `spoilt` is 1; what their rates were multiplied by."""
        config = self.config
        epoch = iteration * config.batch_size // self.images
        schedule = self.rate * rate_factor(config.optimiser, iteration, config.steps, epoch)
        for index, (optimiser, parameters) in enumerate(zip(self.optimisers, self.parameters, strict=True)):
            condition_(gradients[index], config.optimiser, self.divisors[index])
            learning = {id(p) for p in self.nets[index].parameters()}  # not layers that an energy leaves out
            given = [g if id(p) in learning else None for p, g in zip(parameters, gradients[index], strict=True)]
            step(optimiser, parameters, given, pick(config.optimiser.lr, index) * schedule, spoilt)
        return schedule

    def _with_noise(self, images: Tensor, grid: int, iteration: int, factor: float, first_sample: int = 0) -> Tensor:
        std = pick(self.config.stabilise.data_noise, grid - 1) * factor
        if std == 0:
            return images
        where = noise.stream(self.purpose(noise.Purpose.DATA_NOISE), grid)
        draw = ops.noise(
            images.shape, seed=self.config.seed, step=iteration, first_sample=first_sample, stream=where,
            device=images.device,
        )  # fmt: skip
        noisy = torch.add(images, draw, alpha=std, out=draw)
        # Left outside the range, noise marks observed images as what no clamped chain can reach, and the energies part.
        return noisy.clamp_(*self.config.value_range) if self.config.stabilise.data_noise_clamp else noisy

    def _energies(self, net: nn.Module, real: Tensor, chain: Tensor) -> tuple[Tensor, Tensor]:
        observing: Any = net.observing() if isinstance(net, EnergyNet) else contextlib.nullcontext()
        if getattr(net, "norm", "none") != "batch":
            with observing:
                on_real, on_chain = net(torch.cat([real, chain])).split([len(real), len(chain)])
            return on_real, on_chain
        with observing:
            on_real = net(real)
        return on_real, net(chain)

    def _check_finite(self, numbers: list[float], iteration: int) -> None:
        for index, size in enumerate(self.model.sizes[1:]):
            names = ("energy of observed images", "energy of synthesised images", "gradient")
            for name, number in zip(names, numbers[3 * index : 3 * index + 3], strict=True):
                if not math.isfinite(number):
                    raise DivergenceError(
                        f"training: the {name} of grid {index + 1} (size {size}) became non-finite at update "
                        f"{iteration + 1}"
                    )

    def _metrics(
        self, numbers: list[float], schedule: float, factors: Sequence[float], ratios: list[Tensor | None]
    ) -> dict[str, float]:
        found: dict[str, float] = {}
        after = iter(numbers[3 * len(self.model.nets) :])
        for index, size in enumerate(self.model.sizes[1:]):
            on_real, on_chain, length = numbers[3 * index : 3 * index + 3]
            found[f"size_{size}/energy_observed"] = on_real
            found[f"size_{size}/energy_synthesised"] = on_chain
            found[f"size_{size}/gap"] = on_real - on_chain
            found[f"size_{size}/gradient_norm"] = length
            if ratios and ratios[index] is not None:
                found[f"size_{size}/gradient_to_noise"] = next(after)
            if self.annealed:
                found[f"size_{size}/noise_factor"] = factors[index]
        found["lr_factor"] = schedule
        return found

    def _gradient_to_noise(self, index: int, x: Tensor) -> Tensor | None:
        """Root mean square of what the gradient moves a pixel by in a step, over that of the noise; None without."""
        chain = self.model.langevin[index].update()
        if chain.noise_std == 0:
            return None
        force = energy_gradient(self.nets[index], x, precision=self.precision)
        force = force.clamp(-chain.grad_clamp, chain.grad_clamp) + (x - chain.reference_mean) * chain.inverse_variance
        return chain.drift * force.square().mean().sqrt() / chain.noise_std

    def headline(self, metrics: Mapping[str, float]) -> str:
        gaps = " ".join(f"{metrics[f'size_{size}/gap']:+.3f}" for size in self.model.sizes[1:])
        return f"energy gap {gaps}"

    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        with self.averaged_weights():
            samples = self.model.sample(len(observed), seed=self.config.seed, return_grids=True, precision="auto")
        rows = [("samples", samples), ("data", self.observed(observed))]
        panels = [
            (f"{title} {size}x{size}", self.model.to_uint8(images))
            for title, grids in rows
            for size, images in zip(self.model.sizes, grids, strict=True)
        ]
        return panels, len(self.model.sizes)

    def named_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {str(grid): optimiser for grid, optimiser in enumerate(self.optimisers, start=1)}

    def before_stored(self, iteration: int) -> None:
        """What is stored samples with the noise of its last update."""
        self.model.langevin = self.config.dynamics(self.config.noise_factors(max(0, iteration - 1)))
