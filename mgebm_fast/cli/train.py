"""`mgebm train`: from a preset or a configuration to a run folder."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError, ConfigError, DivergenceError
from .options import (
    INTERRUPTED,
    MOST_SEED,
    Device,
    Threads,
    configured,
    find_rank_device,
    load_run_data,
    one_voice,
    open_run,
    use_threads,
)
from .outputs import check_place

if TYPE_CHECKING:
    import torch

    from ..data import Clips, ImageData
    from ..learning import Outcome, TrainConfig
    from ..learning.run.distributed import Ranks


def train(
    config: Annotated[
        str | None,
        typer.Argument(metavar="PRESET|CONFIG", help="A preset (`mgebm presets` lists them) or a TOML file."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="A built-in set (digits, lfw, texture:brick, photos), torchvision:NAME, a folder, zip or tar of "
            "images, an .npy or .npz file; for spatial-temporal a video, a folder of frames or a wav file. Default: "
            "what the preset names.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run folder, new or empty. Default: runs/ and the name.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the configuration; may be repeated."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="RUN", help="Start from the weights of a run, a checkpoint or a model file."),
    ] = None,
    with_optimiser: Annotated[
        bool, typer.Option("--from-optimiser", help="Beside --from: take the optimiser's state as well.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse data with unreadable images.")] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write report.html in the run folder whenever pictures are drawn.")
    ] = False,
    logger: Annotated[
        str, typer.Option(metavar="NAME", help="Where records go beside metrics.jsonl: tensorboard, wandb or trackio.")
    ] = "tensorboard",
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MOST_SEED, help="Seed of weights, batches and noise; else as configured."),
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    precision: Annotated[str | None, typer.Option(help="Precision of gradients: auto, fp32, bf16 or fp16.")] = None,
) -> None:
    """Train a model, and leave a run folder that can be sampled, evaluated and resumed.

    \b
    Examples:
      mgebm train digits --out runs/digits
      mgebm train cifar10 --data cifar10.zip --set classes=automobile --set sizes=1,2,4,8,16
      mgebm train digits --seed 1 --set steps=200 --set langevin.steps=10
      mgebm train my_config.toml --data photos/ --out runs/mine
      mgebm train --out runs/mine --resume
      mgebm train cifar10 --set rollback.attempts=0
      mgebm train digits --report --logger trackio
      mgebm train --from runs/digits --data letters.npy --set optimiser.lr=1e-3 --out runs/letters
      mgebm train cifar10 --from runs/cars --set sizes=1,2,4,8,16,32 --out runs/finer

    --set takes TOML values: steps=2000, sizes=[1,4,16], flips=true, langevin.noise_std=0.02,
    'langevin.noise_std={start=0.1, end=0.01}' over a chain's steps; `none` clears an optional key. Keys of every
    preset: steps (parameter updates), langevin.steps, batch_size, checkpoint_every, sample_every, width, sizes.
    docs/configuration.md has them all.

    Ctrl-C saves a checkpoint and says how to go on, and so do SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGXCPU; --resume
    then gives, bit for bit, the run that was never stopped. With --resume the configuration is the run's own; only what
    --set, --seed, --data and --precision name is changed. With --set steps=... a run that is over goes on: nets join
    where they did; learning rates, noise and nets that are to join are those of a run of the new length.

    --from starts from what was trained before, on other data, or with a finer size on top: each size takes the net of
    its size there, and what was taken and what is new is printed. A net of that size with other layers, other channels
    or another value_range is refused. Without PRESET the configuration is that run's, but for --set and --data.

    A run that diverges or collapses goes back to its last good checkpoint, up to rollback.attempts times, and on from
    there with other noise, half the learning rate and more data noise. After that it stops with advice and an exit code
    that is not 0; model.safetensors is then the best state from before. docs/configuration.md says what counts.

    --report keeps a page on the run up to date, report.html in its folder: samples, curves, configuration, as of
    `mgebm report`. --logger sends the records to wandb or trackio, where installed, in place of TensorBoard's files.

    Several processes or GPUs train together under torchrun, each on its part of every batch:
    torchrun --nproc-per-node 2 -m mgebm_fast train digits --out runs/digits

    \b
    What is printed beside the rate:
      energy gap +0.001 +0.010   for each size but the first, coarse to fine: mean energy of the data at that size minus
                                 that of the samples of its chains. Near 0 the net cannot tell them apart, which is
                                 where learning goes; far from 0, and growing, it diverges.

    \b
    In the run folder:
      config.toml                  the whole configuration
      metrics.jsonl, tensorboard/  one line, one point every log_every updates
      samples/                     pictures of every grid beside the data
      checkpoints/                 safetensors and JSON, written atomically; best: nearest to held-out images
      model.safetensors            the trained model
      model.json                   its length and checksum
      collapse.json                only after a collapse: the model is the best from before it
      data.json                    names and checksums of the images that it learnt from
    """
    from ..data.builtin import BUILT_IN_PREFIX
    from ..learning.run import checkpoint, distributed
    from ..learning.run.folder import CHECKPOINTS
    from ..learning.run.heap import keep_freed_memory
    from ..learning.run.stored_run import SHIPPED, check_there, located

    keep_freed_memory()
    use_threads(threads)
    place = find_rank_device(device)
    with distributed.joined(place) as ranks, one_voice(ranks):
        with ranks.together():
            chosen, folder = _configure(config, out, resume, start)
            named = {"seed": seed, "precision": precision}
            changes = [*(settings or []), *(f"{key}={value}" for key, value in named.items() if value is not None)]
            made = None
            if resume and (folder / "config.toml").exists():
                made = max(map(checkpoint.step_of, checkpoint.listed(folder / CHECKPOINTS)), default=0)
            if start is not None:
                found = located(start)
                source = BUILT_IN_PREFIX + found.name if found.parent == SHIPPED else os.path.abspath(start)
                chosen = dataclasses.replace(chosen, start_from=source, start_optimiser=with_optimiser)
            elif with_optimiser:
                raise ConfigError("--from-optimiser: must be beside --from RUN")
            chosen = configured(chosen, data, changes, made=made)
            if made is not None and data is None:
                check_there(chosen.data, folder)
        options: dict[str, Any] = {"resume": resume, "strict": strict, "logger": logger}
        if report:
            options["after_pictures"] = lambda: _write_report(folder)
        extra = [*(["--report"] if report else []), *([] if logger == "tensorboard" else ["--logger", logger])]
        options["resume_command"] = shlex.join([*_how_to_resume(folder, device, threads, ranks), *extra])
        outcome = _fit(chosen, folder, place, ranks, options, adjust=threads is None and place.type == "cpu")
        if outcome.finished and ranks.first:
            typer.echo(_what_next(folder, chosen), err=True)
    if not outcome.finished:
        raise typer.Exit(INTERRUPTED)


def _fit(
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    ranks: Ranks,
    options: Mapping[str, Any],
    *,
    adjust: bool,  # the number of threads to the nets
) -> Outcome:
    from rich.console import Console

    from ..learning import build_model, check_new
    from ..learning import train as fit
    from ..learning.given_model import with_classes
    from ..learning.methods.work import threads_for
    from ..learning.run import loggers

    resume, strict = options["resume"], options["strict"]
    with ranks.together():
        if ranks.first:
            loggers.logger(options["logger"])  # a package that is missing is reported before anything is written
            if not resume:
                check_new(folder)
            check_place(folder, folder=True)
    with ranks.together():
        data = load_run_data(config, split="train", strict=strict)
        held_out = None
        if config.method != "spatial-temporal":  # a recording has no held-out part
            # The held-out part is not trained on, but its bad images are reported, or refused, now and not after hours.
            held_out = load_run_data(config, split="held_out", strict=strict)
        if adjust:  # to the nets with their label planes, as the stored configuration of a resumed run has them
            use_threads(threads_for(build_model(with_classes(config, data)), config.batch_size))
    hardware = f"{_named(device)}{f', {ranks.size} ranks' if ranks.size > 1 else ''}"
    typer.echo(f"{config.name}: {_described(data, config)}, on {hardware}", err=True)
    console = Console(stderr=True)
    try:
        return fit(
            config, out=folder, data=data, device=device, console=console, ranks=ranks, held_out=held_out, **options
        )
    except CheckpointError as error:
        raise (error.at("--from") if error.where == "from" else error) from None


def _write_report(folder: Path) -> None:
    """The page of `mgebm report`, atomically; training goes on where there can be none, as of samples of the moment
    that are not finite."""
    from ..evaluation.page import page
    from ..files import write_inside
    from ..learning import Run

    try:
        write_inside(folder / "report.html", page([Run(folder)]).encode())
    except (DivergenceError, OSError, ValueError) as error:
        typer.echo(f"no report: {error}", err=True)


def _what_next(folder: Path, config: TrainConfig) -> str:
    """What one would do with a finished run."""
    run = shlex.quote(str(folder))
    if config.method != "spatial-temporal":
        return f"next: mgebm sample {run} --num 64 --out samples.png\n      mgebm evaluate {run}"
    return f"next: mgebm sample {run} --out sample.{'gif' if len(config.options.size) == 3 else 'wav'}"


def _described(data: ImageData | Clips, config: TrainConfig) -> str:
    from ..data import ImageData

    if isinstance(data, ImageData):
        return f"{len(data)} images of {data.name}, sizes {'→'.join(str(size) for size in config.sizes)}"
    clips = "one clip" if len(data) == 1 else f"{len(data)} clips"
    unit = "frames" if data.is_video else "samples"
    return f"{clips} of {data.name}, {'×'.join(map(str, data.shape))}, {data.rate:g} {unit} a second"


def _named(device: torch.device) -> str:
    import torch

    count = torch.get_num_threads()
    return (
        f"{count} CPU thread{'s' if count > 1 else ''}" if device.type == "cpu" else torch.cuda.get_device_name(device)
    )


def _configure(config: str | None, out: Path | None, resume: bool, start: str | None) -> tuple[TrainConfig, Path]:
    """The configuration before overrides, and the run folder."""
    from ..learning import load_config
    from ..learning.run.folder import check_inside, run_with

    if start is not None and resume:
        raise ConfigError("--from: must be left out beside --resume, whose run knows where it began")
    given = None if config is None else load_config(config)
    if start is not None and given is None:
        _, given = open_run(Path(start))
        if given is None:
            raise ConfigError(f"preset: must be given where --from is a model file alone, {start}")
        given = dataclasses.replace(given, begin=0.0)  # its nets have learnt: none has to wait
    if given is None and (out is None or not resume):
        raise ConfigError("preset: must be given (`mgebm presets` lists them), or --out DIR with --resume")
    folder = Path(out or "")
    if given is not None and out is None:
        folder = (run_with(Path(str(config))) if resume else None) or Path("runs") / given.name
    if resume and (folder / "config.toml").exists():
        check_inside(folder)
        stored = load_config(folder / "config.toml")
        if given is not None and given.name != stored.name:
            raise ConfigError(f"resume: {folder} is a run of {stored.name!r}, got {given.name!r}")
        return stored, folder
    if given is None:
        raise ConfigError(
            f"resume: must be the folder of a run, got {folder}, which has no config.toml; with a preset, a run that "
            "was killed before it had one starts from the beginning"
        )
    return given, folder


def _how_to_resume(folder: Path, device: str, threads: int | None, ranks: Ranks) -> list[str]:
    command = ["mgebm"]
    if ranks.size > 1:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
        hosts = [] if here == ranks.size else ["--nnodes", str(ranks.size // here)]
        command = ["torchrun", *hosts, "--nproc-per-node", str(here), "-m", "mgebm_fast"]
    command += ["train", "--out", str(folder), "--resume"]
    command += [] if device == "auto" else ["--device", device]
    command += [] if threads is None else ["--threads", str(threads)]
    return command
