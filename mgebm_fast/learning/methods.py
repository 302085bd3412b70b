"""The methods that a run can be trained by: a name, its own table of keys, and the module that holds its rule.

A method is an update rule and an initial state over one loop. Its module has

    build_model(config) -> nn.Module                     the untrained model
    the entry's rule: (model, config, *, images) -> UpdateRule, with `images` how many the data set has
    narrow(config) -> TrainConfig                        only where the method reads less than is configured
    load_data(config, *, source, split) -> Clips         only where it learns from something other than images
    work(model, config) -> float                         only where the work of an update is not `work_of_chains`

and one entry here makes it known to TOML files, `--set`, `mgebm train` and `mgebm presets`. Modules load when they are
used.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..data import load
from .keys import Choice, Flag, Many, Maybe, Real, Text, Whole, key
from .passes import work_of_chains

if TYPE_CHECKING:
    from .config import TrainConfig
    from .rule import UpdateRule


@dataclasses.dataclass(frozen=True)
class CdConfig:
    """`[cd]`: contrastive divergence, whose K training steps never leave the data far enough to sample by."""

    sample_steps: int = key(1000, Whole(1), "steps from noise of a chain that samples the trained model")


@dataclasses.dataclass(frozen=True)
class PcdConfig:
    """`[pcd]`: persistent chains."""

    bank_size: Any = key(
        None,
        Maybe(Whole(1)),
        "chains of one bank that batches are drawn from; none: each batch of an epoch has its own",
    )
    restart: float = key(0.0, Real(0, 1), "probability that a drawn chain begins anew, from noise")
    sample_steps: Any = key(
        None, Maybe(Whole(1)), "further steps of a stored chain that is sampled; none: as in training"
    )


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """`[generative-convnet]`: the net, its growth, and its persistent chains."""

    layers: tuple = key(
        ((48, 9, 2), (48, 5, 1), (32, 3, 1)),
        Many(Many(Whole(1), 3), least=1),
        "[channels, kernel, stride] of each layer",
    )
    head: str = key("sum", Choice(("sum", "linear")), "sum of the top map, for images of any size, or linear over it")
    grow: float = key(
        0.0, Real(0, 1, below=True), "share of the updates, in equal parts, that stacks of fewer layers are trained for"
    )
    init_std: Any = key(None, Maybe(Real(0, above=True)), "of normal initial weights; none: Xavier-uniform ones")
    bank_size: Any = key(None, Maybe(Whole(1)), "chains that batches are drawn from; none: as many as a batch")
    restart: float = key(0.0, Real(0, 1), "probability that a drawn chain begins anew, from the zero image")
    sample_steps: int = key(300, Whole(1), "steps of a sample's chain from the zero image")


@dataclasses.dataclass(frozen=True)
class FrameConfig:
    """`[frame]`: the frozen filters, and how chains of their weights move."""

    filters: str = key("gabor", Text(), "gabor: a bank of Gabor and DoG filters; or a run whose lower layers are taken")
    layers: int = key(1, Whole(1), "how many layers of that run's net")
    scales: tuple = key((2.0, 3.5, 6.0), Many(Real(1), least=1), "wavelengths of the bank, in pixels")
    orientations: int = key(8, Whole(1), "of the Gabor filters at every scale")
    thresholds: tuple = key(
        (0.0,), Many(Real(0), least=1), "b of relu(F * x - b), in the model's units: each is a moment"
    )
    stride: int = key(1, Whole(1), "pixels between responses")
    leapfrog_steps: Any = key(None, Maybe(Whole(1)), "gradients to a Hamiltonian proposal; none: Langevin steps")
    bank_size: Any = key(None, Maybe(Whole(1)), "chains that batches are drawn from; none: as many as a batch")
    restart: float = key(0.0, Real(0, 1), "probability that a drawn chain begins anew, from the zero image")
    sample_steps: int = key(300, Whole(1), "steps of a sample's chain from the zero image")


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """What methods that learn a generator x = g(z) + s ε, z ~ N(0, I), have in common."""

    latent: int = key(32, Whole(1), "length of z, at each place of its map")
    generator_width: int = key(32, Whole(1), "channels of the generator's last hidden layer, times width")
    std: float = key(0.3, Real(0, above=True), "s, of the noise around g(z), in value_range units")
    infer_steps: int = key(0, Whole(0), "Langevin steps on z given an image, an update")
    infer_step_size: float = key(0.1, Real(0, above=True), "δ of those steps")
    complete_steps: int = key(300, Whole(1), "steps on z that explain the known pixels of an image in in-painting")


@dataclasses.dataclass(frozen=True)
class CooperativeConfig(GeneratorConfig):
    """`[cooperative]`: the generator, and how it is taught. [langevin] and [optimiser] are the descriptor's."""

    lr: float = key(1e-3, Real(0, above=True), "learning rate of the generator")


