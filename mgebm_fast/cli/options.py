"""What several commands share: options, the device, threads, and reading a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BackendError, DataError, Refused

if TYPE_CHECKING:
    import torch

    from ..data import Clips, ImageData
    from ..learning import TrainConfig
    from ..learning.run.distributed import Ranks
    from ..models import Model

INTERRUPTED = 130  # the exit code of a command that Ctrl-C ended

MOST_SAMPLES = 10_000_000  # of one command, which draws them in days or keeps them in memory
MOST_SEED = 2**64 - 1
MOST_STEPS = 1_000_000  # of one chain, as in a configuration
MOST_RUNS = 100  # side by side, in one table or page
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))  # many more than cores end in a crash of OpenMP

RunPath = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run folder, a checkpoint folder, a model file, or the name of a shipped model (`mgebm models`).",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:N; auto takes CUDA where torch finds it.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Precision = Annotated[str, typer.Option(help="Precision of the gradient: auto, fp32, bf16 or fp16.")]
Steps = Annotated[
    str | None,
    typer.Option(
        metavar="N[,N…]",
        help="Steps of every grid's chain, or of each, coarse to fine: 10,10,50. Default: the model's own for samples.",
    ),
]
Cycles = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE[,SIZE…]|none",
        help="V-cycles of a sample: its block means at SIZE start finer chains once more. Default: the model's own.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_THREADS,
        help="CPU threads. Default: as many as torch chooses; train takes fewer for small nets.",
    ),
]


def at_most(most: int, count: int, name: str, what: str) -> None:
    """ValueError where more is asked for than one command takes."""
    if count > most:
        raise ValueError(f"{name}: must be at most {most:,} {what}, got {count:,}")


def print_json(value: Any) -> None:
    """Print one line of JSON on stdout."""
    typer.echo(json.dumps(value, allow_nan=False, ensure_ascii=False))


def open_model(run: Path, device: str, command: str) -> tuple[Model, TrainConfig | None]:
    """The model of a run, which must be one of images, and its configuration; None for a model file alone."""
    from ..models import Model

    file, config = open_run(run)
    model = Model.load(file, device=find_device(device))
    check_images(model, run, command)
    return model, config


def take_chains(model: Model, steps: str | None, cycles: str | None, run: Path) -> None:
    """Give a model's samples the chains of `--steps` and `--cycles`; ValueError where that cannot be."""
    from ..models import EnergyModel, MultiGrid

    if cycles is not None:
        if not isinstance(model, MultiGrid):
            raise ValueError(f"--cycles: must be left out for {run}, a {type(model).__name__} without grids")
        words = [] if cycles == "none" else cycles.split(",")
        wanted: list[Any] = [int(word) if re.fullmatch(r"\s*[0-9]{1,5}\s*", word) else word for word in words]
        try:
            model.cycles = wanted
        except Refused as error:
            raise ValueError(f"--cycles: must {error.must}, got {cycles!r}") from None
    if steps is None:
        return
    if not isinstance(model, EnergyModel):
        raise ValueError(f"--steps: must be left out for {run}, a {type(model).__name__} without chains of images")
    chains, words = len(model.active_nets), steps.split(",")
    each = [int(word) for word in words if re.fullmatch(r"\s*[0-9]{1,7}\s*", word)]
    if len(words) not in (1, chains) or len(each) < len(words) or not all(1 <= own <= MOST_STEPS for own in each):
        listed = f", or {chains} of them with commas, one a grid" if chains > 1 else ""
        raise ValueError(f"--steps: must be a whole number from 1 to {MOST_STEPS:,}{listed}, got {steps!r}")
    model.sample_steps = each[0] if len(each) == 1 else tuple(each)


def use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def find_device(name: str) -> torch.device:
    """The device that `--device` means; BackendError where this machine has none of it."""
    from ..learning.run import stored_run

    try:
        return stored_run.find_device(name)
    except Refused as error:
        raise error.named("--device") from None
    except BackendError as error:
        raise BackendError(f"--{error}") from None


def find_rank_device(name: str) -> torch.device:
    """`find_device`, and for a rank that torchrun started the GPU of its place on the host."""
    from ..learning.run import distributed

    if not distributed.launched():
        return find_device(name)
    try:
        return distributed.local_device(name)
    except ValueError:  # a wrong name, the same on every rank: rank 0 reports it
        if os.environ["RANK"] == "0":
            raise
        raise typer.Exit(2) from None


@contextlib.contextmanager
def one_voice(ranks: Ranks) -> Iterator[None]:
    """Inside, rank 0 alone prints; another rank prints only an error that rank 0 does not report."""
    if ranks.first:
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    except Exception as error:
        if ranks.failed:
            raise typer.Exit(1) from error
        raise
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def open_run(path: Path) -> tuple[Path, TrainConfig | None]:
    """What holds the model, and its configuration, None for a model file alone; `Found.caveat` goes to stderr."""
    from ..learning.run import stored_run

    file, run, caveat = stored_run.find(path)
    if caveat:
        typer.echo(caveat, err=True)
    return file, None if run is None else run.config


@contextlib.contextmanager
def named_options(*names: str, data: str = "--data") -> Iterator[None]:
    """Inside, an error of the data, or of an argument in `names`, is raised as one of the command's option."""
    try:
        yield
    except DataError as error:
        if error.where not in ("load", "data"):
            raise
        raise error.at(data) from error
    except Refused as error:
        if error.name not in names:
            raise
        raise error.named(f"--{error.name}") from error


