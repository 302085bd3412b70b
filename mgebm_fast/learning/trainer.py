"""MultiGridTrainer: the multi-grid update in the training loop, as one object."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

from ..checks import is_int
from ..data import Clips, ImageData
from ..errors import ConfigError, Refused
from ..models import MultiGrid
from . import start
from .config.method import METHODS, load_data
from .config.train_config import TrainConfig
from .config.values import from_dict, merge
from .given_model import check_fit, describe_model, with_classes
from .run import loggers
from .run.distributed import Ranks, joined
from .run.feed import Batches
from .run.folder import check_new
from .run.loggers import TENSORBOARD
from .run.loop import Loop, Outcome

_MEASURED = 64  # images that the best state is chosen by, at most
_COLOURS_KEPT = 65536
_SAMPLED = 32  # samples to a group of the trained model, at least, where they are not coupled


class MultiGridTrainer:
    """Trains a multi-grid model, or one of another method, which is a key of the configuration.

        trainer = mg.MultiGridTrainer(model, images, steps=2000, optimiser={"lr": 1e-3}, out="runs/mine")
        trainer.fit()

    Args:
        model: the model to train, in place; None builds the one that `config` describes.
        data: an `ImageData`, or anything `mgebm_fast.data.load` takes; None reads `config.data`. Of a name or a path
            the training part is taken, as of `config.data`.
        config: a `TrainConfig`; None takes the model's own architecture and chains, and defaults for the rest.
            Where both are given, the chains are the configuration's.
        out: the run's folder; None keeps nothing on disk.
        device: default: the model's, or for a model built here a GPU where there is one.
        console: where progress is shown; default: a rich Console on standard error.
        quiet: show nothing.
        resume_command: what the message after Ctrl-C tells the user to type.
        logger: where records go beside metrics.jsonl: "tensorboard", "wandb" or "trackio".
        ranks: the processes that train together; default: those of torch.distributed's default group, where there is
            one (`learning.distributed`). Models given take the weights of rank 0's.
        source: what the run is to say of where its data are, `config.data`; default: the name or path `data`, or the
            name of an `ImageData`, or the type of an array.
        overrides: keys of `TrainConfig` to change; sections take a dict.

    Raises ValueError where model, configuration and data do not fit each other.
    """

    def __init__(
        self,
        model: MultiGrid | None,
        data: Any = None,
        config: TrainConfig | None = None,
        *,
        out: str | Path | None = None,
        device: torch.device | str | None = None,
        console: Console | None = None,
        quiet: bool = False,
        resume_command: str | None = None,
        logger: str = TENSORBOARD,
        ranks: Ranks | None = None,
        source: str | None = None,
        **overrides: Any,
    ) -> None:
        ranks = Ranks.present() if ranks is None else ranks
        with ranks.together():
            records = loggers.logger(logger) if ranks.first else None
            if config is None:
                config = from_dict({} if model is None else describe_model(model))
            if source is None and not (data is None or isinstance(data, (str, Path))) and resume_command is None:
                resume_command = "the same trainer: .resume(), then .fit()"
            config = merge(config, {"data": _source_of(data, config) if source is None else source})
            config = _parted(merge(config, overrides), ranks)
            built = model is None
            method = METHODS[config.method]
            self.data = _images(data, config, method.narrow(config))
            config = with_classes(config, self.data)
            if not built and config.start_from is not None:
                raise ConfigError(f"start_from: must be none where a model is given, got {config.start_from!r}")
            if model is None:
                model = method.build_model(config)
            if model.kind != method.model.__name__:
                raise ValueError(
                    f"MultiGridTrainer: method {method.name!r} trains a {method.model.__name__}, got a {model.kind}"
                )
            check_fit(model, method.narrow(config))
            if built and device is None:
                device = "cuda" if torch.cuda.is_available() else "cpu"
            self.model = model if device is None else model.to(device)
            self.config = config
        if self.model.norm == "batch":  # its statistics couple the samples of a part, in training and so in sampling
            self.model.batch_size = config.batch_size // config.batch_parts
        else:
            self.model.batch_size = max(config.batch_size, _SAMPLED)
        colours = self._colours()
        ranks.check_same("configuration", zlib.crc32(config.to_toml().encode()))
        ranks.check_same("images", zlib.crc32(colours.numpy().tobytes(), len(self.data)))
        conditional = isinstance(self.model, MultiGrid) and bool(self.model.classes)
        if conditional:
            labels = torch.from_numpy(cast(ImageData, self.data).labels)
            self.model.set_colours(colours, labels[_spread(len(labels))])
        else:
            self.model.set_colours(colours)
        ranks.follow_first_([*self.model.parameters(), *self.model.buffers()])
        folder = None if out is None else Path(out)
        console = None if quiet else console or Console(stderr=True)
        places = ranks.places(config.batch_size)
        ahead = self.model.colours.device.type == "cuda"
        batches = Batches(
            self.data, config.batch_size, seed=config.seed, flips=config.flips, shifts=config.shifts, places=places,
            ahead=ahead, labelled=self.model.with_planes if conditional else None,
        )  # fmt: skip
        self._begun = False
        with ranks.together():
            self.rule = method.rule(self.model, config, images=len(self.data))
            self._loop = Loop(
                self.rule, batches, config, out=folder, console=console, resume_command=resume_command, ranks=ranks,
                logger=records,
            )  # fmt: skip
            self._loop.announces = ahead
            self.measure_against(None)

    @property
    def iteration(self) -> int:
        """Updates made so far."""
        return self._loop.iteration

    @property
    def out(self) -> Path | None:
        return self._loop.folder.path

    def fit(self, steps: int | None = None) -> Outcome:
        """Train until `steps` updates have been made in the life of the run (default: `config.steps`).

        The first SIGINT or SIGTERM ends it after the update in hand, with a checkpoint; the second aborts. Schedules
        run over `config.steps`, so that stopping early and going on later changes nothing.

        Raises FileExistsError: `out` holds something and the run was not resumed. DivergenceError: a number became
        non-finite; that update is not applied. OSError: the disk is full; earlier checkpoints are whole.
        """
        stop = self.config.steps if steps is None else steps
        if not is_int(stop, 0):
            raise ValueError(f"fit: steps must be an int >= 0 or None, got {steps!r}")
        self._begin()
        return self._loop.run(stop)

    def _begin(self) -> None:
        """Before the first update: the weights that training starts from, where they are another run's and no
        checkpoint, which holds them, was read."""
        self._loop.iteration = self._loop.updates.settle(self._loop.iteration)
        if self.config.start_from is not None and not (self._begun or self.rule.entered or self.iteration):
            with self._loop.ranks.together():
                start.begin(self.rule, self.config, self._loop.voice.say)
        self._begun = True

    def measure_against(self, held_out: ImageData | Clips | None) -> None:
        """Choose the best state (`run.divergence.measure`) by these images, as many as a group of samples holds, evenly
        spread; by the training images where there are none."""
        data = self.data if held_out is None or len(held_out) < 2 else held_out
        count = min(_MEASURED, self.model.batch_size, len(data))
        images = data.batch([i * len(data) // count for i in range(count)])
        self._loop.reference = self.model.from_uint8(images) if images.dtype == torch.uint8 else images

    def step(
        self,
        batch: Tensor,  # (N, C, S, S) uint8, or float32 in value_range units
        labels: Tensor | None = None,  # (N,) int64, of a class-conditional model
        *,
        detail: bool = True,
    ) -> dict[str, float]:
        """One update from a batch of the caller's; the numbers that a record of the metrics holds. Without `detail` not
        those that `fit` measures in every `log_every`-th update alone, which cost some gradients more of every net.

        Of several ranks each gives its share, in the order of ranks and all of one length.

        Raises ValueError or TypeError for a batch of another shape, dtype or with non-finite pixels.
        """
        expected = (self.model.channels, *getattr(self.model, "shape", (self.model.sizes[-1],) * 2))
        if not isinstance(batch, Tensor) or batch.dtype not in (torch.uint8, torch.float32):
            got = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
            raise TypeError(f"step: batch must be a uint8 or float32 tensor, got {got}")
        if batch.dim() == 0 or batch.shape[0] == 0 or tuple(batch.shape[1:]) != expected:
            wanted = ", ".join(map(str, expected))
            raise ValueError(f"step: batch must have shape (N, {wanted}), got {tuple(batch.shape)}")
        if batch.is_floating_point() and not bool(torch.isfinite(batch).all()):
            raise ValueError("step: batch must be finite, got NaN or infinite pixels")
        if labels is not None or bool(getattr(self.model, "classes", ())):
            if not isinstance(labels, Tensor):
                raise Refused("labels", "be given for a class-conditional model", labels, "step")
            labels = self.model._check_labels(labels, len(batch), "step")
            batch = self.model.with_planes(batch.to(labels.device), labels)
        self._begin()
        metrics = self.rule.update(batch, self._loop.iteration, detail=detail)
        self._loop.iteration += 1
        return metrics

    def explain(self) -> str:
        """How updates are launched: as CUDA graphs, or why not."""
        return f"updates: {self.rule.how()}"

    def save(self, path: str | Path) -> Path:
        """A checkpoint folder at `path`, written atomically: weights, averages, optimiser state, updates made."""
        self._begin()
        return self._loop.save(Path(path))

    def resume(self, path: str | Path | None = None) -> int:
        """Go on from a checkpoint folder, or from the newest whole checkpoint of a run's folder (default: `out`).

        Returns the updates made so far. What follows equals, bit for bit, a run that was never interrupted. Raises
        ConfigError where a key that states depend on has changed, CheckpointError where nothing can be read.
        """
        source = self.out if path is None else Path(path)
        if source is None:
            raise ValueError("resume: path must be given where the trainer has no out folder, got None")
        return self._loop.resume(source)

    def _colours(self) -> Tensor:
        """The 1×1 images of the data in the model's units; of a very large set, evenly spread ones."""
        colours = self.data.colours()
        return self.model.from_uint8(colours[_spread(len(colours))])


