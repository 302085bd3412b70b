"""Where training starts from: weights, and on request the optimiser's state, of what was trained before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import CheckpointError
from ..models import EnergyModel, Model
from ..models.latent import Generates
from ..nets import ScoreNet
from .config.train_config import TrainConfig
from .config.values import from_dict
from .methods.model_rule import OPTIMISER_FILE, ModelRule
from .run import checkpoint, stored_run
from .run.folder import CHECKPOINTS

GENERATOR = "generator"  # the name of a part
OPTION = "from"  # what errors begin with


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a model took of another one, by the names of its parts: "size 8" for a net, "generator"."""

    parts: dict[str, str]  # part -> that of the source
    new: list[str]
    left: list[str]  # parts of the source that the model has no place for

    def words(self) -> str:
        def listed(parts: list[str]) -> str:
            sizes = [part.removeprefix("size ") for part in parts if part.startswith("size ")]
            return ", ".join([*([f"size {', '.join(sizes)}"] if sizes else []), *([GENERATOR] * (GENERATOR in parts))])

        found = f"taken: {listed(list(self.parts))}"
        found += f"; new: {listed(self.new)}" if self.new else ""
        return found + (f"; left out: {listed(self.left)}" if self.left else "")


def begin(rule: ModelRule, config: TrainConfig, say: Callable[[str], None]) -> None:
    """Give the model of `rule` the weights of `config.start_from`, and its optimisers their state there with
    `config.start_optimiser`; `say` reports what was taken and what is new.

    Weights are the averaged ones where there are any; with the optimiser's state those that it belongs to, of the
    newest whole checkpoint. CheckpointError names what does not fit; nothing of the model has changed then.
    """
    path = Path(config.start_from)
    folder = _checkpoint(path) if config.start_optimiser else None
    if folder is not None:
        source, kind = Model.load(folder, ema=False), "weights and optimiser state"
    else:
        file, _, caveat = stored_run.find(path)
        if caveat:
            say(caveat)
        source, kind = Model.load(file), "weights"
    taken = match(rule.model, source, str(path))
    tensors = {} if folder is None else _optimiser_tensors(rule, config, folder, source, taken)
    theirs = dict(_parts(source))
    for part, module in _parts(rule.model):
        if part in taken.parts:
            module.load_state_dict(theirs[taken.parts[part]].state_dict())
    if rule.average is not None:
        rule.average.restore({})  # averages begin at the weights
    if folder is not None:
        rule.restore_optimisers(tensors, str(folder))
    say(f"{kind} of {path}: {taken.words()}")


def match(model: Model, source: Model, where: str) -> Taken:
    """Which part of `source` each part of `model` takes: the net of the same size, or of two models of one fully
    convolutional net (head "sum") that net; and the generator.

    CheckpointError where channels, the range of pixels or the classes of class-conditional models differ, where a net
    of one size has other layers in the two, or where nothing fits.
    """
    for name in ("channels", "value_range"):
        _same(name, getattr(model, name), getattr(source, name), where)
    ours_of, theirs_of = (", ".join(getattr(m, "classes", ())) or "none" for m in (model, source))
    _same("classes of a class-conditional model", ours_of, theirs_of, where)
    ours, theirs = dict(_parts(model)), dict(_parts(source))
    pairs = {part: part for part in ours if part in theirs}
    nets, others = ([part for part in parts if part != GENERATOR] for parts in (ours, theirs))
    if len(nets) == len(others) == 1 and nets[0] != others[0] and _of_any_size(theirs[others[0]]):
        pairs[nets[0]] = others[0]
    for part, other in pairs.items():
        mine, stored = _described(ours[part], part, other), _described(theirs[other], part, other)
        for key in mine:
            _same(f"{key} of {part}", mine[key], stored.get(key), where)
    if not pairs:
        raise CheckpointError(
            f"must have a net of {', '.join(ours)}, got {where}, which has {', '.join(theirs)}", OPTION
        )
    new = [part for part in ours if part not in pairs]
    return Taken(pairs, new, [part for part in theirs if part not in pairs.values()])


def _parts(model: Model) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, EnergyModel):
        model.energy_nets("taken from or given weights")
        for size, net in zip(model.sizes[1:], model.nets, strict=True):
            yield f"size {size}", net
    if isinstance(model, Generates):
        yield GENERATOR, model.generator


def _of_any_size(net: nn.Module) -> bool:
    return isinstance(net, ScoreNet) and net.any_size


def _described(net: Any, part: str, other: str) -> dict[str, Any]:
    described = {"class": type(net).__name__, **net.config()}
    return {key: value for key, value in described.items() if key != "size" or part == other}


def _same(name: str, ours: Any, theirs: Any, where: str) -> None:
    if ours != theirs:
        raise CheckpointError(f"{name} must be {theirs}, as in {where}, got {ours}", OPTION)


def _checkpoint(path: Path) -> Path:
    """The newest whole checkpoint that a path means."""
    if (path / checkpoint.STATE).is_file():
        return path
    run = stored_run.find(path).run
    found = None if run is None else checkpoint.newest_whole(run.path / CHECKPOINTS)[0]
    if found is None:
        raise CheckpointError(f"must have a whole checkpoint, to take the optimiser's state, got {path}", OPTION)
    return found[0]


def _optimiser_tensors(
    rule: ModelRule, config: TrainConfig, folder: Path, source: Model, taken: Taken
) -> dict[str, Tensor]:
    """The state of the optimisers of the parts that are taken, under the names that they have in `rule`."""
    theirs = from_dict(checkpoint.read(folder).get("config"), str(folder))
    _same("optimiser.name", config.optimiser.name, theirs.optimiser.name, str(folder))
    names = {_optimiser_of(source, other): _optimiser_of(rule.model, part) for part, other in taken.parts.items()}
    found = {}
    for key, tensor in checkpoint.read_tensors(folder / OPTIMISER_FILE).items():
        owner, _, name = key.partition(".")
        if owner in names:
            found[f"{names[owner]}.{name}"] = tensor
    return found


def _optimiser_of(model: Model, part: str) -> str:
    """The name of the optimiser of a part, as `ModelRule.named_optimisers` has it."""
    return part if part == GENERATOR else str(model.sizes.index(int(part.removeprefix("size "))))
