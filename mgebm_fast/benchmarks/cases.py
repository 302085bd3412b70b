"""What is measured: chains of the published nets, the cascade, and training iterations, sized for a CPU or a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..checks import one_of
from ..learning import TrainConfig, apply_overrides, load_preset

LADDER = (1, 4, 16, 64)
TINY_WIDTH, TINY_BATCH, TINY_STEPS = 0.25, 8, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A chain of one net (`sizes` of one entry) or a cascade, or the training iteration of a preset.

    Of "peers": an energy that other packages take too, a residual net at the size in `sizes`, or one of points.
    `steps` are Langevin steps a grid in one timing; of a preset that is trained as it is, they are its own (0 here).
    """

    table: str  # "chains", "training" or "peers"
    name: str
    batch: int
    steps: int = 0
    sizes: tuple[int, ...] = ()
    norm: str = "batch"
    variant: str = "B"  # of `multigrid_net`; "B": the published nets
    width: float = 1.0
    preset: str = ""
    settings: tuple[str, ...] = ()
    updates: int = 1  # parameter updates in one timing
    full: bool = False  # measured with `full` only

    def config(self) -> TrainConfig:
        """The configuration of a training case."""
        changes = [*self.settings, f"batch_size={self.batch}", f"width={self.width}"]
        changes += [f"langevin.steps={self.steps}"] if self.steps else []
        return apply_overrides(load_preset(self.preset), changes)

    def tiny(self) -> Case:
        """The same case at a size that shows that it runs, and nothing else."""
        return dataclasses.replace(self, width=TINY_WIDTH, batch=TINY_BATCH, steps=TINY_STEPS, updates=1)


def _chain(name: str, size: int, batch: int, steps: int, **more) -> Case:
    return Case("chains", name, batch, steps, (size,), **more)


def _small(variant: str, size: int, steps: int, full: bool = False) -> Case:
    """A chain of a net without batch statistics, one sample for each processor of an H100."""
    return _chain(f"{variant}-{size}", size, 132, steps, norm="none", variant=variant, full=full)


# The released chain with the noise and the reference of the paper, so that no part of the update is left out.
_NOISY = ("langevin.noise_scale=1.0", "langevin.reference_std=50.0")


def _peers(full: bool) -> list[Case]:
    return [
        Case("peers", "toy", 1024, 100, norm="none"),
        Case("peers", "residual", 16, 20 if full else 16, (32,), norm="none"),
    ]


def _cpu(full: bool) -> list[Case]:
    steps = 10 if full else 4
    return [
        _chain("4", 4, 100, 30),  # the shortest first
        _chain("16", 16, 64, steps),
        _chain("64", 64, 32, steps),
        Case("chains", "cascade", 32, steps, LADDER),
        _chain("64-none", 64, 32, steps, norm="none", full=True),
        _chain("16-none", 16, 64, steps, norm="none", full=True),
        _chain("4-none", 4, 100, 30, norm="none", full=True),
        Case("chains", "cascade-none", 32, steps, LADDER, norm="none", full=True),
        Case("training", "digits", 64, preset="digits", updates=5),
        Case("training", "published", 32, 30 if full else 10, preset="multigrid-released", settings=_NOISY),
    ]


def _cuda(full: bool) -> list[Case]:
    return [
        Case("chains", "cascade", 128, 30, LADDER),
        _chain("4", 4, 128, 30),
        # Steps of microseconds: so many that a call's own do not count.
        *(_small("compact", size, 300) for size in (2, 4, 8, 16)),
        _chain("64", 64, 1056, 10),
        _chain("16", 16, 1056, 10),
        _small("compact", 32, 30, full=True),
        *(_small("residual", size, 300, full=True) for size in (2, 4, 8)),
        _small("residual", 16, 30, full=True),
        _chain("4-1056", 4, 1056, 30, full=True),
        _chain("64-128", 64, 128, 30, full=True),
        _chain("16-128", 16, 128, 30, full=True),
        Case("chains", "cascade-none", 128, 30, LADDER, norm="none", full=True),
        Case("training", "released", 100, preset="multigrid-released"),
        Case("training", "digits", 64, preset="digits", updates=5),
    ]


TABLES = ("chains", "training", "peers")


def cases(
    tables: Sequence[str] = TABLES,
    *,
    device: str = "cpu",
    only: Sequence[str] = (),
    full: bool = False,
    tiny: bool = False,
) -> list[Case]:
    """The cases of some tables for "cpu" or "cuda": those named in `only`, else the ones that `full` asks for.

    Raises ValueError for an unknown name.
    """
    known = (_cuda if device.startswith("cuda") else _cpu)(full) + _peers(full)
    selected = [case for case in known if case.table in tables]
    names = [case.name for case in selected]
    for name in only:
        one_of(name, names, "case", "bench")
    chosen = [case for case in selected if (case.name in only if only else full or not case.full)]
    return [case.tiny() for case in chosen] if tiny else chosen
