"""FRAME (Zhu, Wu, Mumford, 1998) and its deep version (Lu, Zhu, Wu, AAAI 2016): weights λ of fixed filters, learned
until the mean responses of what chains make are those of the data."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ConfigError
from ...models import EnergyModel, Frame, Model
from ...nets import ConvSpec, EnergyNet
from ...nets.filters import filter_bank
from ..config.keys import MOST_SAMPLES, MOST_SIDE, MOST_STEPS, Many, Maybe, Real, Text, Whole, key, pick
from ..config.method import Method, register
from ..config.train_config import TrainConfig
from .baselines import Zeros, narrow
from .convnet import ChainsRule
from .synthesis import Learned, Synthesis
from .work import CHAIN_STEP


@dataclasses.dataclass(frozen=True)
class FrameConfig:
    """`[frame]`: the frozen filters, and how chains of their weights move."""

    filters: str = key("gabor", Text(), "gabor: a bank of Gabor and DoG filters; or a run whose lower layers are taken")
    layers: int = key(1, Whole(1, 64), "how many layers of that run's net", fixed=True)
    scales: tuple = key(
        (2.0, 3.5, 6.0), Many(Real(1, MOST_SIDE), least=1, most=64), "wavelengths of the bank, in pixels", fixed=True
    )
    orientations: int = key(8, Whole(1, 256), "orientations of the Gabor filters at every scale", fixed=True)
    thresholds: tuple = key(
        (0.0,),
        Many(Real(0), least=1, most=64),
        "b of relu(F * x - b), in the model's units: each is a moment",
        fixed=True,
    )
    stride: int = key(1, Whole(1, MOST_SIDE), "pixels between responses", fixed=True)
    leapfrog_steps: Any = key(
        None, Maybe(Whole(1, 1000)), "gradients to a Hamiltonian proposal; none: Langevin steps", fixed=True
    )
    bank_size: Any = key(
        None, Maybe(Whole(1, MOST_SAMPLES)), "chains that batches are drawn from; none: as many as a batch", fixed=True
    )
    restart: float = key(0.0, Real(0, 1), "probability that a drawn chain starts again from the zero image", fixed=True)
    sample_steps: int = key(300, Whole(1, MOST_STEPS), "steps of a sample's chain from the zero image")


class FrameRule(ChainsRule):
    """`ChainsRule` of a `Frame`: the gradient of λ_k is the difference of the mean responses of filter k,

        d/dλ_k loss = mean h_k(synthesised) − mean h_k(observed)

    (mean over pixels too: the gradient divided by the area of a feature map), and nothing else learns.
    """

    model: Frame

    def __init__(self, model: Frame, config: TrainConfig, *, images: int) -> None:
        if config.stabilise.energy_l2:
            raise ConfigError(
                "stabilise.energy_l2 must be 0 for the method 'frame', which matches moments, got "
                f"{config.stabilise.energy_l2:g}"
            )
        least = pick(narrow(config).stabilise.noise_anneal, 0)
        if model.leapfrog_steps is not None and least == 0:
            raise ConfigError("stabilise.noise_anneal must be > 0 with frame.leapfrog_steps, got 0")
        super().__init__(model, config, images=images)

    def tied(self, gradients: list[Tensor]) -> list[Tensor]:
        (whole,) = gradients
        tied = whole.view(self.model.net.specs[-1].channels, -1).mean(1, keepdim=True)
        return [tied.expand(-1, whole.numel() // len(tied)).reshape(whole.shape)]

    def details(self, learned: Learned, made: Synthesis) -> dict[str, float]:
        """`moment_error`: the mean difference of mean responses, of chains and data, over those of the data."""
        synthesised = self.model.responses(made.images[0]).mean(0).double()
        difference = learned.grids[0].gradients[0].view(len(synthesised), -1)[:, 0].double()
        observed = synthesised - difference
        return {"moment_error": float(difference.abs().mean() / observed.abs().mean().clamp_min(1e-12))}


def work(model: Frame, config: TrainConfig) -> float:
    """The chain, and three forward passes for learning: filters are frozen, so that λ needs the responses alone."""
    gradients = model.langevin[0].steps * (model.leapfrog_steps or 1)
    return (CHAIN_STEP * gradients + 3) * model.net.macs()


def build_model(config: TrainConfig) -> Frame:
    """The model with λ = 0, which is its reference."""
    one = narrow(config)
    net = _bank(one) if one.options.filters == "gabor" else _learned(one)
    assert net.head is not None
    for parameter in net.head.parameters():
        torch.nn.init.zeros_(parameter)
    own = {"leapfrog_steps": one.options.leapfrog_steps, "sample_steps": one.options.sample_steps}
    return Frame(one.sizes[-1], nets=[net], **own, **one.model_arguments())


@torch.no_grad()
def _bank(config: TrainConfig) -> EnergyNet:
    options = config.options
    filters = filter_bank(options.scales, options.orientations, channels=config.channels)
    spec = ConvSpec(len(filters) * len(options.thresholds), filters.shape[-1], options.stride)
    net = EnergyNet(config.sizes[-1], config.channels, [spec], norm="none", activation="relu")
    (layer,) = net.convolutions
    assert layer.bias is not None
    layer.weight.copy_(filters.repeat(len(options.thresholds), 1, 1, 1))
    layer.bias.copy_(-torch.tensor(options.thresholds, dtype=torch.float32).repeat_interleave(len(filters)))
    return net


@torch.no_grad()
def _learned(config: TrainConfig) -> EnergyNet:
    """The lowest layers of a trained net, its finest, under a new head."""
    options = config.options
    try:
        model = Model.load(options.filters)
    except CheckpointError as error:
        raise ConfigError(f"frame.filters must be gabor or the folder of a run: {error}") from None
    trained = model.nets[-1] if isinstance(model, EnergyModel) else None
    if not isinstance(trained, EnergyNet) or trained.norm == "batch":
        raise ConfigError(
            "frame.filters must be a run of energy nets without batch normalisation, got "
            f"{options.filters}, which is a {model.kind}{'' if trained is None else ' with it'}"
        )
    if model.channels != config.channels or model.value_range != config.value_range:
        raise ConfigError(
            f"frame.filters must be learned from images of {config.channels} channels in {config.value_range}, got "
            f"{model.channels} in {model.value_range}"
        )
    if options.layers > len(trained.specs):
        raise ConfigError(f"frame.layers must be at most the {len(trained.specs)} of {options.filters}, got "
                          f"{options.layers}")  # fmt: skip
    net = EnergyNet.from_config(
        {**trained.config(), "size": [config.sizes[-1]] * 2, "layers": trained.config()["layers"][: options.layers],
         "head": "linear", "norm": "none", "spectral_norm": False}
    )  # fmt: skip
    for source, target in zip(trained.convolutions, net.convolutions, strict=False):
        target.weight.copy_(source.effective_weight())
        if target.bias is not None and source.bias is not None:
            target.bias.copy_(source.bias)
    return net


register(
    Method(
        "frame",
        "fixed filters, weights of their responses, persistent chains from zero images",
        Frame,
        FrameRule,
        build_model,
        work,
        FrameConfig,
        narrow=narrow,
        start=Zeros,
    )
)