def load_images(
    source: str,
    size: int,
    channels: int,
    classes: Sequence[str] = (),
    *,
    split: str,
    strict: bool = False,
    most: int | None = None,
    seed: int = 0,
    like: dict[str, Any] | None = None,
) -> ImageData:
    """Images of a source, with those that could not be read listed on stderr.

    `like`, the fingerprint of a run's data: images are divided as they were then; what differs is reported with the
    training part."""
    from ..data import builtin, load
    from ..data.fingerprint import difference

    source = builtin.explicit(source)  # `lasting` has checked that no path has this name
    with named_options(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*: skipped \d+ of \d+ images")  # listed below
        data = load(
            source, size=size, channels=channels, classes=list(classes) or None, split=split, strict=strict, most=most,
            seed=seed, like=like,
        )  # fmt: skip
    if like and split == "train" and most is None and (differs := difference(like, data.fingerprint())):
        typer.echo(f"{data.name}: not what the run learnt from: {differs}", err=True)
    report_skipped(data.name, data.skipped, len(data))
    return data


def images_of(
    run: Path, model: Model, config: TrainConfig | None, data: str | None = None
) -> functools.partial[ImageData]:
    """`load_images` of what a run learnt from, or of `--data`, at the model's size: only the split is left to say.

    The source of the run itself is divided as it was then, wherever it lies now. The run's classes are taken of it, and
    of another source where that has them; else all of that, but for class-conditional models, which know no others.
    """
    from ..learning.run import stored_run

    source, classes = lasting(data) if data else (config.data if config else ""), config.classes if config else ()
    if not source:
        raise ValueError(f"--data: must be given, {run} is no run folder and does not say what it was trained on")
    if not data:
        stored_run.check_there(source, run)
    size, channels = model.sizes[-1], model.channels
    like = fingerprint_of(run, source, config)
    needed = like or is_own(source, config) or bool(getattr(model, "classes", ()))
    if classes and not needed and not _has_classes(source, size, channels, classes):
        typer.echo(f"{source}: all its images, it has not the classes of the run ({', '.join(classes)})", err=True)
        classes = ()
    return functools.partial(load_images, source, size, channels, tuple(classes), like=like)


def _has_classes(source: str, size: int, channels: int, classes: Sequence[str]) -> bool:
    from ..data import builtin, load

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load(builtin.explicit(source), size=size, channels=channels, classes=list(classes), split="all", most=1)
        except DataError:
            return False
    return True


def load_run_data(config: TrainConfig, *, split: str, strict: bool = False) -> ImageData | Clips:
    """What a configuration learns from, with images that could not be read listed on stderr."""
    from ..learning import load_data

    with named_options(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*: skipped \d+ of \d+ images")
        data = load_data(config, split=split, strict=strict)
    report_skipped(data.name, data.skipped, len(data))
    return data


def check_images(model: Model, run: Path, command: str) -> None:
    """ValueError where a command that works on images is asked of a model of videos or of sounds."""
    from ..models import SpatialTemporal

    if isinstance(model, SpatialTemporal):
        kind = "videos" if model.is_video else "sounds"
        raise ValueError(f"run: must hold a model of images for `mgebm {command}`, got {run}, a model of {kind}")


def report_skipped(name: str, skipped: tuple[tuple[str, str], ...], kept: int, most: int = 10) -> None:
    if not skipped:
        return
    typer.echo(f"{name}: {len(skipped)} of {kept + len(skipped)} images skipped:", err=True)
    for path, reason in skipped[:most]:
        typer.echo(f"  {path}: {reason}", err=True)
    if len(skipped) > most:
        typer.echo(f"  … and {len(skipped) - most} more", err=True)


def configured(config: TrainConfig, data: str | None, settings: Sequence[str], made: int | None = None) -> TrainConfig:
    """`config` as --data and --set change it; paths are absolute, so that the run goes on from any folder. What a
    preset or a TOML file names is checked as --data is; not so the data of a run that goes on, after `made` updates."""
    from ..learning import apply_overrides, merge

    before = config
    if data is not None:
        config = dataclasses.replace(config, data=data)
    config = apply_overrides(config, settings)
    if made is not None:
        config = config.paced_as(before, made, {setting.partition("=")[0].strip() for setting in settings})
    changed = data is not None or config.data != before.data
    if changed or made is None:
        option = "--data" if changed else f"data of {config.name!r}"
        config = dataclasses.replace(config, data=lasting(config.data, option))
    if config.method == "frame" and config.options.filters != "gabor":
        config = merge(config, {"frame": {"filters": _absolute(config.options.filters)}})
    return config


def is_own(source: str, config: TrainConfig | None) -> bool:
    """Whether `source` is where a run's own images are."""
    return config is not None and os.path.abspath(source) == os.path.abspath(config.data)


def fingerprint_of(run: Path, source: str, config: TrainConfig | None) -> dict[str, Any] | None:
    """What a run says of the data that it learnt from, where they, or most of them, are at `source`."""
    from ..data import builtin
    from ..data.fingerprint import same_set
    from ..learning.run import stored_run

    found = None if config is None else stored_run.find(run).run
    like = None if found is None else found.fingerprint()
    if found is None or like is None or is_own(source, config):
        return like
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            here = found.data(source=builtin.explicit(source)).fingerprint()
        except (DataError, OSError, ImportError):
            return None
    return like if same_set(like, here) else None


def lasting(data: str, option: str = "--data") -> str:
    """A path as an absolute one, so that the run finds its data again from any folder; built-in names as they are."""
    from ..data import builtin

    if not builtin.is_builtin(data):
        return _absolute(data)
    with named_options(data=option):
        builtin.check_not_both(data)
    return data.removeprefix(builtin.BUILT_IN_PREFIX)


def _absolute(path: str) -> str:
    """The absolute path of what exists; other words unchanged."""
    from ..data.foreign import expand

    with named_options():
        absolute = expand(path)
    return str(absolute.resolve()) if absolute.exists() else path
