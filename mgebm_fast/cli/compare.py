"""`mgebm compare`: presets × seeds trained, measured alike, and set in one table."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    INTERRUPTED,
    MOST_SAMPLES,
    MOST_SEED,
    Device,
    Json,
    Threads,
    at_most,
    configured,
    find_device,
    load_run_data,
    print_json,
    use_threads,
)
from .outputs import check_place

if TYPE_CHECKING:
    import torch

    from ..evaluation.comparison.runs import Entry
    from ..learning import TrainConfig

_LOG_WIDTH = 140
MOST_ENTRIES = 1000  # presets × seeds, each of which is trained


def compare(
    presets: Annotated[
        list[str],
        typer.Argument(
            metavar="PRESET",
            help="The preset that others are compared with, and the others. Default: those based on it.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="For runs, figures, tables and pictures; may hold them.")],
    seeds: Annotated[str, typer.Option(metavar="N,N,...", help="Each preset is trained once a seed.")] = "0,1,2",
    data: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="What all learn from, as for `mgebm train`.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key in all of them; may be repeated."),
    ] = None,
    equal_work: Annotated[
        bool,
        typer.Option("--equal-work", help="As many updates of each as make the multiply-accumulates of the first."),
    ] = False,
    num: Annotated[int, typer.Option(min=2, max=MOST_SAMPLES, help="How many samples of a run are measured.")] = 1000,
    picture: Annotated[
        bool | None,
        typer.Option("--picture/--no-picture", help="Draw kid.png. Default: where matplotlib is installed."),
    ] = None,
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Train presets with several seeds, measure every run alike, and set the methods in one table.

    \b
    Examples:
      mgebm compare digits --out runs/compare
      mgebm compare cifar10 cifar10-pcd cifar10-cd --data cifar10.zip --out runs/compare-cifar
      mgebm compare digits digits-pcd --seeds 0 --set steps=200 --out runs/quick
      mgebm compare photos32 mine.toml --data photos/ --equal-work --out runs/mine

    \b
    In the folder:
      PRESET/seed-N/           run folders, as of mgebm train PRESET --seed N
      PRESET/seed-N.json       the figures of that run
      figures.csv              one row a run
      table.csv, table.md      mean and standard deviation over seeds
      samples.png, kid.png     samples of every method under data; KID with seeds as points

    Runs and figures that are there already are used, unfinished runs go on: stop the command and start it again at
    will. The presets of `digits` and `cifar10` make as many multiply-accumulates as their base; the column "work" says
    so, and --equal-work makes it 1 for others. One feature space, one recogniser and the same occlusions judge all
    runs. docs/results/comparison.md says what the columns are.
    """
    numbers = _seeds(seeds)
    _check_out(out)
    drawn = importlib.util.find_spec("matplotlib") is not None
    if picture and not drawn:
        raise ModuleNotFoundError('--picture: must have matplotlib: pip install "mgebm_fast[plot]"')
    use_threads(threads)
    import torch
    from rich.console import Console

    from ..data import ImageData
    from ..evaluation.comparison import compare as comparison
    from ..evaluation.comparison import runs as comparison_runs
    from ..evaluation.comparison import table
    from ..learning import build_model, with_work_of
    from ..learning.given_model import with_classes
    from ..learning.methods.work import threads_for
    from ..learning.run.heap import keep_freed_memory

    keep_freed_memory()

    place = find_device(device)
    names = presets if len(presets) > 1 else [*presets, *comparison_runs.contenders(presets[0])]
    at_most(MOST_ENTRIES, len(names) * len(numbers), "--seeds", "runs of presets")
    configs = [_configured(name, data, settings) for name in names]
    comparison_runs.check_alike(configs)
    training, held_out = (load_run_data(configs[0], split=split) for split in ("train", "held_out"))
    assert isinstance(training, ImageData) and isinstance(held_out, ImageData)  # `check_alike` refuses other methods
    configs = [with_classes(config, training) for config in configs]
    if equal_work:
        configs = [with_work_of(configs[0], config) for config in configs]
    runs = comparison_runs.entries(configs, numbers, out)
    console = Console(stderr=True)
    usual = torch.get_num_threads()

    def adjust(config: TrainConfig | None) -> None:
        if threads is None and place.type == "cpu":
            torch.set_num_threads(usual if config is None else threads_for(build_model(config), config.batch_size))

    again = _again([*presets, "--equal-work"] if equal_work else presets, {
        "--out": out, "--seeds": seeds, "--num": num, "--data": data, "--set": settings, "--device": device,
        "--threads": threads,
    }, picture)  # fmt: skip
    try:
        records = comparison.compare(
            runs, training, held_out, comparison.Settings(num=num), device=place, console=console, threads=adjust,
            say=lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
            resume_command=again,
        )  # fmt: skip
    except comparison.Interrupted:
        raise typer.Exit(INTERRUPTED) from None
    except KeyboardInterrupt:  # while figures are measured, which no checkpoint holds
        typer.echo(f"interrupted; runs and figures that are finished stay, to go on:\n  {again}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    rows = table.tabulate(records)
    _write(out, rows, records)
    if any("figures" in record for record in records):
        _draw(out, runs, records, held_out if len(held_out) else training, place, picture is not False and drawn)
    if json:
        result = {"presets": names, "seeds": numbers, "runs": records, "table": rows, "real": table.baselines(records)}
        print_json(result)
        return
    shown = Console()
    (shown if shown.is_terminal else Console(width=_LOG_WIDTH)).print(table.console_tables(rows, records))


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or max(numbers) > MOST_SEED or len(set(numbers)) < len(numbers):
        raise ValueError(f"--seeds: must be different whole numbers >= 0 and < 2**64 with commas between, got {text!r}")
    return numbers


def _check_out(out: Path) -> None:
    """ValueError before anything is trained, where `out` holds something other than a comparison."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: must be a folder, got the file {out}")
    wanted = f"--out: must be new, empty or a comparison's folder, got {out}, which holds"
    if any((out / name).exists() for name in ("config.toml", "state.json", "checkpoints", "model.safetensors")):
        raise ValueError(f"{wanted} a run")
    ours = (out / "figures.csv").is_file() or any(
        re.fullmatch(r"seed-\d+", path.name) and path.is_dir() for path in out.glob("*/seed-*")
    )
    # a comparison that was stopped at its beginning may have left folders, but no file
    other = None if ours else next((path for path in out.rglob("*") if not path.is_dir()), None)
    if other is not None:
        raise ValueError(f"{wanted} {other.relative_to(out)}")
    check_place(out, folder=True)


def _configured(name: str, data: str | None, settings: Sequence[str] | None) -> TrainConfig:
    """What `mgebm train NAME --data DATA --set …` trains."""
    from ..errors import ConfigError
    from ..learning import load_config

    if any(setting.partition("=")[0].strip() == "seed" for setting in settings or ()):
        raise ConfigError("--set: seed is what --seeds is for, got it as a key")
    return configured(load_config(name), data, settings or ())


def _write(out: Path, rows: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    from ..evaluation.comparison import table
    from ..files import write_bytes

    texts = {
        "figures.csv": table.figures_csv(records),
        "table.csv": table.table_csv(rows),
        "table.md": table.markdown(rows, records),
    }
    for name, text in texts.items():
        write_bytes(out / name, text.encode())
    typer.echo(f"{out}: {', '.join(texts)}", err=True)


def _draw(
    out: Path, runs: list[Entry], records: list[dict[str, Any]], data: Any, device: torch.device, plot: bool
) -> None:
    """samples.png of the first run of each preset that has figures, and kid.png."""
    from ..evaluation.comparison import compare as comparison
    from ..evaluation.comparison import pictures as comparison_pictures
    from ..files import write_bytes
    from ..pictures import save_png

    shown: dict[str, Any] = {}
    n = min(comparison_pictures.SHOWN, len(data), next(record["num"] for record in records if "num" in record))
    for run, record in zip(runs, records, strict=True):
        if run.preset not in shown and "figures" in record:
            shown[run.preset] = comparison.samples_of(run, n, comparison.Settings().seed, device)
    spread = [i * len(data) // n for i in range(n)]
    save_png(out / "samples.png", comparison_pictures.samples_picture(data.batch(spread), list(shown.items())))
    names = ["samples.png"]
    if plot:
        write_bytes(out / "kid.png", comparison_pictures.kid_plot(records))
        names.append("kid.png")
    typer.echo(f"{out}: {', '.join(names)}", err=True)


def _again(presets: Sequence[str], options: Mapping[str, Any], picture: bool | None) -> str:
    """The command line that goes on with a comparison that was stopped; options that are None or auto are left out."""
    words = ["mgebm", "compare", *presets]
    for option, value in options.items():
        for each in value if isinstance(value, list) else [value]:
            words += [] if each in (None, "auto") else [option, str(each)]
    return shlex.join(words + ([] if picture is None else ["--picture" if picture else "--no-picture"]))