def train(
    config: TrainConfig,
    *,
    out: str | Path,
    data: Any = None,
    resume: bool = False,
    strict: bool = False,
    device: torch.device | str | None = None,
    console: Console | None = None,
    quiet: bool = False,
    resume_command: str | None = None,
    ranks: Ranks | None = None,
    held_out: ImageData | Clips | None = None,
    logger: str = TENSORBOARD,
    after_pictures: Callable[[], None] | None = None,
) -> Outcome:
    """What `mgebm train` does: check the folder, read the data, build the model, and fit or go on.

    `data` replaces what `config.data` names; the best state is chosen by the images `held_out`, by default those of
    training; `strict` refuses data with an image that cannot be read; `logger` as in `MultiGridTrainer`.
    `after_pictures` is called whenever pictures of the samples, and all else that is due after that update, are
    written. Under torchrun the processes train together.
    """
    place = None if device is None else torch.device(device)
    with joined(place) if ranks is None else contextlib.nullcontext(ranks) as group:
        with group.together():
            if not resume and group.first:
                check_new(Path(out))
            source = config.data
            if not isinstance(data, (Clips, ImageData)):
                source = _source_of(data, config)
                data = load_data(config, source=data, strict=strict)
        trainer = MultiGridTrainer(
            None, data, config, out=out, device=device, console=console, quiet=quiet, resume_command=resume_command,
            logger=logger, ranks=group, source=source,
        )  # fmt: skip
        trainer.measure_against(held_out)
        trainer._loop.after_pictures = after_pictures
        if resume:
            trainer.resume()
        return trainer.fit()


