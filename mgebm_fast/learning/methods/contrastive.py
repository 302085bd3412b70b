"""The update that contrastive methods share: every net learns from observed images against what its chain made."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ... import noise, ops
from ...errors import DivergenceError
from ...gradient import energy_gradient
from ...gradient.graph import settled_batch
from ...models import EnergyModel
from ...ops.conv_chain.sharing import weights_stay
from ...sampling import graphs
from ..config.keys import pick
from ..config.train_config import TrainConfig
from .contrast import contrast
from .model_rule import ModelRule
from .optim import build_optimiser, condition_, map_areas, norm, rate_factor, step
from .synthesis import GridLearned, Learned, Lesson, Numbers, Synthesis, law_of, measured_of_samples, with_data_noise
from .work import costs

# Numbers of a grid that must be finite: key -> name in errors.
_OF_GRID = {
    "energy_observed": "energy of observed images",
    "energy_synthesised": "energy of synthesised images",
    "gradient_norm": "gradient",
}
# Numbers of a grid that records alone have.
_OF_RECORD = ("gradient_to_noise", "gradient_clamped", "stiffness", "saturated", "spread")
_OF_LESSON = {"generator/loss": "loss", "generator/gradient_norm": "gradient"}


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

    A method says how it synthesises. It may also set the model up for an update (`arrange`), shape gradients (`tied`),
    learn from what was made (`teach`), keep it once the update is applied (`keep`), and report more (`details`,
    `taught`).
    """

    model: EnergyModel

    def __init__(self, model: EnergyModel, config: TrainConfig, *, images: int) -> None:
        super().__init__(model, config)
        self.images = images
        self.parameters = [[p for p in net.parameters() if p.requires_grad] for net in model.nets]
        if not all(self.parameters):
            raise ValueError(f"{model.kind}: every net must have parameters that learn, to be trained, got one of none")
        self.optimisers = [build_optimiser(p, config.optimiser, i) for i, p in enumerate(self.parameters)]
        self.divisors: list[list[float] | None] = [None] * len(model.nets)
        if config.optimiser.per_layer_divide:
            areas = [map_areas(net) for net in model.nets]
            self.divisors = [[a.get(id(q), 1.0) for q in p] for a, p in zip(areas, self.parameters, strict=True)]
        model.langevin = config.dynamics()
        self.annealed = any(factor != 1.0 for factor in config.noise_factors(config.steps))
        self.precision = config.precision
        # What observed images move: running statistics and power iterations.
        self.buffers = [buffer for net in model.nets for buffer in net.buffers()]
        self.averaged = [b for b in self.buffers if b.is_floating_point()] if config.batch_parts > 1 else []
        self.first_updates = config.first_updates()
        self.learning = self.learning_at(0)  # how many nets do, the coarsest ones
        self.names = [f"size_{size}" for size in model.sizes[1:]]  # of the nets, in metrics
        self.slowed_alone = self.names if len(self.names) > 1 else []
        settings = config.stabilise
        self.noisy = [net for i, net in enumerate(self.names) if pick(settings.data_noise, i)]
        bounds = {net: pick(settings.stiffness, i) for i, net in enumerate(self.names)}
        self.stiffness_bounds = {net: bounds[net] for net in self.noisy if bounds[net]}

    # what a method says

    def firsts(self) -> dict[nn.Parameter, int]:
        nets = zip(self.model.nets, self.config.first_updates())
        return {parameter: first for net, first in nets for parameter in net.parameters() if parameter.requires_grad}

    @abc.abstractmethod
    def synthesise(
        self, observed: list[Tensor], iteration: int, first_sample: int, graph: graphs.Graph = None
    ) -> Synthesis:
        """What chains make of one part of a batch, under the present weights and `model.langevin`.

        `observed` holds the part at every size, without data noise at sizes[0] and with it at the others;
        `first_sample` is the place of its first image in the whole batch of the update; `graph` is for the chains.
        """

    def arrange(self, iteration: int) -> None:
        """Make what the model's tensors do not hold, such as the noise of its chains, as update `iteration` has it."""
        self.learning = self.learning_at(iteration)
        if self.annealed:  # also where the factor is 1 again: a rollback may return to the first update
            self.model.langevin = self.config.dynamics(self.config.noise_factors(iteration))

    def tied(self, gradients: list[Tensor]) -> list[Tensor]:
        """The gradients of a net whose weights are not free."""
        return gradients

    def teach(self, made: list[Synthesis], iteration: int, spoilt: Tensor) -> Lesson | None:
        """What else learns from the chains of an update, by the weights before it; `spoilt` is 1 if none will be."""
        return None

    def taught(self, loss: float) -> dict[str, float]:
        """Metrics of a `Lesson`."""
        return {}

    def keep(self, made: list[Synthesis], iteration: int) -> None:
        """Take what the chains of update `iteration`, which was applied, have come to."""
        return

    def details(self, learned: Learned, made: Synthesis) -> dict[str, float]:
        """Metrics that cost something, by the weights before the update."""
        return {}

    # the update

    def observed(self, batch: Tensor) -> list[Tensor]:  # (N, C, S, S) -> float32 at every size
        """The batch at every size in the model's units; bytes are 0 … 255, floats are in those units already."""
        device = self.model.colours.device
        grids = ops.pyramid(batch.to(device, non_blocking=True), self.model.sizes)
        return [self.model.from_uint8(grid) for grid in grids] if batch.dtype == torch.uint8 else grids

    def update(self, batch: Tensor, iteration: int, *, detail: bool = False) -> dict[str, float]:
        self.arrange(iteration)
        metrics = self._update(batch, iteration, detail, graphs.Session(unread=[]))
        if metrics is None:  # a chain from a graph overflowed 16 bits, or diverged: without graphs it says so itself
            metrics = self._update(batch, iteration, detail, graphs.Session())
        assert metrics is not None
        return metrics

    def _update(self, batch: Tensor, iteration: int, detail: bool, session: graphs.Session) -> dict[str, float] | None:
        """The metrics; None (and no state changed) if any chain that the session left unchecked became non-finite."""
        before = [buffer.clone() for buffer in self.buffers]
        made: list[Synthesis] = []
        numbers = self.numbers(iteration)

        def learn(images: Tensor, first_sample: int) -> list[Tensor]:
            if self.averaged:
                torch._foreach_copy_(self.buffers, before)

            def synthesise(observed: list[Tensor]) -> Synthesis:
                made.append(self.synthesise(observed, iteration, first_sample, session))
                return made[-1]

            grids = self.learn(images, first_sample, numbers, synthesise)
            unread = session.unread
            healthy = torch.stack(unread).all().float() if unread else torch.ones_like(grids[0].observed)
            return Learned(grids, [buffer.clone() for buffer in self.averaged], healthy).flatten()

        try:
            learning = self.parameters[: numbers.nets]
            averaged = [*sum(learning, []), *self.averaged]
            length = sum(tensor.numel() for tensor in averaged) + 2 * len(learning) + 1
            tensors = self.ranks.mean(learn, batch, self.config.batch_parts, length)
            learned = Learned.unflatten(tensors, [len(parameters) for parameters in learning])
            measured, spoilt = self.measure(learned)
            details = self.details(learned, made[0]) if detail else {}
            if detail:
                # The first part of the batch: the same however parts are shared out to ranks.
                part, nets = batch[: len(made[0].images[0])], self.model.active_nets
                measured |= measured_of_samples(
                    self.model, made[0].images, self.observed(part)[1:],
                    lambda net, x: energy_gradient(nets[net], x, precision=self.precision),
                    [law_of(chain) for chain in self.model.langevin],
                )  # fmt: skip
            lesson = self.teach(made, iteration, spoilt)
            if lesson is not None:
                of_lesson = dict(zip(_OF_LESSON, (lesson.loss, norm(lesson.gradients)), strict=True))
                spoilt = spoilt | torch.stack(list(of_lesson.values())).isfinite().all().logical_not()
                measured.update(of_lesson)
            self.apply(learned, numbers, spoilt.float())
            if lesson is not None:
                condition_(lesson.gradients, lesson.config)
                rate = pick(lesson.config.lr, 0) * self.schedule(iteration)
                step(lesson.optimiser, lesson.parameters, lesson.gradients, rate, spoilt.float())
            # The one host sync. An update that is not finite was not applied: optimisers read `spoilt` on the device.
            all_healthy, *found = torch.stack([learned.healthy, *measured.values()]).tolist()
            values = dict(zip(measured, found, strict=True))
            if all_healthy == 1:
                self._check_finite(values, iteration)
        except Exception:
            self._put_back(before)
            raise
        if all_healthy != 1:
            self._put_back(before)
            return None
        for buffer, mean in zip(self.averaged, learned.buffers, strict=True):
            buffer.copy_(mean)
        if self.average is not None:
            self.average.take(numbers.shares)
        self.keep(made, iteration)
        return {**self.metrics(values, iteration), **details}

    def _put_back(self, before: list[Tensor]) -> None:
        for buffer, value in zip(self.buffers, before, strict=True):
            buffer.copy_(value)

    # its parts, which a captured update is made of too

    def numbers(self, iteration: int) -> Numbers:
        """Those of update `iteration`."""
        config, rates, stds = self.config, [], []
        falling = config.noise_factors(iteration)
        for i, (net, first, factor) in enumerate(zip(self.names, self.first_updates, falling)):
            rates.append(pick(config.optimiser.lr, i) * self.schedule(iteration, first, net))
            stds.append(pick(config.stabilise.data_noise, i) * factor * self.factors_of(net).data_noise)
        shares = [] if self.average is None else self.average.shares(iteration)
        return Numbers(iteration, rates, stds, shares, self.learning_at(iteration))

    def learning_at(self, iteration: int) -> int:
        """How many nets learn in update `iteration`, the coarsest ones."""
        return sum(first <= iteration for first in self.first_updates)

    def schedule(self, iteration: int, first: int = 0, net: str = "") -> float:
        """What the learning rate is multiplied by at update `iteration`, of `net`, which begins at update `first`."""
        iteration, steps = max(0, iteration - first), self.config.steps - first
        epoch = iteration * self.config.batch_size // self.images
        return self.factors_of(net).rate * rate_factor(self.config.optimiser, iteration, steps, epoch)

    def learn(
        self, batch: Tensor, first_sample: int, numbers: Numbers, synthesise: Callable[[list[Tensor]], Synthesis]
    ) -> list[GridLearned]:
        """What each net learns of one part of a batch, against what `synthesise` makes of it at every size."""
        means, *images = self.observed(batch)[: 1 + numbers.nets]
        images = [self._with_noise(x, grid, numbers, first_sample) for grid, x in enumerate(images, start=1)]
        with weights_stay(), settled_batch():
            return self._learn(images, synthesise([means, *images]).images)

    def _learn(self, images: list[Tensor], chains: list[Tensor]) -> list[GridLearned]:
        grids = []
        nets = self.model.active_nets[: len(images)]
        for net, parameters, real, chain in zip(nets, self.parameters, images, chains):
            gradients, on_real, on_chain = contrast(
                net, parameters, real, chain, self.config.stabilise.energy_l2, self.precision,
                self.config.learning_precision,
            )  # fmt: skip
            grids.append(GridLearned(self.tied(gradients), on_real, on_chain))
        return grids

    def measure(self, learned: Learned) -> tuple[dict[str, Tensor], Tensor]:
        """What every update reports of a grid, on the device, by the names of `_OF_GRID`; and whether the update must
        not be applied, 0-dim bool."""
        measured = {}
        for grid, net in zip(learned.grids, self.names):
            values = (grid.observed, grid.synthesised, norm(grid.gradients))
            measured.update({f"{net}/{name}": value for name, value in zip(_OF_GRID, values, strict=True)})
        fine = torch.stack(list(measured.values())).isfinite().all() & (learned.healthy == 1)
        return measured, fine.logical_not()

    def apply(self, learned: Learned, numbers: Numbers, spoilt: Tensor) -> None:
        """One step of every net's optimiser, none where `spoilt` is 1."""
        for index, (grid, net) in enumerate(zip(learned.grids, self.model.active_nets)):
            parameters = self.parameters[index]
            condition_(grid.gradients, self.config.optimiser, self.divisors[index])
            learning = {id(p) for p in net.parameters()}  # without layers that the energy does not use
            given = [g if id(p) in learning else None for p, g in zip(parameters, grid.gradients, strict=True)]
            step(self.optimisers[index], parameters, given, numbers.rates[index], spoilt)

    def _with_noise(self, images: Tensor, grid: int, numbers: Numbers, first_sample: int) -> Tensor:
        std = numbers.data_noise[grid - 1]
        if not isinstance(std, Tensor) and std == 0:
            return images
        draw = ops.noise(
            images.shape, seed=self.config.seed, step=numbers.iteration, first_sample=first_sample,
            stream=noise.stream(self.purpose(noise.Purpose.DATA_NOISE), grid), device=images.device,
        )  # fmt: skip
        bounds = self.config.value_range if self.config.stabilise.data_noise_clamp else None
        return with_data_noise(images, draw, std, bounds, self.model.channels)

    # metrics

    def _check_finite(self, found: Mapping[str, float], iteration: int) -> None:
        names = {key: f"generator's {name}" for key, name in _OF_LESSON.items()}
        for grid, size in enumerate(self.model.sizes[1:], start=1):
            where = f"of grid {grid} (size {size})"
            names.update({f"size_{size}/{key}": f"{name} {where}" for key, name in _OF_GRID.items()})
        for key, number in found.items():
            if key in names and not math.isfinite(number):
                raise DivergenceError(f"training: the {names[key]} became non-finite at update {iteration + 1}")

    def metrics(self, found: Mapping[str, float], iteration: int) -> dict[str, float]:
        """The metrics of update `iteration`, of what was measured in it."""
        metrics: dict[str, float] = {}
        learning = self.names[: self.learning_at(iteration)]
        for net, first, factor in zip(learning, self.first_updates, self.config.noise_factors(iteration)):
            names = (f"{net}/{name}" for name in (*_OF_GRID, *_OF_RECORD))
            metrics.update({name: found[name] for name in names if name in found})
            metrics[f"{net}/gap"] = metrics[f"{net}/energy_observed"] - metrics[f"{net}/energy_synthesised"]
            if self.annealed:
                metrics[f"{net}/noise_factor"] = factor
            if first or self.factors_of(net).rate != self.factors_of().rate:
                metrics[f"{net}/lr_factor"] = self.schedule(iteration, first, net)
        metrics["lr_factor"] = self.schedule(iteration)
        for net, factors in self.factors.items():
            if factors.data_noise != 1.0:
                metrics[f"{net}/data_noise_factor" if net else "data_noise_factor"] = factors.data_noise
        if "generator/loss" in found:
            metrics.update(self.taught(found["generator/loss"]))
            metrics["generator/gradient_norm"] = found["generator/gradient_norm"]
        return metrics

    def cost(self, updates: int) -> float:
        """By the work of the nets that learn."""
        return sum(cost * max(0, updates - first) for cost, first in zip(costs(self.model), self.first_updates))

    def to_come(self, iteration: int) -> str:
        later = zip(self.model.sizes[1:], self.first_updates)
        return ", ".join(f"size {size} joins after update {first}" for size, first in later if first > iteration)

    def headline(self, metrics: Mapping[str, float]) -> str:
        gaps = [metrics.get(f"{net}/gap") for net in self.names]
        return "energy gap " + " ".join(f"{gap:+.3f}" for gap in gaps if gap is not None)

    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        with self.averaged_weights():
            samples = self.model.sample(len(observed), seed=self.config.seed, return_grids=True, precision="auto")
        rows = [("samples", samples), ("data", self.observed(observed))]
        sizes = self.model.sizes[: 1 + self.learning]
        grids = [(title, size, images) for title, found in rows for size, images in zip(sizes, found)]
        return [(f"{title} {size}x{size}", self.model.to_uint8(images)) for title, size, images in grids], len(sizes)

    def named_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {str(grid): optimiser for grid, optimiser in enumerate(self.optimisers, start=1)}

    def samples(self, count: int) -> Tensor | None:
        if self.learning < len(self.first_updates):
            return None  # the finest net knows nothing yet
        with self.averaged_weights():
            chains = getattr(self.model, "bank", None)
            if chains is not None and len(chains):
                return chains[:count]
            return self.model.sample(count, seed=self.config.seed, precision="auto", return_grids=True)[-1]

    def before_stored(self, iteration: int) -> None:
        """What is stored samples as its last update did."""
        self.arrange(max(0, iteration - 1))
