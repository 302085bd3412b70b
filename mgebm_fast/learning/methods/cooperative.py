"""Cooperative learning of a descriptor and a generator by MCMC teaching (Xie, Lu, Gao, Zhu, Wu, arXiv 1609.09408)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ... import noise
from ...models import CoopNets
from ...models.latent import Residual, draw_latents
from ...sampling.graphs import Graph
from ..config.keys import Real, key, pick
from ..config.method import Method, register
from ..config.train_config import TrainConfig
from .abp import GeneratorConfig, build_generator, build_inference
from .baselines import OneNetRule, narrow
from .optim import build_optimiser
from .synthesis import Lesson, Synthesis
from .work import CHAIN_STEP, LEARNING, work_of_chains


@dataclasses.dataclass(frozen=True)
class CooperativeConfig(GeneratorConfig):
    """`[cooperative]`: the generator, and how it is taught. [langevin] and [optimiser] are the descriptor's."""

    lr: float = key(1e-3, Real(0, above=True), "learning rate of the generator")


class CooperativeRule(OneNetRule):
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
        self.teaching = dataclasses.replace(config.optimiser, lr=config.options.lr)
        self.generator_parameters = list(model.generator.parameters())
        self.generator_optimiser = build_optimiser(self.generator_parameters, self.teaching)
        self.inference = build_inference(config)

    def named_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {**super().named_optimisers(), "generator": self.generator_optimiser}

    def synthesise(
        self, observed: list[Tensor], iteration: int, first_sample: int = 0, graph: Graph = None
    ) -> Synthesis:
        generator = self.model.generator
        z = draw_latents(
            generator, len(observed[0]), seed=self.config.seed, step=iteration, first_sample=first_sample,
            purpose=self.purpose(noise.Purpose.INITIAL_STATE),
        )  # fmt: skip
        with torch.no_grad():
            start = generator(z)
        x = self.run(start, iteration, first_sample, graph)
        return Synthesis([x], first_sample, latents=z)

    def teach(self, made: list[Synthesis], iteration: int, spoilt: Tensor) -> Lesson:
        (whole,), options, generator = made, self.config.options, self.model.generator
        (x,), z = whole.images, whole.latents
        assert z is not None
        if options.infer_steps and not bool(spoilt):
            z = self.inference(
                generator, x, z, seed=self.config.seed, first_step=iteration * options.infer_steps,
                stream=noise.stream(self.purpose(noise.Purpose.LATENT)), where="training: inference of z",
            )  # fmt: skip
        loss = Residual(generator, x, options.std)(z).mean()
        gradients = list(torch.autograd.grad(loss, self.generator_parameters))
        return Lesson(self.generator_optimiser, self.teaching, self.generator_parameters, gradients, loss.detach())

    def taught(self, loss: float) -> dict[str, float]:
        pixels = self.model.channels * self.model.sizes[-1] ** 2
        return {"generator/residual": math.sqrt(2 * self.config.options.std**2 * loss / pixels)}

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
    """The work of the descriptor and its chain, and of the generator: it proposes, may infer z, and learns."""
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
        width=pick(one.width, -1),
        variant=one.variant,
        depth=one.depth,
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