def _source_of(data: Any, config: TrainConfig) -> str:
    """What `config.data` has to say of `data`; unchanged where they are None, or have the name that it ends in."""
    if data is None:
        return config.data
    if isinstance(data, (str, Path)):
        return str(data)
    name = data.name if isinstance(data, (Clips, ImageData)) else type(data).__name__
    return config.data if Path(config.data).name == name else name


def _parted(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The configuration with its batches in as many parts as there are ranks, where it does not say how many."""
    parts = config.batch_parts if config.batch_parts > 1 else ranks.size
    if parts % ranks.size:
        raise ConfigError(f"torchrun: the number of ranks must divide batch_parts, {parts}, got {ranks.size}")
    if config.batch_size % parts:
        raise ConfigError(f"torchrun: the number of ranks must divide batch_size, {config.batch_size}, got {parts}")
    return merge(config, {"batch_parts": parts})


def _spread(count: int) -> Tensor:
    """Places of the colours that are kept of so many images: all, or evenly spread ones."""
    return torch.arange(min(count, _COLOURS_KEPT)) * count // min(count, _COLOURS_KEPT)


def _images(data: Any, config: TrainConfig, own: TrainConfig) -> ImageData | Clips:
    """`data` as what the method learns from; `own` is the configuration as the method reads it."""
    if data is None:
        data = load_data(config)
    elif not isinstance(data, (Clips, ImageData)):
        data = load_data(config, source=data, split="train" if isinstance(data, (str, Path)) else "all")
    if isinstance(data, Clips) != (METHODS[config.method].takes == "clips"):
        kind = "clips of a recording" if isinstance(data, Clips) else "images"
        raise ValueError(f"MultiGridTrainer: data must be what the method {config.method!r} takes, got {kind}")
    if isinstance(data, Clips) and data.shape != tuple(config.options.size):
        raise ValueError(f"MultiGridTrainer: clips must be of size {list(config.options.size)}, got {list(data.shape)}")
    if len(data) == 0:
        raise ValueError("MultiGridTrainer: data must hold at least one image, got none")
    if data.size != own.sizes[-1] or data.channels != own.channels:
        raise ValueError(
            f"MultiGridTrainer: data must be {own.channels} x {own.sizes[-1]} x {own.sizes[-1]}, as the "
            f"model's finest grid, got {data.channels} x {data.size} x {data.size}"
        )
    return data