@dataclasses.dataclass(frozen=True)
class AbpConfig(GeneratorConfig):
    """`[abp]`: the generator, the chains on z, and what is hidden of the data."""

    infer_steps: int = key(20, Whole(1), "Langevin steps on z given an image, an update")
    latent_map: int = key(1, Whole(1), "side of the map of z: more than 1 for textures, sizes[-1] over a power of 2")
    expand: bool = key(False, Flag(), "keep the second moment of the data's z at the prior's (PX-EM), once an epoch")
    occlude: str = key("none", Choice(("none", "square", "doodle", "pepper")), "what is hidden of every training image")


@dataclasses.dataclass(frozen=True)
class SpatialTemporalConfig:
    """`[spatial-temporal]`: the clips that are learnt from, the net, and its persistent chains."""

    size: tuple = key(
        (20, 32, 32), Many(Whole(2), least=1), "of a clip: [frames, height, width], or [samples] of a sound"
    )
    rate: Any = key(
        None,
        Maybe(Real(0, above=True)),
        "frames or samples a second that data are brought to; none: 25 of videos, 11025 of sounds",
    )
    hop: int = key(1, Whole(1), "frames or samples between the beginnings of clips")
    layers: tuple = key(
        ((32, 5, 2), (64, 3, 2)), Many(Many(Whole(1), 3), least=1), "[channels, kernel, stride] of each layer"
    )
    head: str = key("linear", Choice(("linear", "sum")), "linear over the top map, or its sum: places are alike")
    bank_size: Any = key(None, Maybe(Whole(1)), "chains that batches are drawn from; none: as many as a batch")
    restart: float = key(0.0, Real(0, 1), "probability that a drawn chain begins anew, from the data's mean")
    sample_steps: Any = key(
        None, Maybe(Whole(1)), "further steps of a stored chain that is sampled; none: as in training"
    )


@dataclasses.dataclass(frozen=True)
class Method:
    """One entry: `table` holds the method's own keys, of which a resumed run may not change those in `fixed`."""

    name: str
    about: str
    rule: str  # "module:class"
    model: str  # the class that it trains, as model files name it
    table: type | None = None
    fixed: tuple[str, ...] = ()

    @property
    def _module(self) -> ModuleType:
        return importlib.import_module(f".{self.rule.partition(':')[0]}", __package__)

    def narrow(self, config: TrainConfig) -> TrainConfig:
        """The configuration as the method reads it: one of the finest net alone, for a method of one net."""
        return getattr(self._module, "narrow", lambda whole: whole)(config)

    def build_model(self, config: TrainConfig) -> Any:
        """The untrained model that `config` describes."""
        return self._module.build_model(config)

    def load_data(self, config: TrainConfig, *, source: Any = None, split: str = "train", strict: bool = False) -> Any:
        """What the method learns from, as `config` or `source` names it: images, unless its module reads its own."""
        read = getattr(self._module, "load_data", None)
        if read is not None:
            return read(config, source=source, split=split)
        return load(
            config.data if source is None else source,
            size=config.sizes[-1],
            channels=config.channels,
            classes=list(config.classes) or None,
            split=split,
            strict=strict,
        )

    def build_rule(self, model: Any, config: TrainConfig, *, images: int) -> UpdateRule:
        """The rule that trains `model`; ConfigError where the method's keys do not fit each other."""
        return getattr(self._module, self.rule.partition(":")[2])(model, config, images=images)

    def work(self, config: TrainConfig) -> float:
        """Multiply-accumulates of one update for one image of the batch, on average over the updates (`work`)."""
        return getattr(self._module, "work", work_of_chains)(self.build_model(config), config)

    def options(self) -> Any:
        """The method's own keys at their defaults; None where it has none."""
        return None if self.table is None else self.table()


