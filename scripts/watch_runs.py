"""Small runs that show what the watch of collapse stops and what it leaves alone: the tables of docs/configuration.md.

    python scripts/watch_runs.py --out runs/watch                all: an hour or two on one core
    python scripts/watch_runs.py planted --out runs/watch        those that must be stopped
    python scripts/watch_runs.py --only digits --only rate --out runs/watch

Each case is one or more `mgebm train` commands, run as they stand; those of damaged data spoil batches on their way to
the update, and where it is for ever, those that would stand in for them. A row is printed after each: exit code, times
it went back, what tripped, and of which update the model is.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from torch import Tensor

from mgebm_fast.cli.app import app
from mgebm_fast.learning import Run
from mgebm_fast.learning.run.feed import Batches

SMALL = "--set width=0.25 --set batch_size=16 --set log_every=10 --set checkpoint_every=100"
ST, GC = "spatial-temporal", "generative-convnet"
FEW = "--set steps=300 --set langevin.steps=10"
DIGITS = f"digits --set steps=1200 {SMALL}"
COLOUR = f"cifar10 --set sizes=1,2,4,8 --set steps=1000 {SMALL}"


def constant(batch: Tensor, update: int) -> Tensor:
    """Every image black."""
    return torch.zeros_like(batch)


def other_units(batch: Tensor, update: int) -> Tensor:
    """An eighth of the brightness, as of a file with other units."""
    return batch // 8


def shuffled(batch: Tensor, update: int) -> Tensor:
    """The bytes of the batch in a random order."""
    order = torch.randperm(batch.numel(), generator=torch.Generator().manual_seed(update))
    return batch.flatten()[order].view_as(batch)


def one_nan(batch: Tensor, update: int) -> Tensor:
    """In the model's units, one pixel of one image not a number."""
    found = batch.float() / 127.5 - 1
    found[3, 0, 2, 2] = float("nan")
    return found


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    commands: tuple[str, ...]  # the words after `mgebm train`, without --out
    spoil: Callable[[Tensor, int], Tensor] | None = None
    spoilt: range = range(0)  # the updates whose batches are


HEALTHY = [
    Case("digits", (DIGITS,)),
    Case("cifar10 at 8×8", (COLOUR,)),
    Case("digits-cooperative", (f"digits-cooperative --set steps=1200 {SMALL}",)),
    Case("digits-abp", ("digits-abp --set steps=600 --set batch_size=16 --set log_every=10",)),
    Case("digits-pcd", (f"digits-pcd --set steps=1200 {SMALL}",)),
    Case("digits-cd", (f"digits-cd --set steps=3000 {SMALL}",)),
    Case("digits-short-run", (f"digits-short-run --set steps=600 {SMALL}",)),
    Case("digits-single-grid", (f"digits-single-grid --set steps=500 {SMALL}",)),
    Case(
        "chimes", (f"chimes {FEW} --set spatial-temporal.size=4096 --set spatial-temporal.layers=[[16,65,8],[16,9,4]]",)
    ),
    Case(
        "fire", (f"fire {FEW} --set spatial-temporal.size=8,16,16 --set spatial-temporal.layers=[[12,5,2],[24,3,2]]",)
    ),
    Case("texture", (f"texture {FEW} --set sizes=1,24 --set generative-convnet.layers=[[12,7,2],[16,5,2],[16,3,1]]",)),
    Case("object", (f"object {FEW} --set generative-convnet.layers=[[8,3,1],[16,3,2],[32,3,2]]",)),
    Case("frame", (f"frame {FEW} --set sizes=1,24 --set frame.orientations=4 --set frame.scales=2.0",)),
    Case("faces-abp", ("faces-abp --set steps=300 --set batch_size=12",)),
    Case("texture-abp", ("texture-abp --set steps=300 --set sizes=1,24 --set batch_size=8 --set abp.infer_steps=6",)),
]
FOREVER = range(400, 10**9)
PLANTED = [
    Case("rate ×10", (f"{DIGITS} --set optimiser.lr=4e-2",)),
    Case("rate ×10, colour", (f"{COLOUR} --set optimiser.lr=2e-2",)),
    Case("rate ×30 after 300", (f"{DIGITS} --set steps=300", "--resume --set steps=1200 --set optimiser.lr=0.12")),
    Case("energy L2 off", (f"{COLOUR} --set stabilise.energy_l2=0",)),
    Case("energy L2 off, rate ×10", (f"{COLOUR} --set stabilise.energy_l2=0 --set optimiser.lr=2e-2",)),
    Case("data noise 0", (f"{COLOUR} --set stabilise.data_noise=0",)),
    Case("data noise 0, rate ×4", (f"{COLOUR} --set stabilise.data_noise=0 --set optimiser.lr=8e-3",)),
    Case("black batches", (DIGITS,), constant, FOREVER),
    Case("one black batch", (f"{DIGITS} --set steps=600",), constant, range(400, 401)),
    Case("other units", (DIGITS,), other_units, FOREVER),
    Case("shuffled bytes", (DIGITS,), shuffled, FOREVER),
    Case("20 shuffled batches", (f"{DIGITS} --set steps=600",), shuffled, range(400, 420)),
    Case("a NaN image", (DIGITS,), one_nan, FOREVER),
]


