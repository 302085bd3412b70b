"""Alternating back-propagation (Han, Lu, Zhu, Wu, AAAI 2017, arXiv 1606.08571): infer z, then learn from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ... import noise
from ...errors import ConfigError, DivergenceError
from ...models import GeneratorModel
from ...models.latent import Inference, Residual, draw_latents
from ...models.occlusions import occlusion
from ...nets import Generator, generator_layers
from ...nets.generator import DeconvLayer
from ..config.keys import MOST_CHANNELS, MOST_SIDE, MOST_STEPS, Choice, Flag, Real, Whole, key, pick
from ..config.method import Method, register
from ..config.train_config import TrainConfig
from ..config.values import merge
from ..run.feed import Order
from . import baselines
from .model_rule import ModelRule
from .optim import build_optimiser, condition_, norm, rate_factor, step
from .work import CHAIN_STEP, LEARNING

# Sample ids of the occlusions of training images, apart from those of `mgebm inpaint`.
_TRAINING_MASKS = 1 << 31


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """What methods that learn a generator x = g(z) + s ε, z ~ N(0, I), have in common."""

    latent: int = key(32, Whole(1, MOST_CHANNELS), "length of z, at each place of its feature map", fixed=True)
    generator_width: int = key(
        32, Whole(1, MOST_CHANNELS), "channels of the generator's last hidden layer, times width", fixed=True
    )
    std: float = key(0.3, Real(0, above=True), "s, standard deviation of the noise around g(z), in value_range units")
    infer_steps: int = key(0, Whole(0, MOST_STEPS), "Langevin steps on z given an image, an update", fixed=True)
    infer_step_size: float = key(0.1, Real(0, above=True), "δ of those steps")
    complete_steps: int = key(
        300, Whole(1, MOST_STEPS), "steps on z that explain the known pixels of an image in in-painting"
    )


@dataclasses.dataclass(frozen=True)
class AbpConfig(GeneratorConfig):
    """`[abp]`: the generator, the chains on z, and what is hidden of the data."""

    infer_steps: int = key(20, Whole(1, MOST_STEPS), "Langevin steps on z given an image, an update", fixed=True)
    latent_map: int = key(
        1,
        Whole(1, MOST_SIDE),
        "side of the map of z: more than 1 for textures, sizes[-1] over a power of 2",
        fixed=True,
    )
    expand: bool = key(
        False, Flag(), "keep the second moment of the data's z at the prior's (PX-EM), once an epoch", fixed=True
    )
    occlude: str = key(
        "none", Choice(("none", "square", "doodle", "pepper")), "what is hidden of every training image", fixed=True
    )


def _idle(config: TrainConfig) -> dict[str, str]:
    """Keys of energies and of their chains; its own chains are of z, in float32."""
    names = ["optimiser.per_layer_divide", *(f"stabilise.{n}" for n in ("data_noise", "data_noise_clamp", "energy_l2"))]
    names += ["precision"] if config.precision != "fp32" else []
    return dict.fromkeys(names, "with the method 'abp', which has no energy")


class ABPRule(ModelRule):
    """One update, for the images x of a batch:

        inference: z ← K Langevin steps on the posterior of z given x, from where the z of each image was last
        learning:  one step of the generator down the mean of ‖x − g(z)‖²/2s²

    Both gradients are one back-propagation through g. With `occlude`, a part of every image is hidden, the same at
    every visit, and takes part in neither: learning from incomplete data, which g(z) completes. With `expand`, each
    epoch ends with a step of `expand()`.

    Image i has z number i and noise of id i, so the rule knows images by the order of the feed: place p of update t is
    image `Order.indices(t)[p]`.
    """

    model: GeneratorModel

    knows_images = True

    def __init__(self, model: GeneratorModel, config: TrainConfig, *, images: int) -> None:
        if config.flips:
            raise ConfigError("flips must be false for the method 'abp', where an image keeps its z, got true")
        if config.shifts:
            raise ConfigError(f"shifts must be 0 for the method 'abp', where an image keeps its z, got {config.shifts}")
        super().__init__(model, narrow(config))
        self.options = config.options
        self.inference = build_inference(config)
        self.order = Order(images, config.batch_size, config.seed)
        self.parameters = list(model.generator.parameters())
        self.optimiser = build_optimiser(self.parameters, self.config.optimiser)
        if len(model.latents) != images:
            model.latents = draw_latents(model.generator, images, seed=config.seed, purpose=noise.Purpose.INITIAL_STATE)
        self.hidden: Tensor | None = None
        if self.options.occlude != "none":
            size = model.sizes[-1]
            self.hidden = occlusion(
                self.options.occlude, images, size, seed=config.seed, first_sample=_TRAINING_MASKS
            ).to(model.latents.device)

    def named_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {"generator": self.optimiser}

    def update(self, batch: Tensor, iteration: int, *, detail: bool = False) -> dict[str, float]:
        config, generator, inference = self.config, self.model.generator, self.inference
        ids = self.order.indices(iteration)
        if len(ids) != len(batch):
            raise ValueError(f"training: a batch must hold the {len(ids)} images of its update, got {len(batch)}")
        ids, x = ids.to(self.model.latents.device), self.model.in_units(batch)
        hidden = None if self.hidden is None else self.hidden[ids]
        (factor,) = config.noise_factors(iteration)
        if factor != 1.0:
            inference = dataclasses.replace(inference, noise_scale=factor)
        z = inference(
            generator, x, self.model.latents[ids], hidden=hidden, seed=config.seed, first_sample=ids,
            first_step=iteration * inference.steps, stream=noise.stream(self.purpose(noise.Purpose.LATENT)),
            where="training: inference of z",
        )  # fmt: skip
        residual = Residual(generator, x, inference.std, hidden)
        loss = residual(z).mean()
        gradients = list(torch.autograd.grad(loss, self.parameters))
        measured = torch.stack([loss.detach(), norm(gradients), z.square().mean()])
        spoilt = measured.isfinite().all().logical_not().float()
        epoch = iteration * config.batch_size // self.order.n
        schedule = self.factors_of().rate * rate_factor(config.optimiser, iteration, config.steps, epoch)
        condition_(gradients, config.optimiser)
        step(self.optimiser, self.parameters, gradients, pick(self.config.optimiser.lr, 0) * schedule, spoilt)
        numbers = measured.tolist()
        for name, number in zip(("loss", "gradient", "latent variables"), numbers, strict=True):
            if not math.isfinite(number):
                raise DivergenceError(f"training: the generator's {name} became non-finite at update {iteration + 1}")
        self.model.latents[ids] = z
        if self.options.expand and (iteration + 1) % self.order.per_epoch == 0:
            self.expand()
        if self.average is not None:
            self.average.update(iteration)
        shown = x[0].numel() if hidden is None else x.shape[1] * float((~hidden).sum()) / len(x)
        metrics = {
            "generator/residual": math.sqrt(2 * inference.std**2 * numbers[0] / shown),
            "generator/gradient_norm": numbers[1],
            "latent/mean_square": numbers[2],
            "lr_factor": schedule,
        }
        if detail and hidden is not None:
            metrics["hidden/error"] = self._hidden_error(x, z, hidden)
        return metrics

    @torch.no_grad()
    def expand(self) -> None:
        """Give the z of the data the prior's second moment, and the first layer what that takes from them.

            Ψ = LLᵀ = mean of zzᵀ over the data;  z ← L⁻¹z,  W ← WL:  every g(z) stays as it is

        The step of parameter-expanded EM (Liu, Rubin, Wu, Biometrika 1998): plain steps approach the scale of z, on
        which samples from the prior depend, very slowly where images determine their z well. The averaged W goes with
        the live one; the optimiser's moments stay in the old basis, and follow as they forget.
        """
        latents, layer = self.model.latents, self.model.generator.layers[0]
        assert isinstance(layer, DeconvLayer)
        columns = latents.movedim(1, 0).flatten(1).double()  # (d, images and places)
        second = columns @ columns.T / columns.shape[1]
        root = torch.linalg.cholesky(second + 1e-6 * torch.eye(len(second), dtype=second.dtype, device=second.device))
        columns = torch.linalg.solve_triangular(root, columns, upper=False)
        moved = columns.reshape(latents.shape[1], len(latents), *latents.shape[2:]).movedim(0, 1)
        self.model.latents = moved.to(latents.dtype).contiguous()
        weights: list[Tensor] = [layer.weight]
        if self.average is not None:
            weights.append(self.average.state()["generator.layers.0.weight"])
        for weight in weights:
            weight.copy_(torch.einsum("dokl,de->eokl", weight.double(), root))

    def _hidden_error(self, x: Tensor, z: Tensor, hidden: Tensor) -> float:
        """Mean absolute difference on what was hidden, as a share of the range: of what learning never saw."""
        low, high = self.model.value_range
        with torch.no_grad():
            missed = ((x - self.model.generator(z)).abs() * hidden).sum()
        return float(missed / (hidden.sum() * x.shape[1] * (high - low)))

    def headline(self, metrics: Mapping[str, float]) -> str:
        hidden = f", {metrics['hidden/error']:.3f} where hidden" if "hidden/error" in metrics else ""
        return f"residual {metrics['generator/residual']:.3f} a pixel{hidden}"

    def samples(self, count: int) -> Tensor:
        with self.averaged_weights(), torch.no_grad():
            return self.model.generate(count, seed=self.config.seed)

    def panels(self, observed: Tensor) -> tuple[list[tuple[str, Tensor]], int]:
        """Samples; training images as they are, as they were shown where a part was hidden, and as g(z) has them."""
        n, to_uint8 = len(observed), self.model.to_uint8
        spread = torch.arange(n) * self.order.n // n  # as the loop picks the observed images
        with self.averaged_weights(), torch.no_grad():
            samples = self.model.generate(n, seed=self.config.seed)
            again = self.model.generator(self.model.latents[spread.to(self.model.latents.device)])
        panels = [("samples", to_uint8(samples)), ("g(z) of the data", to_uint8(again))]
        if self.hidden is not None:
            shown = torch.where(self.hidden[spread].cpu(), 128, observed)
            panels.append(("data as shown", shown))
        return [*panels, ("data", observed)], len(panels) + 1


def narrow(config: TrainConfig) -> TrainConfig:
    """The configuration of one size, without normalisation: a generator has none."""
    return merge(baselines.narrow(config), {"norm": "none"})


def work(model: GeneratorModel, config: TrainConfig) -> float:
    """Inference of z, and learning from the z found."""
    return (CHAIN_STEP * config.options.infer_steps + LEARNING) * model.generator.macs()


def build_model(config: TrainConfig) -> GeneratorModel:
    """The untrained model that a configuration describes."""
    one = narrow(config)
    return GeneratorModel(
        build_generator(one, one.options.latent_map),
        build_inference(one),
        complete_steps=one.options.complete_steps,
        value_range=one.value_range,
        batch_size=one.batch_size,
    )


def build_generator(config: TrainConfig, latent_map: int = 1) -> Generator:
    """The generator that a configuration's own table describes, of images at its finest size."""
    options = config.options
    width = max(1, round(options.generator_width * pick(config.width, -1)))
    try:
        layers = generator_layers(config.sizes[-1], config.channels, width, latent_map)
    except ValueError:  # other arguments were checked with the configuration
        raise ConfigError(
            f"sizes[-1] must be {config.method}.latent_map, {latent_map}, times a power of 2, got {config.sizes[-1]}"
        ) from None
    return Generator(
        options.latent,
        layers,
        latent_map=latent_map,
        activation=config.activation or "leaky_relu",
        value_range=config.value_range,
        seed=config.seed % 2**63,
    )


def build_inference(config: TrainConfig) -> Inference:
    """The chain on z; of cooperative learning without one in training, that of in-painting."""
    options = config.options
    return Inference(max(1, options.infer_steps), options.infer_step_size, options.std)


register(
    Method(
        "abp",
        "a generator alone, by inference of the latent variables of every image",
        GeneratorModel,
        ABPRule,
        build_model,
        work,
        AbpConfig,
        narrow=narrow,
        idle=_idle,
    )
)
