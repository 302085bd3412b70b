"""Langevin dynamics: a frozen description, and the function that runs a chain of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..errors import Refused
from ..gradient.plan import Energy
from ..ops import varying
from ..ops.update import Number, Update, update
from .arguments import as_numbers_, check_reference, count
from .chain import Callback, Ids
from .explanation import Explanation, explained
from .graphs import Graph, session_of
from .running import prepare


@dataclasses.dataclass(frozen=True)
class Langevin:
    """K steps of x ← clamp( x − drift·(clip(∇E(x), ±c) + (x − m)/σ²) + noise_std·ε ),  ε ~ N(0, I).

    Coupled form: `step_size` δ and `noise_scale` τ give drift = δ²/2 and noise_std = τδ (τ = 0: noise-free descent).
    Decoupled form: `drift` and `noise_std` as they are. Exactly one form.

    Args:
        steps: K ≥ 1.
        reference_std, reference_mean: σ and m of the Gaussian reference N(m, σ²I); None: no reference.
        grad_clamp: c, a bound on every entry of ∇E; None: none.
        clamp: (low, high), bounds on the pixels after every step; None: none.

    `step_size`, `noise_scale`, `drift`, `noise_std` and `reference_std` may also be a `Schedule`, K values (a list, a
    1-D tensor or array), a value a sample (a tensor (N,)), or both, (K, N) with either dimension 1 where it is equal;
    `reference_mean` a tensor that broadcasts to x: the reference is then a tether to given images. In parts of a chain
    (`first_step`) a schedule is that of the part.

    Source: Xie, Lu, Zhu, Wu (ICML 2016), §3; the decoupled form is that of IGEBM and of short-run chains.
    """

    steps: int
    step_size: Any = None  # float, or what varies (`ops.varying`), as the next four
    noise_scale: Any = 1.0
    drift: Any = None
    noise_std: Any = None
    reference_std: Any = None
    reference_mean: Any = 0.0  # float or tensor
    grad_clamp: float | None = None
    clamp: tuple[float, float] | None = None
    _checked: ClassVar[Update]  # of an instance, with 1 for what varies
    _by_step: ClassVar[Update | None] = None  # on a CPU, where no sample differs, once asked for

    def __post_init__(self) -> None:
        as_numbers_(self, "clamp")
        count(self.steps, "steps", "Langevin")
        fields = self._numbers()
        for name in _varying(fields):
            value = fields[name]
            if name != "reference_mean":
                varying.values_of(value, name, "Langevin", positive=name in ("step_size", "reference_std"))
                if isinstance(value, tuple):
                    varying.check_length(value, name, self.steps, "Langevin")
                fields[name] = 1.0
            elif self.reference_std is None:
                raise Refused(name, "be given with reference_std", "a tensor alone", "Langevin")
            else:
                fields[name] = 0.0
        checked = update(where="Langevin", **fields)
        if checked.drift == 0:
            raise Refused("drift", "be > 0", 0.0, "Langevin")
        object.__setattr__(self, "_checked", checked)

    def _numbers(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["steps"]
        return fields

    @property
    def varying(self) -> tuple[str, ...]:
        """The names of the numbers that differ from step to step, sample to sample or element to element."""
        return _varying(self._numbers())

    def update(self, x: Tensor | None = None, where: str = "Langevin") -> Update:
        """The checked numbers, in the decoupled form, for chains on tensors like x; without x none may vary."""
        if self._by_step is not None and x is not None and x.is_cpu:
            return self._by_step
        numbers = self._numbers()
        if not (names := _varying(numbers)):
            return self._checked
        if x is None:
            raise Refused(names[0], "be a number here, the same for all", "one that varies", where)
        if not x.is_cpu or any(isinstance(numbers[name], (Tensor, np.ndarray)) for name in names):
            return update(where=where, x=x, steps=self.steps, **numbers)
        table, nan = torch.tensor(self.table(), dtype=torch.float64).float()[:, None], math.nan
        found = dataclasses.replace(self._checked, drift=nan, noise_std=nan, inverse_variance=nan, table=table)
        object.__setattr__(self, "_by_step", found)
        return found

    def by_step(self) -> list[Update]:
        """The numbers of each step; of the first alone where none vary. Refused where samples differ in one."""
        if not self.varying:
            return [self.update()]
        if varying.is_varying(self.reference_mean):
            raise Refused("reference_mean", "be a number here", "a tensor", "Langevin")
        numbers = self.update(torch.empty(1, 1))
        assert numbers.table is not None
        return [
            dataclasses.replace(numbers, drift=drift, noise_std=std, inverse_variance=inverse_variance, table=None)
            for drift, std, inverse_variance in numbers.table[:, 0].tolist()
        ]

    def table(self, factor: float = 1.0) -> list[tuple[float, float, float]]:
        """(drift, noise_std, 1/σ²) of each step, where all are alike of the first alone, with the noise times `factor`.

        Without tensors, and not rounded to float32; for numbers that are the same for all samples."""

        def values(value: Any, scale: float | None = None) -> Sequence[float]:
            if scale is not None:
                value = tuple(v * scale for v in value) if isinstance(value, tuple) else value * scale
            given = varying.listed(value, self.steps)
            return given if isinstance(given, (tuple, list)) else [given] * length

        length = self.steps if self.varying else 1
        if self.step_size is None:
            drift, noise_std = values(self.drift), values(self.noise_std, factor)
        else:
            sizes = values(self.step_size)
            drift = [size**2 / 2 for size in sizes]
            noise_std = [scale * size for scale, size in zip(values(self.noise_scale, factor), sizes, strict=True)]
        stds = values(math.inf if self.reference_std is None else self.reference_std)
        return list(zip(drift, noise_std, [1.0 / std**2 for std in stds], strict=True))

    def of_length(self, steps: int) -> Langevin:
        """The chain of `steps` steps in place of K. What is a list is stretched: linear interpolation at equal shares
        of the chain."""
        found: dict[str, Any] = {}
        for name in self.varying if steps != self.steps else ():
            if isinstance(values := getattr(self, name), tuple):
                stretched = np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, self.steps), values)
                found[name] = tuple(stretched.tolist())
        return dataclasses.replace(self, steps=steps, **found)

    def settled(self) -> Langevin:
        """The chain whose numbers are, at every step, what they are at the last: what goes on where this one ended."""
        values = {name: varying.listed(getattr(self, name), self.steps) for name in self.varying}
        found: dict[str, Any] = {name: value[-1] for name, value in values.items() if isinstance(value, (list, tuple))}
        return dataclasses.replace(self, **found)

    def denoised(self, steps: int) -> Langevin:
        """The chain whose last `steps` steps have no noise."""
        name = "noise_std" if self.step_size is None else "noise_scale"
        value, first = varying.listed(getattr(self, name), self.steps), max(0, self.steps - steps)
        values = value if isinstance(value, (tuple, list)) else [value] * self.steps
        found: dict[str, Any] = {name: (*values[:first], *[0.0] * (self.steps - first))}
        return dataclasses.replace(self, **found)

    def __call__(
        self,
        energy: Energy,
        x: Tensor,  # (N, ...) float32
        *,
        mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        first_sample: Ids = 0,
        first_step: int | Tensor = 0,
        stream: int = 0,
        precision: str = "auto",
        backend: str = "auto",
        graph: Graph = None,
        compile: bool | str = False,
        callback: Callback | None = None,
        where: str = "langevin_sample",
    ) -> Tensor:
        """The state after `steps` steps from x; arguments as in `langevin_sample`; `where` starts error messages.

        In a training loop leave `seed` out: every call then has noise of its own.
        """
        chain = prepare(
            energy, x, self.steps, self, mask=mask, seed=seed, generator=generator, first_sample=first_sample,
            first_step=first_step, stream=stream, precision=precision, backend=backend, compile=compile, where=where,
            graph=session_of(graph, callback, where), together=None if callback is None else 1,
        )  # fmt: skip
        return chain.run(x, self.steps, callback)

    def trajectory(
        self,
        energy: Energy,
        x: Tensor,  # (N, ...) float32
        *,
        every: int = 1,
        mask: Tensor | None = None,
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        first_sample: Ids = 0,
        first_step: int | Tensor = 0,
        stream: int = 0,
        precision: str = "auto",
        backend: str = "auto",
        compile: bool | str = False,
    ) -> Iterator[tuple[int, Tensor]]:
        """Yields (step, copy of the state) after every `every` steps, and after the last one.

        Arguments as in `langevin_sample`; in a training loop leave `seed` out.
        `step` is the noise counter of the step just made, first_step + k. It streams: a state is computed when it is
        asked for, and none is kept. Between two states the energy's parameters are as the caller left them.
        """
        every = count(every, "every", "trajectory")
        # Not a generator function itself, so that wrong arguments raise here and not at the first next().
        chain = prepare(
            energy, x, self.steps, self, mask=mask, seed=seed, generator=generator, first_sample=first_sample,
            first_step=first_step, stream=stream, precision=precision, backend=backend, together=every,
            compile=compile, where="trajectory",
        )  # fmt: skip
        return chain.snapshots(x, self.steps, every)

    def explain(
        self,
        energy: Energy,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        precision: str = "auto",
        backend: str = "auto",
        graph: bool | None = None,
        compile: bool | str = False,
    ) -> Explanation:
        """What a chain on (energy, x) would run, and why: the numbers of the update, the gradient's plan and its
        precision with why a faster one does not run, the update's backend, whether a CUDA graph holds the chain, and
        whether the samples of a batch are coupled. Raises what a run would raise of its arguments; draws no noise."""
        prepared = prepare(
            energy, x, self.steps, self, mask=mask, seed=0, precision=precision, backend=backend, graph=graph,
            compile=compile, where="explain",
        )  # fmt: skip
        chain, graph_of = prepared.chain, prepared.graph
        numbers = chain.numbers
        parts = [f"{self.steps} steps", f"drift {_shown(numbers, 0)}", f"noise_std {_shown(numbers, 1)}"]
        if self.reference_std is not None:
            mean = f"{self.reference_mean:g}" if numbers.means is None else f"tensor {tuple(numbers.means.shape)}"
            std = "of varying std" if varying.is_varying(self.reference_std) else f"{self.reference_std:g}²"
            parts.append(f"reference N({mean}, {std})")
        if self.grad_clamp is not None:
            parts.append(f"gradient clipped at ±{self.grad_clamp:g}")
        if self.clamp is not None:
            parts.append(f"pixels clamped to [{self.clamp[0]:g}, {self.clamp[1]:g}]")
        if mask is not None:
            parts.append("pixels held where the mask is False")
        why = "named" if backend != "auto" else f"the fastest that is usable for {x.device.type} tensors"
        captured = f"no, because {graph_of}" if isinstance(graph_of, str) else graph_of.explain()
        return explained(energy, x, chain.plan, ", ".join(parts), f"{chain.backend} backend, {why}", captured)


def _varying(numbers: dict[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, value in numbers.items() if name != "clamp" and varying.is_varying(value))


def _shown(numbers: Update, index: int) -> str:
    """The drift (0) or noise_std (1), as `explain` has it."""
    if numbers.table is None:
        return f"{numbers.arguments[index]:g}"
    low, high = numbers.table[..., index].aminmax()
    if low == high:
        return f"{float(low):g}"
    kinds = [kind for kind, count in zip(("step", "sample"), numbers.table.shape) if count > 1]
    return f"{float(low):g} to {float(high):g} by {' and '.join(kinds)}"


# A loop calls with the same numbers every time: they are checked once. 1 and True, or 1.0, are not the same.
_PLAIN = frozenset((int, float, type(None)))
_described = functools.lru_cache(maxsize=256, typed=True)(Langevin)


def langevin_sample(
    energy: Energy,
    x: Tensor,  # (N, C, *spatial) float32, any layout
    *,
    steps: int,
    step_size: Number | None = None,
    noise_scale: Number = 1.0,
    drift: Number | None = None,
    noise_std: Number | None = None,
    reference_std: Number | None = None,
    reference_mean: float | Tensor = 0.0,
    grad_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_sample: Ids = 0,
    first_step: int | Tensor = 0,
    stream: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    graph: bool | None = None,
    compile: bool | str = False,
    callback: Callback | None = None,
) -> Tensor:
    """Run a Langevin chain on each sample of x: a drop-in for a hand-written loop.

        x ← clamp( x − drift·(clip(∇E(x), ±grad_clamp) + (x − m)/σ²) + noise_std·ε ),   `steps` times

    Args:
        energy: a module or any callable (N, ...) -> (N,), the energies, low where data are likely, without the
            reference's part. Its parameters need no gradient during the chain; train and eval mode are left alone.
        x: the start, in the model's pixel units; left untouched.
        steps … clamp: the dynamics, as in `Langevin`; its numbers may be schedules, or a value a sample.
        mask: bool, broadcastable to x, True = updated; held pixels keep their bits. Noise counters do not change.
        seed, first_sample, first_step, stream: the noise of sample i at step k is a function of (seed,
            first_sample + i, first_step + k, stream, pixel) alone. So 30 steps are 10 and then 20 with first_step=10,
            and a batch of 8 has the noise of 4 and then 4 with first_sample=4. `first_sample` may be N ids.
        generator: what seed=None, the default, draws the seed of this call from: torch's global CPU generator where
            none is given, so that `torch.manual_seed` makes a program repeat.
        precision: of the gradient, "auto", "fp32", "bf16" or "fp16" (docs/langevin.md). State and update are float32.
        backend: of the update, "auto", "native", "triton" or "reference".
        graph: None: on CUDA devices the chain of a stack of convolutions is captured in a CUDA graph at its
            second run, and replayed from then on. True: that of any module (its code must not wait for the device), or
            an error that says why not. False: no graph. Results are the same bit for bit.
        compile: True: an energy that only autograd can take runs through torch.compile, with "bf16" or "fp16" as
            `precision` in 16 bits by torch.autocast. Its gradient at x is compared with the energy's own once. Or the
            name of one of torch.compile's backends.
        callback: callback(step, x) after each step, with step = first_step + k and x the live state; copy it to
            keep it.

    In a training loop leave `seed` out: every call then has noise of its own. With a fixed seed every call has the same
    noise, unless `first_step` counts on (first_step=iteration·K).

    Returns:
        The last state, float32, a new tensor of x's shape without a graph.

    Raises:
        TypeError, ValueError: an argument is not as above, or the energy does not return shape (N,).
        DivergenceError: the chain became non-finite; the message names the step.
        BackendError: a precision, a backend or compile was asked for and cannot be had; the message says why.
        BatchTooLargeError: the batch does not fit in memory, and batch statistics couple its samples. Other batches
            are split, with a warning.
    """
    numbers = (steps, step_size, noise_scale, drift, noise_std, reference_std, reference_mean, grad_clamp)
    bounds = () if clamp is None else clamp if type(clamp) is tuple else (clamp,)
    plain = _PLAIN.issuperset(map(type, (*numbers, *bounds))) and not torch.compiler.is_compiling()
    check_reference(reference_std, reference_mean, "langevin_sample")
    return (_described if plain else Langevin)(*numbers, clamp)(
        energy, x, mask=mask, seed=seed, generator=generator, first_sample=first_sample, first_step=first_step,
        stream=stream, precision=precision, backend=backend, graph=graph, compile=compile, callback=callback,
    )  # fmt: skip
