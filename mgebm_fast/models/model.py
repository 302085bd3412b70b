"""Model, the base of every trained model: what commands and trainers use: samples, units of pixels, one file."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import checks, noise, ops
from ..errors import CheckpointError
from ..ops.state import why_not_plain
from ..sampling import graphs
from ..sampling.cascade import GridCallback, check_known, check_sizes
from ..sampling.langevin import Langevin
from ..sampling.pipeline import piped
from . import storage
from .pretrained import Pretrained

DEFAULT_GROUP = 100

AnyModel = TypeVar("AnyModel", bound="Model")


@dataclasses.dataclass(frozen=True)
class Group:
    """Samples that run as one batch, and how, as `Model.sample` was asked for them."""

    n: int
    seed: int
    first_sample: int
    mask: Tensor | None = None  # (n, C, S, S), and `known` with it; both or neither
    known: Tensor | None = None
    labels: Tensor | None = None  # (n,) int64, of a class-conditional model
    length: float = 1.0
    callback: GridCallback | None = None
    precision: str = "auto"
    backend: str = "auto"
    graph: graphs.Graph = None

    @property
    def engine(self) -> dict[str, Any]:
        """How chains compute."""
        return {"precision": self.precision, "backend": self.backend, "graph": self.graph}


class Model(Pretrained, nn.Module, abc.ABC):
    """A model of square images: how samples are grouped, the units of its pixels, and how it is stored.

    A class of models says how one group is drawn (`_sample_group`), the chains that it goes through (`sampling`), what
    it is rebuilt from (`config`, `from_config`), and its name in model files (`kind`).

    Args:
        sizes: those that a sample is given at, coarse to fine.
        channels: of the images.
        value_range: (lo, hi), the pixel values of the model's black and white.
        batch_size: samples to a group in `sample`. Default 100.

    State: the buffer `colours` (M, C) float32, the stored distribution of 1×1 images; a class may add to it.
    """

    kind = "Model"
    norm: str = "none"  # "batch": the samples of a group are coupled
    _of_any_length: tuple[str, ...] = ()
    colours: Tensor
    origin: Any = None  # the `learning.Run` that `mg.load` found the model in

    def __init__(
        self, sizes: Sequence[int], channels: int, value_range: tuple[float, float], batch_size: int | None
    ) -> None:
        super().__init__()
        where = self.kind
        self.sizes = check_sizes(sizes)
        self.channels = checks.positive_int(channels, "channels", where)
        batch_size = checks.positive_int(batch_size, "batch_size", where, none=True)
        self.batch_size = DEFAULT_GROUP if batch_size is None else batch_size
        self.value_range = checks.interval(value_range, "value_range", where)
        self._register_rows("colours", channels)

    def _register_rows(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """A buffer of any number of rows of this shape, none at first."""
        self._of_any_length = (*self._of_any_length, name)
        self.register_buffer(name, torch.empty(0, *shape, dtype=dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As torch has it; buffers of any number of rows take the number that is loaded."""
        for name in self._of_any_length:
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.shape != own.shape and given.shape[1:] == own.shape[1:]:
                setattr(self, name, own.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @torch.no_grad()
    def set_colours(self, colours: Tensor) -> None:  # (M, C) or (M, C, 1, 1)
        """Store the distribution of 1×1 images, in the units of `value_range`, that `sample` draws its starts from."""
        if colours.dim() == 4 and colours.shape[2:] == (1, 1):
            colours = colours[:, :, 0, 0]
        if colours.dim() != 2 or colours.shape[1] != self.channels or len(colours) == 0:
            raise ValueError(f"set_colours: colours must have shape (M, {self.channels}), got {tuple(colours.shape)}")
        if not bool(torch.isfinite(colours).all()):
            raise ValueError("set_colours: colours must be finite, got NaN or infinite values")
        self.colours = colours.detach().to(self.colours.device, torch.float32, copy=True)

    def draw_colours(self, n: int, *, seed: int, first_sample: int = 0) -> Tensor:
        """n draws (n, C, 1, 1) from the stored colours; each sample's is a function of (seed, sample id)."""
        rows = self._draw_rows(len(self.colours), n, seed=seed, first_sample=first_sample)
        return self.colours[rows][:, :, None, None]

    def _draw_rows(self, count: int, n: int, *, seed: int, first_sample: int) -> Tensor:
        """n of `count` rows of the stored colours, (n,) int64."""
        if len(self.colours) == 0:
            raise ValueError(
                "sample: the model must hold a colour distribution, got none: train it, or call set_colours"
            )
        place = {"first_sample": first_sample, "stream": noise.stream(noise.Purpose.COLOUR_DRAW)}
        return noise.integers(count, n, seed=seed, step=0, device=self.colours.device, **place)

    @property
    @abc.abstractmethod
    def sampling(self) -> tuple[Langevin, ...]:
        """The chains that a sample goes through; none where a generator makes it alone."""

    @property
    def coupled(self) -> str:
        """Why the samples of a group are coupled (`sampling.coupling`); an empty string where they are not."""
        return ""

    def chains(self, length: float = 1.0) -> tuple[Langevin, ...]:
        """The chains that a sample goes through, each of max(1, round(length · K)) steps in place of its K."""
        if length == 1:
            return self.sampling
        return tuple(chain.of_length(max(1, round(length * chain.steps))) for chain in self.sampling)

    @property
    def steps_of_sample(self) -> int:
        """Steps of all chains that a sample goes through."""
        return sum(chain.steps for chain in self.sampling)

    @abc.abstractmethod
    def _sample_group(self, group: Group) -> list[Tensor]:
        """The samples of a group at every size."""

    def grids(self, x: Tensor) -> list[Tensor]:  # (N, C, S, S)
        """Images at sizes 1 and S: their block means, and themselves."""
        return [ops.pyramid(x, [1])[0], x]

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """What rebuilds this model but for its weights, in plain JSON types."""

    @classmethod
    @abc.abstractmethod
    def from_config(cls: type[AnyModel], config: Mapping[str, Any]) -> AnyModel:
        """The model that `config()` described, with fresh weights."""

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        first_sample: int = 0,
        batch_size: int | None = None,
        return_grids: bool = False,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        labels: int | Tensor | None = None,
        length: float = 1.0,
        callback: GridCallback | None = None,
        precision: str = "auto",
        backend: str = "auto",
        graph: bool | None = None,
        pipeline: bool = False,
    ) -> Tensor | list[Tensor]:
        """n samples (n, C, S, S) float32 in `value_range`, with no data.

        Runs groups of `batch_size` (default: the model's). Where batch statistics couple samples the last group is
        filled with further samples and trimmed, since a chain depends on its group; sample(10) is then the beginning
        of sample(50), and `first_sample` gives the same pictures where it is a multiple of the group. Other chains are
        independent and groups only bound the memory.

        Args:
            mask, known: as in `cascade`, for (n, C, S, S); fillers repeat the last sample's.
            labels: of a class-conditional `MultiGrid`, the class of every sample, or (n,) one of each, as numbers in
                its `classes`; None: as often as among the images that it learned from.
            length: of the chains, as `chains` has it. Other than 1 only for a model whose samples go through a chain.
            return_grids: give the list of results at every size instead.
            pipeline: on a CUDA device, run a group's coarse grids while the group before it is at the fine ones, each
                grid on a stream of its own. The samples are the same. A model with V-cycles is refused.
        """
        n = checks.positive_int(n, "n", "sample")
        batch_size = checks.positive_int(batch_size, "batch_size", "sample", none=True)
        group = self.batch_size if batch_size is None else batch_size
        seed = noise.check_seed(seed, "sample")
        self._check_length(length)
        finest = (n, self.channels, self.sizes[-1], self.sizes[-1])
        held = check_known(known, mask, finest, self.colours.device, "sample")
        classes = None if labels is None else self._check_labels(labels, n, "sample")

        def draw(graph: graphs.Graph) -> list[list[Tensor]]:
            groups = []
            for begin in range(0, n, group):
                wanted = min(group, n - begin)
                size = group if self.coupled else wanted
                rows = [min(i, n - 1) for i in range(begin, begin + size)]
                known_here, mask_here = (None, None) if held is None else (held[0][rows], held[1][rows])
                labels_here = None if classes is None else classes[rows]
                results = self._sample_group(
                    Group(
                        size, seed, first_sample + begin, mask_here, known_here, labels_here, length, callback,
                        precision, backend, graph,
                    )
                )  # fmt: skip
                groups.append([grid[:wanted] for grid in results])
            return groups

        grids = len(self.sampling)
        groups = piped(draw, self.colours.device, grids, graph, callback) if pipeline else draw(graph)
        results = [torch.cat(parts) for parts in zip(*groups, strict=True)]
        return results if return_grids else results[-1]

    def _check_labels(self, labels: int | Tensor, n: int, where: str) -> Tensor:
        """Labels as (n,) int64 on the model's device; an error where the model has no classes, or not these."""
        raise ValueError(f"{where}: labels must be None for a {self.kind} that is not class-conditional, got labels")

    def _check_length(self, length: float) -> None:
        checks.positive_number(length, "length", "sample")
        if length != 1 and not self.sampling:
            raise ValueError(
                f"sample: length must be 1 for a {type(self).__name__}, whose images go through no chain, got {length}"
            )

    def to_uint8(self, x: Tensor) -> Tensor:
        """round(255 (x − lo) / (hi − lo)) as uint8, values outside the range clamped."""
        low, high = self.value_range
        return ((x - low) * (255.0 / (high - low))).round().clamp(0, 255).to(torch.uint8)

    def from_uint8(self, x: Tensor) -> Tensor:
        """lo + (hi − lo) x / 255 as float32: the model's units of 8-bit pixels."""
        low, high = self.value_range
        return x.float() * ((high - low) / 255.0) + low

    def in_units(self, batch: Tensor) -> Tensor:
        """A batch on the model's device, float32 in its units: bytes are 0 … 255, floats are in those units already."""
        batch = batch.to(self.colours.device, non_blocking=True)
        return self.from_uint8(batch) if batch.dtype == torch.uint8 else batch

    def check_storable(self) -> None:
        """ValueError where the state holds what no model file can: anything but plain, dense, real tensors."""
        for name, value in self.state_dict().items():
            got = why_not_plain(value)
            if got or value.is_complex() or value.is_quantized:
                got = got or str(value.dtype)
                raise ValueError(
                    f"{self.kind}: the state of nets must hold dense real tensors alone, to be trained and stored, got "
                    f"{name!r}, {got}"
                )

    def save(self, path: str | os.PathLike, *, ema: Mapping[str, Tensor] | None = None, half: bool = False) -> None:
        """Write one .safetensors file, configuration included; no file is left half-written.

        `ema`: averages of some of the state's tensors, by their names in `state_dict()`; `load` prefers them.
        `half`: float32 tensors are stored rounded to float16, in half the bytes; `load` widens them again.
        """
        tensors = dict(self.state_dict())
        unknown = [name for name in ema or {} if name not in tensors]
        if unknown:
            raise ValueError(f"save: ema must hold names of the model's state, got {unknown[0]!r}")
        tensors.update({storage.EMA + name: tensor for name, tensor in (ema or {}).items()})
        if half:
            tensors = {n: t.half() if t.dtype == torch.float32 else t for n, t in tensors.items()}
        storage.write(path, tensors, self.config(), self.kind)

    @classmethod
    def load(
        cls: type[AnyModel], path: str | os.PathLike, *, device: torch.device | str = "cpu", ema: bool = True
    ) -> AnyModel:
        """The model stored at `path`: a model file, a checkpoint folder, or a run folder (its final model, else its
        newest checkpoint), with the averaged weights where there are any and `ema` is not False. A file says which
        class it holds, this one or one derived from it.

        Raises CheckpointError: no such file, truncated, not a model, or tensors that do not fit its configuration.
        """
        file = storage.find(path)
        classes = {found.kind: found for found in cls._loadable()}
        kind, config, tensors = storage.read_one_of(file, list(classes))
        try:
            model = classes[kind].from_config(config)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: the model's configuration is wrong: {error}") from error
        model.set_state(tensors, ema, str(file))
        return model.to(device)

    @classmethod
    def _loadable(cls: type[AnyModel]) -> list[type[AnyModel]]:
        """The classes that `load` takes, the one that an error names first."""
        return list(_family(cls))

    def load_weights(self, path: str | os.PathLike, *, ema: bool = True) -> None:
        """Take the weights and colours stored at `path` into this model; CheckpointError where they do not fit it."""
        file = storage.find(path)
        _, config, tensors = storage.read_one_of(file, (self.kind,))
        own = self.config()
        for key in ("sizes", "channels", "nets", "generator"):
            if config.get(key) != own.get(key):
                nets = key in ("nets", "generator")
                what = "with other nets" if nets else f"of {key} {config.get(key)}, this one has {own[key]}"
                raise CheckpointError(f"{file}: stored from a model {what}")
        self.set_state(tensors, ema, str(file))

    @torch.no_grad()
    def set_state(self, tensors: Mapping[str, Tensor], ema: bool, where: str) -> None:
        """Take copies of what `save` stores, by its names; with `ema` averages in place of what they average.

        CheckpointError, which begins with `where`, unless they are the tensors of this model.
        """
        if ema:
            tensors = storage.averaged(tensors)
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith(storage.EMA)}
        expected = self.state_dict()
        for name in sorted(expected.keys() | state.keys()):
            if name not in state or name not in expected:
                fault = "missing" if name in expected else "not of this model"
                raise CheckpointError(f"{where}: tensor {name!r} is {fault}")
            got, want = tuple(state[name].shape), tuple(expected[name].shape)
            fits = got[1:] == want[1:] and len(got) == len(want) if name in self._of_any_length else got == want
            halved = state[name].dtype == torch.float16 and expected[name].dtype == torch.float32
            if not fits or not (halved or state[name].dtype == expected[name].dtype):
                wanted = f"{want} {expected[name].dtype}"
                raise CheckpointError(f"{where}: tensor {name!r} must be {wanted}, got {got} {state[name].dtype}")
        self.load_state_dict(state)


def _family(cls: type[AnyModel]) -> Iterator[type[AnyModel]]:
    """The class and those derived from it that have a name of their own in model files, itself first."""
    if not getattr(cls, "__abstractmethods__", None):
        yield cls
    for derived in cls.__subclasses__():
        yield from (found for found in _family(derived) if "kind" in vars(found))
