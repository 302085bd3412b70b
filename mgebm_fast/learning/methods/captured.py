"""One update of all nets as a CUDA graph: a replay makes it, and what it measures is read once for many updates.

All that differs from update to update is read from the device: the images, and a row of a table with the update's
counters, the numbers of its chains, its data noise, learning rates and share in the average. The graph goes on to the
next row by itself. It draws what the eager update draws, in the same kernels.

An update that may not be applied, since a chain or a number became non-finite, leaves weights, moments, averages and
buffers as they are, and so do all after it until the measures are read. The caller then makes that one again without a
graph, which repeats an overflow in float32 or raises what an eager run raises.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import BackendError
from ...models import EnergyModel
from ...nets import ScoreNet
from ...sampling import Langevin, graphs
from ...sampling.lanes import Lane
from ...sampling.memory import is_out_of_memory
from ...sampling.static import StaticChains
from ..config.train_config import TrainConfig
from .contrastive import ContrastiveRule
from .synthesis import Learned, Numbers, Synthesis, law_of, law_of_table, measured_of_samples

MOST = 64  # updates between two reads, at most
Replay = Callable[[], Any]


class GraphedRule(ContrastiveRule):
    """`ContrastiveRule` whose updates are CUDA graphs, where there can be one, from the first of a run on."""

    def __init__(self, model: EnergyModel, config: TrainConfig, *, images: int) -> None:
        super().__init__(model, config, images=images)
        self._captured: CapturedUpdate | None = None
        self._refusal: str | None = None  # why there is none; None: not asked yet
        self._alone = 0  # updates to make without it, after one that could not be applied

    @abc.abstractmethod
    def static_chains(self, nets: int, start: Tensor, ids: Tensor, session: graphs.Session) -> StaticChains:
        """The chains of an update in which so many nets learn at fixed addresses, from 1×1 images like `start`; `ids`
        holds the update's slots. BackendError where a graph cannot hold them."""

    def laws(self, dynamics: Sequence[Langevin], n: int) -> list[tuple[int, Langevin]]:
        """The net and the numbers of each of `static_chains` of a batch of `n`, `dynamics` being those of the nets."""
        return list(enumerate(dynamics))

    # what goes on from update to update beside the model: nothing, where a method says no more

    def stored(self) -> list[Tensor]:
        """It, at its addresses, which an update changes."""
        return []

    def slots_at(self, iteration: int, n: int) -> list[int]:
        """The slots of it that update `iteration`, of a batch of `n`, uses."""
        return []

    def store(self, made: Synthesis, iteration: Tensor, spoilt: Tensor) -> None:
        """Write what it comes to by update `iteration`, from captured code; `spoilt` is 1 where it stays as it is."""

    def launch(self, batch: Tensor, iteration: int, *, detail: bool = False) -> None:
        captured = self._update_for(batch, iteration)
        if captured is None:
            super().launch(batch, iteration, detail=detail)
        else:
            captured.launch(batch, iteration, detail)

    def _update_for(self, batch: Tensor, iteration: int) -> CapturedUpdate | None:
        """What makes this update; None where it is made without a graph."""
        if self._captured is not None and self._captured.waiting:
            return self._captured
        self._refusal = why_not(self) if self._refusal is None else self._refusal
        if self._alone and not self._refusal:
            self._alone -= 1
            return None
        if not self._refusal and (self._captured is None or self._captured.key != key_of(self, batch, iteration)):
            self._captured = None  # the memory of one at most is held
            try:
                self._captured = CapturedUpdate(self, batch, iteration)
            except (BackendError, torch.OutOfMemoryError) as error:
                self._refusal = " ".join(str(error).split())
        if self._refusal and self.config.graph:
            raise BackendError(f"graph = true cannot be had: {self._refusal}")
        return self._captured

    def collect(self, launched: int, *, wait: bool) -> tuple[list[tuple[int, dict[str, float]]], int]:
        captured = self._captured
        if captured is None or not captured.waiting:
            return super().collect(launched, wait=wait)
        if not wait and not captured.full:
            return [], launched
        found, made = captured.read()
        self.arrange(max(0, made - 1))
        self._alone = launched - made
        return found, made

    def forget(self) -> None:
        super().forget()
        self._captured, self._alone = None, 0

    def how(self) -> str:
        refusal = why_not(self) if self._refusal is None else self._refusal
        every = min(self.config.log_every, MOST)
        if refusal:
            return f"without a CUDA graph, because {refusal}"
        return f"a CUDA graph each; measures are read every {every} updates"


