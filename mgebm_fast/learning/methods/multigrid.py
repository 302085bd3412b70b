"""The multi-grid method (Gao, Lu, Zhou, Zhu, Wu, CVPR 2018, arXiv 1709.08868): every grid learns from its own chain."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import noise, ops
from ...errors import CheckpointError, ConfigError, DivergenceError
from ...gradient import plan
from ...models import MultiGrid
from ...models.storage import fault_of
from ...sampling import Langevin
from ...sampling.cascade import UPSAMPLINGS, enlarged, static_cascade, static_chain
from ...sampling.graphs import Graph, Session
from ...sampling.static import StaticChains
from ..config.keys import (
    MOST_GRIDS,
    MOST_SAMPLES,
    MOST_SIDE,
    MOST_STEPS,
    Choice,
    Flag,
    Many,
    Maybe,
    PerGrid,
    Real,
    Whole,
    key,
)
from ..config.method import Method, register
from ..config.train_config import TrainConfig
from ..run import checkpoint
from .banks import Advance, BankCascade, Slots
from .captured import GraphedRule
from .synthesis import Synthesis
from .work import work_of_chains


@dataclasses.dataclass(frozen=True)
class MultiGridConfig:
    """`[multigrid]`."""

    conditional: bool = key(False, Flag(), "learn an energy of image and class, of data with labels", fixed=True)
    bank_size: Any = key(
        None,
        Maybe(Whole(1, MOST_SAMPLES)),
        "chains of a grid that are stored, and go on in later updates; none: all start anew in each",
        fixed=True,
    )
    bank_grids: Any = key(
        None, Maybe(Whole(1, MOST_GRIDS)), "how many grids, the finest ones, store chains; none: all", fixed=True
    )
    bank_share: float = key(
        0.5, Real(0, 1), "share of a batch whose chains go on from the bank; the others start anew", fixed=True
    )
    bank_renewal: float = key(
        0.1, Real(0, 1), "share of the chains that start anew which are stored, in the place of others", fixed=True
    )
    sample_steps: Any = key(
        None, Maybe(PerGrid(Whole(1, MOST_STEPS))), "steps of a grid's chain in a sample; none: as in training"
    )
    denoise: int = key(0, Whole(0, MOST_STEPS), "last steps of the finest chain of a sample that have no noise")
    upsampling: str = key(
        "nearest",
        Choice(UPSAMPLINGS),
        "where a grid's chain starts: at the coarser result's replicated pixels, or between their centres",
        fixed=True,
    )
    cycles: Any = key(
        None,
        Maybe(Many(Whole(2, MOST_SIDE), most=1000)),
        "V-cycles of a sample: sizes at which its block means start finer chains once more; none: none",
    )


def _idle(config: TrainConfig) -> dict[str, str]:
    if config.options.bank_size is not None:
        return {"batch_parts": "with multigrid.bank_size, whose chains are of whole batches (take a smaller one)"}
    return {f"multigrid.{n}": "without multigrid.bank_size" for n in ("bank_grids", "bank_share", "bank_renewal")}


BANK_FILE = "bank.safetensors"


class MultiGridRule(GraphedRule):
    """`ContrastiveRule` with the cascade from the observed 1×1 means, K steps a grid.

    All grids are sampled before any is updated; since a chain of one grid never uses another grid's net, updating
    each grid right after its chain is the same.

    With `bank_size`, a share of `bank_share` of the chains is persistent (Tieleman, ICML 2008): every update draws as
    many slots of a bank as the batch has images, the same of every grid. The chains of these go on where they were
    left, with the numbers of a chain's last step (`Langevin.settled`); those of the other slots start anew where chains
    of the coarser grid ended that went on, at the first grid at the observed means. Of what starts anew a share of
    `bank_renewal` is stored. Energies then have to be right after K steps and after many times K. A bank begins as flat
    images of the stored colours. With `bank_grids` so many of the finest grids have one; all chains of the others start
    anew, and those of the first grid with a bank begin where these ended.
    """

    model: MultiGrid

    def __init__(self, model: MultiGrid, config: TrainConfig, *, images: int) -> None:
        super().__init__(model, config, images=images)
        own = config.options  # as the chains, how samples are drawn is the configuration's
        model.sample_steps, model.denoise, model.upsampling = own.sample_steps, own.denoise, own.upsampling
        model.cycles = own.cycles or ()
        size, batch_size = own.bank_size, config.batch_size
        self.slots: Slots | None = None
        self.bank: list[Tensor] = []  # (bank_size, C + K, s, s) of each grid, (0, …) without; made by the first update
        self.first_stored = 1 + max(0, len(model.nets) - (own.bank_grids or len(model.nets)))  # coarsest with a bank
        if size is not None:
            if size < batch_size:
                raise ConfigError(f"multigrid.bank_size must be at least batch_size ({batch_size}), got {size}")
            self.slots = Slots.of(size, batch_size, images, 0.0, config.seed)
        self.divisible = self.slots is None

    def synthesise(self, observed: list[Tensor], iteration: int, first_sample: int, graph: Graph = None) -> Synthesis:
        if self.slots is not None:
            self._fill_bank(self.slots)
            ids = self.slots.at(iteration, first_sample, len(observed[0]), self.attempt).to(observed[0].device)
            advance = functools.partial(self._advance, ids, iteration, graph)
            return Synthesis(self._walk(len(observed) - 1, observed[0], ids, advance), ids)
        results = self.model.run(
            observed[0],
            grids=len(observed) - 1,
            seed=self.config.seed,
            first_sample=first_sample,
            first_step=[iteration * chain.steps for chain in self.model.langevin[: len(observed) - 1]],
            purpose=self.purpose(noise.Purpose.TRAINING_CHAIN),
            precision=self.precision,
            graph=graph,
        )
        return Synthesis(results[1:], first_sample)

    def _walk(self, grids: int, start: Tensor, ids: Tensor, advance: Advance) -> list[Tensor]:
        """The batches of so many grids, with the chains of slots `ids`: those that start anew come first."""
        sizes, results = self.model.sizes, [start]
        for grid, bank in enumerate(self.bank[:grids], start=1):
            # Those that went on come first. Where all started anew, a roll by their number changes nothing.
            coarse = results[-1].roll(-self._anew(grid - 1, len(ids)), 0)
            anew = self._anew(grid, len(ids))
            begun = enlarged(coarse[:anew], sizes[grid], self.model.upsampling)
            if self.model.classes:  # interpolation may move a plane by a last bit
                begun[:, self.model.channels :] = coarse[:anew, self.model.channels :, :1, :1]
            starts = begun, bank[ids[anew:]]
            results.append(torch.cat([advance(grid, bool(part), x) for part, x in enumerate(starts) if len(x)]))
        return results[1:]

    def _advance(self, ids: Tensor, iteration: int, graph: Graph, grid: int, goes_on: bool, x: Tensor) -> Tensor:
        chain, anew = self.model.langevin[grid - 1], self._anew(grid, len(ids))
        return (chain.settled() if goes_on else chain)(
            self.model.nets[grid - 1], x, seed=self.config.seed, first_sample=ids[anew:] if goes_on else ids[:anew],
            first_step=iteration * chain.steps, graph=graph, **self._options(grid, x),
        )  # fmt: skip

    def _options(self, grid: int, x: Tensor) -> dict[str, Any]:
        mask = None  # label planes are held
        if self.model.classes:
            mask = self.model.moving().expand_as(x)
        return {
            "mask": mask, "stream": noise.stream(self.purpose(noise.Purpose.TRAINING_CHAIN), grid),
            "precision": self.precision, "where": f"training: grid {grid} (size {self.model.sizes[grid]})",
        }  # fmt: skip

    def _fill_bank(self, slots: Slots) -> None:
        """Make the bank, where there is none yet."""
        if self.bank:
            return
        model, stream = self.model, noise.stream(self.purpose(noise.Purpose.INITIAL_STATE))
        rows = noise.integers(
            len(model.colours), slots.size, seed=self.config.seed, step=0, stream=stream, device=model.colours.device
        )
        start = model.colours[rows][:, :, None, None]
        if model.classes:
            start = model.with_planes(start, model.labels[rows])
        self.bank = [
            ops.upsample(start if self._stores(grid) else start[:0], side)
            for grid, side in enumerate(model.sizes[1:], start=1)
        ]

    def _stores(self, grid: int) -> bool:
        return grid >= self.first_stored

    def _anew(self, grid: int, chains: int) -> int:
        """How many chains of a grid start anew, the first ones."""
        return chains - round(self.config.options.bank_share * chains) if self._stores(grid) else chains

    def keep(self, made: list[Synthesis], iteration: int) -> None:
        for part in made:
            self.store(part, iteration)

    def store(self, made: Synthesis, iteration: int | Tensor, spoilt: Tensor | None = None) -> None:
        if self.slots is None:
            return
        assert isinstance(made.ids, Tensor)
        anew, places = self._anew(self.first_stored, len(made.ids)), torch.arange(len(made.ids), device=made.ids.device)
        # A whole number in each update; in the mean the share, which of few chains may be less than one of them.
        rate = self.config.options.bank_renewal * anew
        updates = torch.as_tensor(iteration, dtype=torch.float64, device=made.ids.device)
        renewed = torch.floor((updates + 1) * rate) - torch.floor(updates * rate)
        stored = (places < renewed) | (places >= anew)
        if spoilt is not None:
            stored = stored & (spoilt != 1)
        for grid, (images, bank) in enumerate(zip(made.images, self.bank), start=1):
            if self._stores(grid):
                bank[made.ids] = torch.where(stored[:, None, None, None], images, bank[made.ids])

    # what a captured update asks

    def stored(self) -> list[Tensor]:
        return self.bank

    def slots_at(self, iteration: int, n: int) -> list[int]:
        return [] if self.slots is None else self.slots.at(iteration, 0, n, self.attempt).tolist()

    def laws(self, dynamics: Sequence[Langevin], n: int) -> list[tuple[int, Langevin]]:
        if self.slots is None:
            return super().laws(dynamics, n)
        return [
            (net, chain.settled() if goes_on else chain)
            for net, chain in enumerate(dynamics)
            for goes_on in self._parts(net + 1, n)
        ]

    def _parts(self, grid: int, chains: int) -> dict[bool, int]:
        """How many chains of a grid start anew (False) and how many go on (True), where there are any."""
        anew = self._anew(grid, chains)
        return {goes_on: count for goes_on, count in ((False, anew), (True, chains - anew)) if count}

    def static_chains(self, nets: int, start: Tensor, ids: Tensor, session: Session) -> StaticChains:
        model, purpose = self.model, self.purpose(noise.Purpose.TRAINING_CHAIN)
        if self.slots is not None:
            return self._static_chains_of(self.slots, nets, start, ids, session)
        held = None
        if model.classes:
            known, mask = model.held_planes(start, nets)
            held = known, mask.expand_as(known)
        return static_cascade(
            list(model.nets[:nets]), model.sizes[: 1 + nets], model.langevin[:nets], start, held,
            upsampling=model.upsampling, purpose=purpose, session=session, precision=self.precision,
        )  # fmt: skip

    def _static_chains_of(self, slots: Slots, nets: int, start: Tensor, ids: Tensor, session: Session) -> BankCascade:
        self._fill_bank(slots)
        by_part, plans = {}, []
        grids = zip(self.model.nets[:nets], self.bank, self.model.langevin)
        for grid, (net, bank, chain) in enumerate(grids, start=1):
            whole = bank.new_empty((len(ids), *bank.shape[1:]))
            for goes_on, count in self._parts(grid, len(ids)).items():
                by_part[grid, goes_on] = static_chain(
                    net, whole[:count], chain.settled() if goes_on else chain, session, first_sample=ids[:count],
                    **self._options(grid, whole[:count]),
                )  # fmt: skip
            plans.append(plan(net, whole, self.precision, "training"))
        return BankCascade(by_part, plans, start, ids, functools.partial(self._walk, nets))

    # the bank's part of a state

    def check(self) -> None:
        super().check()
        if fault := fault_of(self._bank_tensors()):
            raise DivergenceError(f"training: {fault}")

    def write(self, folder: Path, iteration: int) -> None:
        super().write(folder, iteration)
        if self.bank:
            checkpoint.write_tensors(folder / BANK_FILE, self._bank_tensors())

    def read(self, folder: Path) -> None:
        super().read(folder)
        path = folder / BANK_FILE
        self._take_bank(checkpoint.read_tensors(path) if path.exists() else {}, str(path))

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        return super().snapshot() | {"bank": {name: tensor.clone() for name, tensor in self._bank_tensors().items()}}

    def restore(self, snapshot: dict[str, dict[str, Tensor]]) -> None:
        super().restore(snapshot)
        self._take_bank({name: tensor.clone() for name, tensor in snapshot["bank"].items()}, "snapshot")

    def _bank_tensors(self) -> dict[str, Tensor]:
        return {f"bank_{size}": images for size, images in zip(self.model.sizes[1:], self.bank) if len(images)}

    def _take_bank(self, tensors: dict[str, Tensor], where: str) -> None:
        """The bank of a state; none in one from before the first update, which is filled again as it was."""
        self.bank, slots, model = [], self.slots, self.model
        if slots is None or not tensors:
            return
        shapes = {f"bank_{size}": model.input_shape(size) for size in model.sizes[1:]}
        wanted = {name: (slots.size, *shapes[name]) for name in list(shapes)[self.first_stored - 1 :]}
        if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != wanted:
            raise CheckpointError(f"{where}: must hold a bank of {slots.size} chains of every grid that stores them")
        device = model.colours.device
        self.bank = [
            tensors[name].to(device, torch.float32) if name in wanted else torch.empty((0, *shape), device=device)
            for name, shape in shapes.items()
        ]


def build_model(config: TrainConfig) -> MultiGrid:
    """The untrained model that a configuration describes."""
    return MultiGrid(
        config.sizes,
        width=config.width,
        variant=config.variant,
        depth=config.depth,
        classes=config.classes if config.options.conditional else (),
        sample_steps=config.options.sample_steps,
        denoise=config.options.denoise,
        upsampling=config.options.upsampling,
        cycles=config.options.cycles or (),
        **config.model_arguments(),
    )


register(
    Method(
        "multigrid",
        "every grid learns from its own chain, coarse to fine",
        MultiGrid,
        MultiGridRule,
        build_model,
        work_of_chains,
        MultiGridConfig,
        idle=_idle,
    )
)
