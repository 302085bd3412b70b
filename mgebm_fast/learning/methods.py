"""The methods that a run can be trained by: a name, its own table of keys, and the module that holds its rule.

A method is an update rule and an initial state over one loop. Its module has

    build_model(config) -> nn.Module                    the untrained model
    build_rule(model, config, images) -> UpdateRule     images: how many the data set has
    narrow(config) -> TrainConfig                       the configuration as the method reads it, for what it reduces

and one entry here makes it known to TOML files, `--set`, `mgebm train` and `mgebm presets`. Modules load when they are
used.
"""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType
from typing import Any

from .keys import Maybe, Real, Whole, key


@dataclasses.dataclass(frozen=True)
class CdConfig:
    """`[cd]`: contrastive divergence, whose K training steps never leave the data far enough to sample by."""

    sample_steps: int = key(200, Whole(1), "steps from noise of a chain that samples the trained model")


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
class Method:
    """One entry: `table` holds the method's own keys, of which a resumed run may not change those in `fixed`."""

    name: str
    about: str
    module: str
    model: str = "MultiGrid"  # the class that it trains
    table: type | None = None
    fixed: tuple[str, ...] = ()

    def load(self) -> ModuleType:
        """The module with `build_model`, `build_rule` and `narrow`."""
        return importlib.import_module(f"{__package__}.{self.module}")

    def options(self) -> Any:
        """The method's own keys at their defaults; None where it has none."""
        return None if self.table is None else self.table()


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("multigrid", "every grid learns from its own chain, coarse to fine", "multigrid"),
        Method("cd", "one net; chains start at the observed images", "baselines", "SingleGrid", CdConfig),
        Method(
            "pcd", "one net; chains persist in a bank", "baselines", "SingleGrid", PcdConfig, ("bank_size", "restart")
        ),
        Method("single-grid-cd", "the finest net only, from the 1x1 means, as many steps", "baselines", "SingleGrid"),
        Method("short-run", "one net; every chain starts at uniform noise", "baselines", "SingleGrid"),
    )
}
TABLES: dict[str, type] = {method.name: method.table for method in METHODS.values() if method.table is not None}