def why_not(rule: GraphedRule) -> str:
    """Why the updates of a rule are not captured; an empty string where they are."""
    config, device = rule.config, rule.model.colours.device
    if config.graph is False:
        return "graph = false"
    if device.type not in graphs.DEVICES:
        return f"CUDA graphs are not for {device.type} devices"
    if config.graph is None and os.environ.get("MGEBM_GRAPHS", "1") in ("", "0"):
        return "MGEBM_GRAPHS=0"
    if rule.ranks.size > 1:
        return "several processes average what they learn"
    if config.batch_parts > 1:
        return f"batches are learnt from in {config.batch_parts} parts"
    if not all(optimiser.defaults["fused"] for optimiser in rule.optimisers):
        return "an optimiser is not fused, as weights are not all float32"
    others = [type(net).__name__ for net in rule.model.nets if not isinstance(net, ScoreNet)]
    if others and config.graph is None:
        return f"the code of a {others[0]} may wait for the device; graph = true captures it"
    return ""


class CapturedUpdate:
    """The update of a rule at fixed addresses; `key` says for which.

    Args:
        rule: its nets, optimisers and averages are updated in place.
        batch: the first one, of the shape and dtype of all of them.
        iteration: of the first update. It is captured, and made when it is launched.

    BackendError, and nothing changed, where it cannot be captured.
    """

    def __init__(self, rule: GraphedRule, batch: Tensor, iteration: int) -> None:
        self._rule, self._lane = rule, Lane()
        self._device = device = rule.model.colours.device
        self._names: dict[bool, list[str]] = {}  # of what is measured, by whether samples are measured too
        self._rows: list[list[float]] = []  # what the updates that are launched read
        self._launched: list[tuple[int, bool]] = []  # since the last read: iteration, whether samples are measured
        self._ready: tuple[Any, list[list[float]]] = (None, [])  # rows made ahead, and what they were made of
        nets, self.length = len(rule.model.nets), min(rule.config.log_every, MOST)
        self._learning = rule.learning_at(iteration)
        with torch.inference_mode(False), torch.no_grad():
            self._dynamics = rule.config.dynamics()
            start = torch.zeros((*batch.shape[:2], 1, 1), dtype=torch.float32, device=device)
            whole = 1 + nets + len(rule.slots_at(iteration, len(batch)))  # numbers of a row, at its beginning
            self._words = torch.zeros(whole, dtype=torch.int64, device=device)
            self._ids = self._words[1 + nets :]
            self._chains = rule.static_chains(self._learning, start, self._ids, graphs.Session(rule.config.graph))
            self._batch = torch.empty_like(batch, device=device)
            width = len(self._row(iteration))
            self._table = torch.zeros(self.length, width, dtype=torch.float64, device=device)
            self._exact = torch.zeros(1, width, dtype=torch.float64, device=device)
            self._narrow = torch.zeros(width, dtype=torch.float32, device=device)
            self._place = torch.zeros(1, dtype=torch.int64, device=device)  # the row of the next update
            self._stuck = torch.zeros((), dtype=torch.float32, device=device)  # 1 from an update on that is not applied
            self._log = torch.zeros(self.length, 1 + 8 * nets, dtype=torch.float32, device=device)
            seed = torch.full((), _signed(rule.config.seed), dtype=torch.int64, device=device)
        # The order of `_row`.
        groups = len(rule.numbers(iteration).shares)
        sizes = [whole, nets, nets, groups, 4 * nets, *(chain.numbers for chain in self._chains.chains)]
        self._stds = slice(sum(sizes[:4]) + 1, sum(sizes[:5]), 4)  # of the chains' noise, in a row
        _, rates, noises, shares, laws, *tables = self._narrow.split(sizes)
        owners = [net for net, _ in rule.laws(self._dynamics[: self._learning], len(batch))]
        for chain, net, table in zip(self._chains.chains, owners, tables, strict=True):
            chain.read_from(seed, self._words[1 + net], table)
        exact = self._exact[0].split(sizes)[1]  # a fused optimiser takes float32 on a GPU, and float64 on a CPU
        quiet = rule.numbers(0).data_noise
        self._numbers = Numbers(
            self._words[0],
            list((rates if device.type == "cuda" else exact).unbind()),
            [0.0 if at_start == 0 else std for at_start, std in zip(quiet, noises.unbind(), strict=True)],
            list(shares.unbind()),
            self._learning,
        )
        silent = [law_of(chain)[1] == 0 for chain in self._dynamics]  # at any update, as noise is only annealed
        self._laws = [
            (drift, 0.0 if never else std, inverse_variance, median_std)
            for never, (drift, std, inverse_variance, median_std) in zip(
                silent, map(Tensor.unbind, laws.view(nets, 4)), strict=True
            )
        ]
        self._load(iteration)
        self._batch.copy_(batch)
        kinds = (True,) if rule.config.log_every == 1 else (False, True)
        self._replays = {detail: self._record(detail) for detail in kinds}
        self.key = key_of(rule, batch, iteration)

    def launch(self, batch: Tensor, iteration: int, detail: bool) -> None:
        """Update `iteration`, which follows the one before without a gap."""
        if not self._launched:
            self._load(iteration)
        self._batch.copy_(batch, non_blocking=True)
        self._replays[detail]()
        self._launched.append((iteration, detail))

    @property
    def waiting(self) -> int:
        """Updates launched since the last read."""
        return len(self._launched)

    @property
    def full(self) -> bool:
        """Whether they are read before the next one: there is no room for its measures, or a net joins in it."""
        following = self._launched[-1][0] + 1
        return self.waiting == self.length or self._rule.learning_at(following) != self._learning

    def read(self) -> tuple[list[tuple[int, dict[str, float]]], int]:
        """As `UpdateRule.collect`: the one host read for all updates since the last."""
        launched, rule = self._launched, self._rule
        following, rows, width = launched[-1][0] + 1, self._rows, self._log.shape[1]
        self._ready = ((following, rule.factors), self._rows_from(following))  # while the device is at work still
        values = self._log[: len(launched)].flatten().tolist()
        found: list[tuple[int, dict[str, float]]] = []
        for index, (iteration, detail) in enumerate(launched):
            applied, *measured = values[index * width : (index + 1) * width]
            if applied != 1:
                following = iteration
                break
            named = dict(zip(self._names[detail], measured))
            for net, std in zip(rule.names, rows[index][self._stds], strict=True):
                if std == 0:  # the noise has been annealed to nothing
                    for name in ("gradient_to_noise", "stiffness"):
                        named.pop(f"{net}/{name}", None)
            found.append((iteration, rule.metrics(named, iteration)))
        self._launched = []
        return found, following

    def _load(self, iteration: int) -> None:
        """The numbers of the updates from `iteration` on."""
        made_of, rows = self._ready
        self._rows = rows if made_of == (iteration, self._rule.factors) else self._rows_from(iteration)
        self._table.copy_(torch.tensor(self._rows, dtype=torch.float64))
        self._place.zero_()
        self._stuck.zero_()

    def _rows_from(self, iteration: int) -> list[list[float]]:
        return [self._row(iteration + k) for k in range(self.length)]

    def _row(self, iteration: int) -> list[Any]:
        """What update `iteration` reads: its counter and those of its chains, its slots of what is stored, rates, data
        noise, its shares in the averages, the laws of its chains (`law_of`), and the numbers of each step; whole
        numbers are exact in float64."""
        rule, numbers, dynamics = self._rule, self._rule.numbers(iteration), self._dynamics
        factors = rule.config.noise_factors(iteration)
        tables = [chain.table(factor) for chain, factor in zip(dynamics, factors, strict=True)]
        words = [iteration * chain.steps for chain in dynamics] + rule.slots_at(iteration, len(self._batch))
        laws = [number for table in tables for number in law_of_table(table)]
        chains = rule.laws(dynamics[: self._learning], len(self._batch))
        of_chains = [law.table(factors[net]) for net, law in chains]
        entries = [entry for table in of_chains for numbers_of_step in table for entry in numbers_of_step]
        return [iteration, *words, *numbers.rates, *numbers.data_noise, *numbers.shares, *laws, *entries]

    def _record(self, detail: bool) -> Replay:
        """Capture the update. What warms libraries up makes it once: the state is put back."""
        optimisers = self._rule.optimisers
        known = {id(tensor) for optimiser in optimisers for tensor in _moments(optimiser)}
        kept = [(tensor, tensor.detach().clone()) for tensor in (*state_of(self._rule), self._place, self._stuck)]

        def body() -> None:
            self._names[detail] = self._update(detail)

        try:
            return self._lane.record(body, self._device)
        except RuntimeError as error:  # also torch.OutOfMemoryError
            if self._device.type == "cuda" and is_out_of_memory(error):
                torch.cuda.empty_cache()
            raise BackendError(f"its capture failed: {' '.join(str(error).split())}") from error
        finally:
            with torch.no_grad():
                for tensor, before in kept:
                    tensor.copy_(before)
                for optimiser in optimisers:
                    for tensor in _moments(optimiser):
                        if id(tensor) not in known:  # made by the update: all begin at 0
                            tensor.zero_()

    def _update(self, detail: bool) -> list[str]:
        """The update, as it is captured; the names of what it measures."""
        rule, chains = self._rule, self._chains
        with torch.no_grad():
            torch.index_select(self._table, 0, self._place, out=self._exact)
            self._narrow.copy_(self._exact[0])
            self._words.copy_(self._exact[0, : len(self._words)])
            before = [buffer.clone() for buffer in rule.buffers]

        def synthesise(observed: list[Tensor]) -> Synthesis:
            with torch.no_grad():
                chains.refresh()
                chains.enter(observed[0])
                chains.run_once()
            return Synthesis(chains.images, self._ids)

        grids = rule.learn(self._batch, 0, self._numbers, synthesise)
        learned = Learned(grids, [], chains.healthy.float())
        measured, spoilt = rule.measure(learned)
        with torch.no_grad():
            if detail:
                measured |= measured_of_samples(
                    rule.model, chains.images, rule.observed(self._batch)[1:], chains.gradient, self._laws,
                )  # fmt: skip
            stuck = torch.maximum(spoilt.float(), self._stuck)
            rule.apply(learned, self._numbers, stuck)
            rule.store(Synthesis(chains.images, self._ids), self._numbers.iteration, stuck)
            for buffer, value in zip(rule.buffers, before, strict=True):
                buffer.copy_(torch.where(stuck == 1, value, buffer))
            if rule.average is not None:
                rule.average.take([share * (1 - stuck) for share in self._numbers.shares])
            row = torch.stack([1 - stuck, *measured.values()])
            self._log[:, : len(row)].index_copy_(0, self._place, row[None])
            self._stuck.copy_(stuck)
            self._place.add_(1)
        return list(measured)


def state_of(rule: GraphedRule) -> list[Tensor]:
    """All that an update changes."""
    moments = [tensor for optimiser in rule.optimisers for tensor in _moments(optimiser)]
    averages = [] if rule.average is None else list(rule.average.state().values())
    return [*sum(rule.parameters, []), *rule.buffers, *moments, *averages, *rule.stored()]


def _moments(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [tensor for state in optimiser.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]


def key_of(rule: GraphedRule, batch: Tensor, iteration: int) -> tuple[Any, ...]:
    """What a captured update is for: the shape of a batch, the attempt (its streams of noise), how many nets learn, and
    the addresses of the state."""
    addresses = tuple(tensor.data_ptr() for tensor in state_of(rule))
    return tuple(batch.shape), batch.dtype, rule.attempt, rule.learning_at(iteration), addresses


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >> 63 else seed