_MULTIGRID, _ONE = "multigrid:MultiGridRule", "baselines:SingleGridRule"
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("multigrid", "every grid learns from its own chain, coarse to fine", _MULTIGRID, "MultiGrid"),
        Method("cd", "one net, chains from the observed images", _ONE, "SingleGrid", CdConfig),
        Method("pcd", "one net, chains that persist", _ONE, "SingleGrid", PcdConfig, ("bank_size", "restart")),
        Method("single-grid-cd", "the finest net alone, from the 1×1 means, as many steps in all", _ONE, "SingleGrid"),
        Method("short-run", "one net, chains from uniform noise", _ONE, "SingleGrid"),
        Method(
            "generative-convnet",
            "one net of one's own layers, persistent chains from zero images",
            "convnet:ConvNetRule",
            "GenerativeConvNet",
            ConvNetConfig,
            ("layers", "head", "grow", "init_std", "bank_size", "restart"),
        ),
        Method(
            "frame",
            "fixed filters, weights of their responses, persistent chains from zero images",
            "frame:FrameRule",
            "Frame",
            FrameConfig,
            (
                "layers",
                "scales",
                "orientations",
                "thresholds",
                "stride",
                "leapfrog_steps",
                "bank_size",
                "restart",
            ),
        ),
        Method(
            "cooperative",
            "a descriptor refines what a generator makes, and teaches it",
            "cooperative:CooperativeRule",
            "CoopNets",
            CooperativeConfig,
            ("latent", "generator_width", "infer_steps"),
        ),
        Method(
            "abp",
            "a generator alone, by inference of the latent variables of every image",
            "abp:ABPRule",
            "GeneratorModel",
            AbpConfig,
            ("latent", "generator_width", "infer_steps", "latent_map", "expand", "occlude"),
        ),
        Method(
            "spatial-temporal",
            "one net over time, of a video or a sound, persistent chains from the data's mean",
            "spatial_temporal:SpatialTemporalRule",
            "SpatialTemporal",
            SpatialTemporalConfig,
            ("size", "rate", "hop", "layers", "head", "bank_size", "restart"),
        ),
    )
}
TABLES: dict[str, type] = {method.name: method.table for method in METHODS.values() if method.table is not None}


def build_model(config: TrainConfig) -> Any:
    """The untrained model that a configuration describes, of the class that its method trains."""
    return METHODS[config.method].build_model(config)


def work(config: TrainConfig) -> int:
    """Multiply-accumulates of all updates of a run, over the whole batch:

        steps · batch_size · W,   W = what `Method.work` counts of one update and one image of the batch

    and of a method of energy nets W = Σ over nets of (2 K + 2 · 3) macs(net): two forward passes a step of a chain, and
    three for learning from an observed image and from a synthesised one. A generator counts one forward pass where it
    proposes an image, three where it learns, and two a step of inference of z. Left out: what is no convolution or
    matrix product, data, pictures and checkpoints, and that the lowest layer needs no gradient for its input when it
    learns.
    """
    return round(config.steps * config.batch_size * METHODS[config.method].work(config))
