"""The multi-grid method (Gao, Lu, Zhou, Zhu, Wu, CVPR 2018, arXiv 1709.08868): every grid learns from its own chain."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from ... import noise
from ...models import MultiGrid
from ...nets import ResidualNet, ScoreNet
from ...sampling.cascade import static_cascade
from ...sampling.graphs import Graph, Session
from ...sampling.static import StaticCascade
from ..config.keys import Flag, key
from ..config.method import Method, register
from ..config.train_config import TrainConfig
from .captured import GraphedRule
from .synthesis import Synthesis
from .work import work_of_chains


@dataclasses.dataclass(frozen=True)
class MultiGridConfig:
    """`[multigrid]`."""

    conditional: bool = key(False, Flag(), "learn an energy of image and class, of data with labels", fixed=True)


class MultiGridRule(GraphedRule):
    """`ContrastiveRule` with the cascade from the observed 1×1 means, K steps a grid.

    All grids are sampled before any is updated; since a chain of one grid never uses another grid's net, updating
    each grid right after its chain is the same.
    """

    model: MultiGrid
    divisible = True

    def synthesise(self, observed: list[Tensor], iteration: int, first_sample: int, graph: Graph = None) -> Synthesis:
        results = self.model.run(
            observed[0],
            seed=self.config.seed,
            first_sample=first_sample,
            first_step=[iteration * chain.steps for chain in self.model.langevin],
            purpose=self.purpose(noise.Purpose.TRAINING_CHAIN),
            precision=self.precision,
            graph=graph,
        )
        return Synthesis(results[1:], first_sample)

    def static_chains(self, start: Tensor, session: Session) -> StaticCascade:
        model, purpose = self.model, self.purpose(noise.Purpose.TRAINING_CHAIN)
        held = None
        if model.classes:
            known, mask = model.held_planes(start)
            held = known, mask.expand_as(known)
        return static_cascade(
            list(model.nets), model.sizes, model.langevin, start, held, purpose=purpose, session=session,
            precision=self.precision,
        )  # fmt: skip


def build_model(config: TrainConfig) -> MultiGrid:
    """The untrained model that a configuration describes."""
    return MultiGrid(
        config.sizes,
        width=config.width,
        variant=config.variant,
        depth=config.depth,
        classes=config.classes if config.options.conditional else (),
        **config.model_arguments(),
    )


def describe_model(model: MultiGrid) -> dict[str, Any]:
    """The configuration keys that a given model settles. ValueError where its chains cannot be written as keys."""
    first = model.nets[0]
    built = isinstance(first, ScoreNet)  # a module of one's own says nothing of these keys
    clamps = {chain.clamp for chain in model.langevin}
    if clamps not in ({None}, {model.value_range}):
        raise ValueError(
            "MultiGridTrainer: every chain of the model must clamp to its value_range "
            f"{model.value_range}, or none of them, got {sorted(map(str, clamps))}"
        )
    chains: dict[str, Any] = {"clamp": clamps == {model.value_range}}
    for name in (
        "steps", "step_size", "noise_scale", "drift", "noise_std", "reference_std", "reference_mean", "grad_clamp",
    ):  # fmt: skip
        values = [getattr(chain, name) for chain in model.langevin]
        alike = len(set(values)) == 1 and not isinstance(values[0], tuple)  # a list alone would be a value a net
        chains[name] = values[0] if alike else values
    return {
        "sizes": list(model.sizes),
        "channels": model.channels,
        "width": float(model.width),
        "variant": model.variant,
        "depth": first.depth if isinstance(first, ResidualNet) else 1,
        "norm": "batch" if model.norm == "batch" else "none",
        "activation": first.activation if built else None,
        "spectral_norm": first.spectral_norm if built else False,
        "value_range": list(model.value_range),
        "batch_size": model.batch_size,
        "langevin": chains,
        "classes": list(model.classes),
        "multigrid": {"conditional": bool(model.classes)},
    }


register(
    Method(
        "multigrid",
        "every grid learns from its own chain, coarse to fine",
        MultiGrid,
        MultiGridRule,
        build_model,
        work_of_chains,
        MultiGridConfig,
    )
)