def run(case: Case, out: Path) -> tuple[int, str]:
    """The exit code of the last command, and what it wrote to stderr."""
    read, code, words = Batches.batch, 0, StringIO()

    def batch(self: Batches, iteration: int, other: int = 0) -> Tensor:
        found = read(self, iteration, other)
        spoilt = iteration in case.spoilt and (other == 0 or case.spoilt is FOREVER)
        return case.spoil(found, iteration) if case.spoil and spoilt else found

    Batches.batch = batch  # type: ignore[method-assign]
    try:
        for command in case.commands:
            words = StringIO()
            with redirect_stderr(words):
                try:
                    app(["train", *shlex.split(command), "--out", str(out), "--threads", "1"])
                except SystemExit as ended:
                    code = int(ended.code or 0)
    finally:
        Batches.batch = read  # type: ignore[method-assign]
    return code, words.getvalue()


def row(case: Case, out: Path) -> str:
    began = time.monotonic()
    code, words = run(case, out)
    lines = [line for line in words.splitlines() if "updates/s" not in line]
    trips = [line for line in lines if "rollback " in line or line.startswith("error:")]
    (out.parent / f"{out.name}.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    updates = [int(number) for line in trips[:1] for number in re.findall(r"update (\d+)", line)[:1]]
    which = sorted(
        {w for line in trips for w in re.findall(r"(?:watch|rollback)\.(?!attempts|lr)\w+|finite|unlike", line)}
    )
    if not (out / "config.toml").exists():
        return f"| {case.name} | {code}: {lines[-1]} |"
    opened = Run(out)
    model = re.findall(r"that of update (\d+)", opened.collapse) or [str(opened.config.steps)]
    back = sum("rollback " in line for line in lines)
    first = str(updates[0]) if updates else "–"
    seconds = time.monotonic() - began
    return f"| {case.name} | {code} | {back} | {first} | {', '.join(which) or '–'} | {model[0]} | {seconds:.0f} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("which", nargs="?", choices=["all", "healthy", "planted"], default="all")
    options.add_argument("--out", type=Path, required=True, help="folder of the runs")
    options.add_argument("--only", action="append", default=[], help="cases whose name begins so")
    given = options.parse_args()
    cases = {"healthy": HEALTHY, "planted": PLANTED, "all": HEALTHY + PLANTED}[given.which]
    cases = [case for case in cases if not given.only or case.name.startswith(tuple(given.only))]
    given.out.mkdir(parents=True, exist_ok=True)
    print("| run | exit code | went back | first at update | by | model of update | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for case in cases:
        name = re.sub(r"[^a-z0-9]+", "-", case.name.replace("×", "x").lower()).strip("-")
        print(row(case, given.out / name), flush=True)


if __name__ == "__main__":
    sys.exit(main())
