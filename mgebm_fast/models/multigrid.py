"""MultiGrid: energy nets of growing sizes, whose chains go from coarse to fine and start at stored colours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise, ops
from ..checks import is_int, positive_int
from ..errors import Refused
from ..sampling import graphs
from ..sampling.cascade import GridCallback, cascade, check_known, check_upsampling
from ..sampling.langevin import Langevin
from . import storage
from .energies import AnyEnergyModel, EnergyModel
from .model import Group, _family

# Of a label plane, in shares of `value_range`. A plane is a bias that all weights of a kernel over it learn together,
# alike in every pixel: at the height of the images' own range, at the rates of the presets, energies ran away.
_PLANE = 1 / 8


class MultiGrid(EnergyModel):
    """The multi-grid energy-based model (Gao et al., CVPR 2018): one net for each size but the first.

    The chain at sizes[i] starts at the enlarged result of the one at sizes[i − 1], the first at a 1×1 image.
    State and other arguments as `EnergyModel`'s.

    Args:
        sample_steps: of each grid's chain in a sample, or a sequence of one a grid; None: those of `langevin`.
        denoise: last steps of the finest chain of a sample that have no noise.
        upsampling: of the coarser result where a chain starts, "nearest" or "linear".
        cycles: of a sample, sizes between the first and the finest, one a V-cycle: the block means of the finished
            sample at that size start the chains of the finer grids once more, with other noise.

    With `classes`, K names, energies are those of an image and its class, E(x, y): nets take C + K channels, of which
    the last K are label planes, an eighth of `value_range` in the plane of the image's class and 0 in the others.
    Chains hold them. State: also `labels` (M,) int64, the class of each stored colour.
    """

    kind = storage.FORMAT  # the name of the class in model files
    labels: Tensor

    def __init__(
        self,
        sizes: Sequence[int] = (1, 4, 16, 64),
        *,
        classes: Sequence[str] = (),
        sample_steps: int | Sequence[int] | None = None,
        denoise: int = 0,
        upsampling: str = "nearest",
        cycles: int | Sequence[int] = (),
        **arguments: Any,
    ) -> None:
        names = [classes] if isinstance(classes, str) else list(classes)
        if len(names) == 1 or len(set(names)) < len(names) or not all(isinstance(n, str) and n for n in names):
            raise Refused("classes", "be two or more different names, or none", names, self.kind)
        super().__init__(sizes, classes=names, **arguments)
        self.sample_steps = self._lengths(sample_steps)
        if not is_int(denoise, 0):
            raise Refused("denoise", "be a whole number of at least 0", repr(denoise), self.kind)
        self.denoise = int(denoise)
        self.upsampling = check_upsampling(upsampling, self.kind)
        self.cycles: Any = cycles
        if names:
            self._register_rows("labels", dtype=torch.int64)

    def _lengths(self, steps: Any) -> int | tuple[int, ...] | None:
        """Steps of a sample as they were given, checked: of all chains, or of each."""
        if not isinstance(steps, Sequence) or isinstance(steps, str):
            return positive_int(steps, "sample_steps", self.kind, none=True)
        if len(steps) != len(self.nets):
            wanted = f"be a positive int or {len(self.nets)} of them, one a size after the first"
            raise Refused("sample_steps", wanted, list(steps), self.kind)
        return tuple(positive_int(own, "sample_steps", self.kind) for own in steps)

    @property
    def cycles(self) -> tuple[int, ...]:
        """The V-cycles of a sample. Setting it raises Refused for other than sizes between the first and the finest."""
        return self._cycles

    @cycles.setter
    def cycles(self, cycles: int | Sequence[int]) -> None:
        self._cycles = self._checked_cycles(cycles, self.kind)

    @contextlib.contextmanager
    def without_cycles(self) -> Iterator[None]:
        """Inside, samples go up once."""
        cycles, self.cycles = self.cycles, ()
        try:
            yield
        finally:
            self.cycles = cycles

    def _checked_cycles(self, cycles: int | Sequence[int], where: str) -> tuple[int, ...]:
        found: Any = (cycles,) if is_int(cycles) else cycles
        between = self.sizes[1:-1]
        if not isinstance(found, (list, tuple)) or not all(is_int(size) and size in between for size in found):
            wanted = f"hold sizes among {', '.join(map(str, between))}" if between else "be empty, of two sizes"
            raise Refused("cycles", wanted, cycles if isinstance(cycles, str) else repr(cycles), where)
        return tuple(int(size) for size in found)

    @property
    def sampling(self) -> tuple[Langevin, ...]:
        *coarse, finest = super().sampling
        return (*coarse, finest.denoised(self.denoise) if self.denoise else finest)

    @property
    def steps_of_sample(self) -> int:
        """Steps of all chains that a sample goes through, in its V-cycles as well."""
        steps = [chain.steps for chain in self.sampling]
        return sum(steps) + sum(sum(steps[self.sizes.index(size) :]) for size in self.cycles)

    def explain(self, n: int | None = None) -> str:
        words = "V-cycle: block means at size {} start the chains of finer grids once more"
        return "\n".join([super().explain(n), *map(words.format, self.cycles)])

    @torch.no_grad()
    def set_colours(self, colours: Tensor, labels: Tensor | None = None) -> None:  # (M, C) or (M, C, 1, 1), (M,)
        """Store the distribution of 1×1 images, in the units of `value_range`, that `sample` draws its starts from; of
        a class-conditional model with the class of each, as numbers in `classes`."""
        if self.classes:
            if labels is None:
                raise Refused("labels", "be given for a class-conditional model", None, "set_colours")
            found = self._check_labels(labels, len(colours), "set_colours")
        super().set_colours(colours)
        if self.classes:
            self.labels = found

    def cascade(
        self,
        start: Tensor,  # (N, C, 1, 1) float32
        *,
        labels: int | Tensor | None = None,
        seed: int | Tensor | None = None,
        first_sample: int | Tensor = 0,
        first_step: int | Sequence[int] = 0,
        purpose: noise.Purpose | int = noise.Purpose.SAMPLING,
        langevin: Langevin | Sequence[Langevin] | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        callback: GridCallback | None = None,
        cycles: int | Sequence[int] = (),
        precision: str = "auto",
        backend: str = "auto",
        graph: graphs.Graph = None,
    ) -> list[Tensor]:
        """The samples at every size, sizes[0] (the start) first; all of `start` as one batch.

        Args:
            start: 1×1 images, in the units of `value_range`.
            labels: of a class-conditional model, the class of all samples, or (N,) of each.
            seed: None: a fresh one for each call, as in `langevin_sample`.
            first_step: the step counter that the chains begin at, one for all grids or one a net.
            purpose: what the noise is for; a grid's stream is (purpose, index in sizes).
            langevin: dynamics in place of the model's own.
            mask, known: at the finest size, broadcastable to (N, C, S, S). Pixels of `known` where the mask is False
                are held; at coarser sizes a cell is held, at the mean of its block's known pixels, where it has any.
            callback: callback(grid, step, x) after each step, grid the index in sizes, x the live state, with label
                planes where there are classes.
            cycles: V-cycles that follow, as the model's own `cycles` have it, which `sample` takes. A chain's step
                counter counts on in each. Results are then those of the last visit to a size, block means at the last
                one that a cycle went down to.
            graph: as in `langevin_sample`; one CUDA graph holds the chains of all grids, and another one those that run
                again in a cycle.

        Raises DivergenceError naming the grid and the step.
        """
        if not isinstance(start, Tensor) or start.dim() != 4 or start.shape[1:] != (self.channels, 1, 1):
            got = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
            raise ValueError(f"cascade: start must have shape (N, {self.channels}, 1, 1), got {got}")
        if labels is None and self.classes:
            raise Refused("labels", "be given for a class-conditional model", None, "cascade")
        if labels is not None:
            start = self.with_planes(start, self._check_labels(labels, len(start), "cascade"))
            shape = (len(start), self.channels, *(self.sizes[-1],) * 2)
            if (held := check_known(known, mask, shape, start.device, "cascade")) is not None:
                planes = start[:, self.channels :].expand(-1, -1, *shape[2:])
                known = torch.cat([held[0], planes], 1)
                mask = torch.cat([held[1], torch.zeros_like(planes, dtype=torch.bool)], 1)
        results = self.run(
            start, seed=seed, first_sample=first_sample, first_step=first_step, purpose=purpose, mask=mask,
            known=known, langevin=None if langevin is None else self._per_net(langevin), callback=callback,
            cycles=self._checked_cycles(cycles, "cascade"), precision=precision, backend=backend, graph=graph,
        )  # fmt: skip
        return [x[:, : self.channels].contiguous() for x in results] if self.classes else results

    def run(
        self,
        start: Tensor,  # (N, C + K, 1, 1) float32
        *,
        grids: int | None = None,
        langevin: Sequence[Langevin] | None = None,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        first_step: int | Sequence[int] = 0,
        cycles: Sequence[int] = (),
        **options: Any,
    ) -> list[Tensor]:
        """`cascade` of what the nets take: images with their label planes, at every size, or of the `grids` coarsest
        nets alone. `options` as there."""
        grids = len(self.nets) if grids is None else grids
        if self.classes and mask is None:
            known, mask = self.held_planes(start, grids)
        dynamics = (self.langevin if langevin is None else langevin)[:grids]

        def climb(first: int, x: Tensor, first_step: int | Sequence[int]) -> list[Tensor]:
            """The chains of the grids after `first`, from x on."""
            return cascade(
                list(self.nets[first:grids]), self.sizes[first : 1 + grids], dynamics[first:], x, mask=mask,
                known=known, first_step=first_step, upsampling=self.upsampling, first_grid=first, **options,
            )  # fmt: skip

        results = climb(0, start, first_step)
        for turn, size in enumerate(cycles, start=1):
            begun = first_step if isinstance(first_step, Sequence) else [first_step] * grids
            steps = [step + turn * chain.steps for step, chain in zip(begun, dynamics, strict=True)]
            first = self.sizes.index(size)
            (means,) = ops.pyramid(results[-1], [size])
            results[first:] = climb(first, means, steps[first:])
        return results

    def moving(self) -> Tensor:  # (C + K, 1, 1) bool
        """The mask of chains that move images and hold their label planes."""
        places = torch.arange(self.channels + len(self.classes), device=self.colours.device)
        return (places < self.channels)[:, None, None]

    def held_planes(self, start: Tensor, grids: int | None = None) -> tuple[Tensor, Tensor]:  # (N, C + K, s, s)
        """(known, mask) of chains that hold the label planes of their starts and no pixel, as `cascade` takes them; of
        the `grids` coarsest nets alone where that is given."""
        size = self.sizes[-1 if grids is None else grids]
        return start[:, :, :1, :1].expand(-1, -1, size, size), self.moving()  # a plane is alike in every pixel

    def with_planes(self, images: Tensor, labels: Tensor) -> Tensor:  # (N, C, s, s), (N,) -> (N, C + K, s, s)
        """Images with their label planes, float32, as the nets of a class-conditional model take them; bytes are
        brought to its units."""
        images = self.from_uint8(images) if images.dtype == torch.uint8 else images
        low, high = self.value_range
        own = labels[:, None] == torch.arange(len(self.classes), device=labels.device)
        planes = _PLANE * (high - low) * own[:, :, None, None].to(images.device, images.dtype)
        return torch.cat([images, planes.expand(-1, -1, *images.shape[2:])], 1)

    def class_energies(self, x: Tensor, *, reference: bool = False) -> dict[int, Tensor]:
        """E(x, y) of every class at every size that has a net, {size: (N, K) float32}, of a class-conditional model;
        arguments and errors as `energies`'.

        `energies` are −log Σ_y exp(−E(x, y)) then. The class of the lowest sum over the sizes is the model's guess.
        """
        if not self.classes:
            raise ValueError("class_energies: the model must be class-conditional, got one without classes")
        return self._by_size(x, reference, self._class_energies, "class_energies")

    def _class_energies(self, x: Tensor, reference: bool) -> list[Tensor]:
        x = self.in_units(x)
        labels = torch.arange(len(self.classes), device=x.device)
        by_class = [super(MultiGrid, self)._energies(self.with_planes(x, y.expand(len(x))), reference) for y in labels]
        return [torch.stack(of_size, 1) for of_size in zip(*by_class, strict=True)]

    def _energies(self, x: Tensor, reference: bool) -> list[Tensor]:
        if not self.classes:
            return super()._energies(x, reference)
        return [-torch.logsumexp(-energies, 1) for energies in self._class_energies(x, reference)]

    def _check_labels(self, labels: int | Tensor, n: int, where: str) -> Tensor:
        if not self.classes:
            return super()._check_labels(labels, n, where)
        most = len(self.classes) - 1
        if is_int(labels, 0):
            labels = torch.full((n,), int(labels))
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (n,):
            got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else repr(labels)
            raise Refused("labels", f"be a class number, or an int64 tensor ({n},) of them", got, where)
        if n and not 0 <= int(labels.min()) <= int(labels.max()) <= most:
            got = f"{int(labels.min())} to {int(labels.max())}"
            raise Refused("labels", f"be from 0 to {most}, numbers in `classes`", got, where)
        return labels.to(self.colours.device)

    def draw_labels(self, n: int, *, seed: int, first_sample: int = 0) -> Tensor:
        """The classes (n,) int64 of the samples that `sample` draws where it is given none."""
        return self.labels[self._draw_rows(len(self.colours), n, seed=seed, first_sample=first_sample)]

    def _starts(self, group: Group) -> tuple[Tensor, Tensor | None]:
        """Colours that the chains of a group start from, and their classes."""
        place = {"seed": group.seed, "first_sample": group.first_sample}
        if not self.classes:
            return self.draw_colours(group.n, **place), None
        if group.labels is None:
            rows = self._draw_rows(len(self.colours), group.n, **place)
            return self.colours[rows][:, :, None, None], self.labels[rows]
        rows = torch.empty_like(group.labels)
        for label in group.labels.unique().tolist():
            members = (self.labels == label).nonzero()[:, 0]
            if not len(members):
                raise Refused("labels", "be of classes that the stored colours have", self.classes[label], "sample")
            own = group.labels == label
            rows[own] = members[self._draw_rows(len(members), group.n, **place)[own]]
        return self.colours[rows][:, :, None, None], group.labels

    def _sample_group(self, group: Group) -> list[Tensor]:
        if self.cycles and isinstance(group.graph, graphs.Session) and group.graph.on is not None:
            raise Refused("pipeline", "be False for a model with V-cycles", True, "sample")
        start, labels = self._starts(group)
        return self.cascade(
            start, labels=labels, seed=group.seed, first_sample=group.first_sample,
            langevin=self.chains(group.length), mask=group.mask, known=group.known, callback=group.callback,
            cycles=self.cycles, **group.engine,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        steps = list(self.sample_steps) if isinstance(self.sample_steps, tuple) else self.sample_steps
        own: dict[str, Any] = {"sample_steps": steps, "denoise": self.denoise, "cycles": list(self.cycles)}
        own["upsampling"] = None if self.upsampling == "nearest" else self.upsampling
        return super().config() | {name: value for name, value in own.items() if value}

    @classmethod
    def from_config(cls: type[AnyEnergyModel], config: Mapping[str, Any]) -> AnyEnergyModel:
        names = ("classes", "sample_steps", "denoise", "upsampling", "cycles")
        own = {name: config[name] for name in names if name in config}
        return cls(config["sizes"], **own, **cls._arguments(config))

    @classmethod
    def _loadable(cls) -> list[type[Any]]:
        """Models of one net as well: this is the class that most programs load by."""
        every: Any = EnergyModel  # abstract, which mypy does not pass on
        return [*_family(cls), *(found for found in _family(every) if not issubclass(found, cls))]
