"""What every rule that trains a model by optimisers has in common: averaged weights, and the files of a checkpoint."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, DivergenceError
from ...models import Model
from ...models.storage import EMA, MODEL_FILE, fault_of
from ..config.train_config import TrainConfig
from ..run import checkpoint
from ..run.rule import UpdateRule
from .ema import Average
from .optim import load_state_tensors, state_tensors

OPTIMISER_FILE = "optimiser.safetensors"


class ModelRule(UpdateRule):
    """A rule with a model, averaged weights where they are asked for, and optimisers by name."""

    model: Model
    entered = False  # whether a checkpoint was read

    def __init__(self, model: Model, config: TrainConfig) -> None:
        model.check_storable()
        self.model, self.config = model, config
        self.average = Average(model, config.stabilise.ema, self.firsts()) if config.stabilise.ema else None

    def firsts(self) -> Mapping[nn.Parameter, int]:
        """The update that parameters begin to learn at, where it is not 0: their averages begin there too."""
        return {}

    @abc.abstractmethod
    def named_optimisers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimisers by the names that their state has in files."""

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model holds the averaged weights, where the run keeps them."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def check(self) -> None:
        averages = {} if self.average is None else self.average.state()
        moments = fault_of(self._optimiser_tensors(), checkpoint.LARGEST_MOMENT, checkpoint.LARGEST_SQUARE)
        if fault := fault_of(self.model.state_dict()) or fault_of(averages) or moments:
            raise DivergenceError(f"training: {fault}")

    def write_model(self, path: Path, iteration: int) -> None:
        self.before_stored(iteration)
        with self.averaged_weights():
            self.model.save(path)

    def write(self, folder: Path, iteration: int) -> None:
        self.before_stored(iteration)
        self.model.save(folder / MODEL_FILE, ema=None if self.average is None else self.average.state())
        checkpoint.write_tensors(folder / OPTIMISER_FILE, self._optimiser_tensors())

    def _optimiser_tensors(self) -> dict[str, Tensor]:
        return {
            f"{owner}.{name}": tensor
            for owner, optimiser in self.named_optimisers().items()
            for name, tensor in state_tensors(optimiser).items()
        }

    def snapshot(self) -> dict[str, dict[str, Tensor]]:
        averages = {} if self.average is None else self.average.state()
        parts = {"model": self.model.state_dict(), "optimiser": self._optimiser_tensors(), "average": averages}
        return {part: {name: t.detach().clone() for name, t in tensors.items()} for part, tensors in parts.items()}

    def restore(self, snapshot: dict[str, dict[str, Tensor]]) -> None:
        self.model.set_state(snapshot["model"], False, "snapshot")
        if self.average is not None:
            self.average.restore(snapshot["average"])
        self.restore_optimisers(snapshot["optimiser"], "snapshot")

    def read(self, folder: Path) -> None:
        self.model.load_weights(folder, ema=False)
        if self.average is not None:
            stored = checkpoint.read_tensors(folder / MODEL_FILE)
            self.average.restore({k.removeprefix(EMA): v for k, v in stored.items() if k.startswith(EMA)})
        path = folder / OPTIMISER_FILE
        self.restore_optimisers(checkpoint.read_tensors(path), str(path))
        self.entered = True

    def restore_optimisers(self, stored: dict[str, Tensor], where: str) -> None:
        """Take the state that `_optimiser_tensors` gave; an optimiser without any begins afresh."""
        known = self.named_optimisers()
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, value in stored.items():
            owner, _, name = key.partition(".")
            tensors.setdefault(owner, {})[name] = value
        if tensors.keys() - known:
            raise CheckpointError(
                f"{where}: holds the state of grids {sorted(tensors)}, this model has {sorted(known)}"
            )
        for owner, optimiser in known.items():
            load_state_tensors(optimiser, tensors.get(owner, {}), where)
