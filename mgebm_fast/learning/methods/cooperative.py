"""Cooperative learning of a descriptor and a generator by MCMC teaching (Xie, Lu, Gao, Zhu, Wu, arXiv 1609.09408)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import noise
from ...errors import DivergenceError
from ...models import CoopNets
from ...models.latent import Residual, draw_latents
from ..config.keys import Real, key
from ..config.method import Method, register
from ..config.train_config import TrainConfig
from .abp import GeneratorConfig, build_generator, build_inference
from .baselines import narrow
from .contrastive import ContrastiveRule
from .optim import build_optimiser, condition_, norm, step
from .work import CHAIN_STEP, LEARNING, work_of_chains


@dataclasses.dataclass(frozen=True)
class CooperativeConfig(GeneratorConfig):
    """`[cooperative]`: the generator, and how it is taught. [langevin] and [optimiser] are the descriptor's."""

    lr: float = key(1e-3, Real(0, above=True), "learning rate of the generator")


class CooperativeRule(ContrastiveRule):
    """One update:

        z ~ N(0, I);  y = g(z);  y → ỹ by the descriptor's chain
        descriptor: `ContrastiveRule` with ỹ for the synthesised images
        z → z̃ by `infer_steps` Langevin steps on the posterior of z given ỹ
        generator: one step down the mean of ‖ỹ − g(z̃)‖²/2s²

    The chain starts where the generator thinks images are, and the generator learns how the chain changed them. Both
    learn from the weights before the update.
    """

    model: CoopNets
    divisible = False  # the generator learns from a whole batch

    def __init__(self, model: CoopNets, config: TrainConfig, *, images: int) -> None:
        super().__init__(model, narrow(config), images=images)
        options = config.options
        self.teaching = dataclasses.replace(config.optimiser, lr=options.lr)
        self.taught = list(model.generator.parameters())
        self.generator_optimiser = build_optimiser(self.taught, self.teaching)
        self.inference = build_inference(config)
        self._pair: tuple[Tensor, Tensor] | None = None  # z and ỹ of the update in hand
        self._measured = torch.zeros(2)  # the generator's loss, and the norm of its gradient

    def named_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {**super().named_optimisers(), "generator": self.generator_optimiser}

    def synthesise(self, observed: list[Tensor], iteration: int, first_sample: int = 0) -> list[Tensor]:
        generator = self.model.generator
        z = draw_latents(
            generator, len(observed[0]), seed=self.config.seed, step=iteration, first_sample=first_sample,
            purpose=self.purpose(noise.Purpose.INITIAL_STATE),
        )  # fmt: skip
        with torch.no_grad():
            start = generator(z)
        x = self.chain_of_one(start, iteration, first_sample)
        self._pair = z, x
        return [x]

    def _apply(self, gradients: list[list[Tensor]], iteration: int, spoilt: Tensor) -> float:
        assert self._pair is not None
        (z, x), options, generator = self._pair, self.config.options, self.model.generator
        if options.infer_steps and not bool(spoilt):
            z = self.inference(
                generator, x, z, seed=self.config.seed, first_step=iteration * options.infer_steps,
                stream=noise.stream(self.purpose(noise.Purpose.LATENT)), where="training: inference of z",
            )  # fmt: skip
        loss = Residual(generator, x, options.std)(z).mean()
        found = list(torch.autograd.grad(loss, self.taught))
        self._measured = torch.stack([loss.detach(), norm(found)])
        spoilt = torch.maximum(spoilt, self._measured.isfinite().all().logical_not().float())
        schedule = super()._apply(gradients, iteration, spoilt)
        condition_(found, self.teaching)
        step(self.generator_optimiser, self.taught, found, options.lr * schedule, spoilt)
        return schedule

    def _check_finite(self, numbers: list[float], iteration: int) -> None:
        super()._check_finite(numbers, iteration)
        for name, number in zip(("loss", "gradient"), self._measured.tolist(), strict=True):
            if not math.isfinite(number):
                raise DivergenceError(f"training: the generator's {name} became non-finite at update {iteration + 1}")

    def _metrics(self, *arguments: Any) -> dict[str, float]:
        loss, length = self._measured.tolist()
        pixels = self.model.channels * self.model.sizes[-1] ** 2
        taught = math.sqrt(2 * self.config.options.std**2 * loss / pixels)
        return {**super()._metrics(*arguments), "generator/residual": taught, "generator/gradient_norm": length}

    def headline(self, metrics: Mapping[str, float]) -> str:
        return f"{super().headline(metrics)}, refined by {metrics['generator/residual']:.3f} a pixel"

    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        n, seed, to_uint8 = len(observed), self.config.seed, self.model.to_uint8
        with self.averaged_weights():
            refined = self.model.sample(n, seed=seed, precision="auto", return_grids=True)[-1]
            alone = self.model.generate(n, seed=seed)
        data = self.observed(observed)[-1]
        return [("refined", to_uint8(refined)), ("generator alone", to_uint8(alone)), ("data", to_uint8(data))], 3


def work(model: CoopNets, config: TrainConfig) -> float:
    """That of the descriptor and its chain; the generator proposes, infers z where it is asked to, and learns."""
    passes = 1 + CHAIN_STEP * config.options.infer_steps + LEARNING
    return work_of_chains(model, config) + passes * model.generator.macs()


def build_model(config: TrainConfig) -> CoopNets:
    """The untrained pair that a configuration describes; the descriptor is the finest net of its multi-grid model."""
    one = narrow(config)
    return CoopNets(
        one.sizes[-1],
        build_generator(one),
        build_inference(one),
        complete_steps=one.options.complete_steps,
        width=one.width,
        variant=one.variant,
        **one.model_arguments(),
    )


register(
    Method(
        "cooperative",
        "a descriptor refines what a generator makes, and teaches it",
        CoopNets,
        CooperativeRule,
        build_model,
        work,
        CooperativeConfig,
        narrow=narrow,
    )
)
