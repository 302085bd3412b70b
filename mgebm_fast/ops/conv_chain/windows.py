"""Which inputs each output of a convolution reads, for any number of dimensions, stride, padding and dilation.

Outputs that read the same taps at the same offsets form a class; a tap outside the map is left out. A dimension is
solved alone and the classes of a map are the products of its dimensions' classes. `StageLike` is what the
engine asks of a convolution.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

EDGE_PIXELS = 4  # kEdgePixels of csrc/ops/conv_chain/conv_chain.h


class NormLike(Protocol):
    """Batch statistics: y = weight (z − mean) / √(var + eps) + bias."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def bias(self) -> Tensor: ...
    @property
    def eps(self) -> float: ...


class StageLike(Protocol):
    """One convolution and what follows it, as `gradient.stack.Stage` describes it."""

    @property
    def weight(self) -> Tensor: ...  # (out, in, *kernel) float32
    @property
    def bias(self) -> Tensor | None: ...  # (out,)
    @property
    def stride(self) -> tuple[int, ...]: ...
    @property
    def padding(self) -> tuple[int, ...]: ...
    @property
    def dilation(self) -> tuple[int, ...]: ...
    @property
    def norm(self) -> NormLike | None: ...
    @property
    def activation(self) -> str: ...  # a key of conv_chain.ACTIVATIONS
    @property
    def slope(self) -> float: ...  # of leaky_relu
    @property
    def shortcut(self) -> int | None: ...  # the stage whose z it adds to the z of the stage after it
    @property
    def in_size(self) -> tuple[int, ...]: ...
    @property
    def out_size(self) -> tuple[int, ...]: ...


def tensors_of(stage: StageLike, where: str) -> list[Tensor]:
    """The weight, and what there is of bias and normalisation, which have one number an output channel."""
    vectors = {} if stage.bias is None else {"bias": stage.bias}
    if stage.norm is not None:
        vectors |= {"norm.weight": stage.norm.weight, "norm.bias": stage.norm.bias}
    wanted = (stage.weight.shape[0],)
    for name, vector in vectors.items():
        if tuple(vector.shape) != wanted:
            raise ValueError(f"{where}: a stage's {name} must be {wanted}, got {tuple(vector.shape)}")
    return [stage.weight, *vectors.values()]


# One dimension: {taps of a class: [(output index, base input index), …]}, a tap being (weight key, offset from base).
_Axis = dict[tuple[tuple[Any, int], ...], list[tuple[int, int]]]


@dataclasses.dataclass(frozen=True)
class Windows:
    """The tables of csrc/ops/conv_chain/conv_chain.h, int32; `rows` holds the key of each row of packed weights."""

    first_tap: Tensor
    tap_pixel: Tensor
    tap_weight: Tensor
    first_output: Tensor
    base: Tensor
    output: Tensor
    rows: tuple[tuple[Any, ...], ...]
    kernel: tuple[int, ...]  # of a convolution; its rows' keys are indices into it

    @property
    def nbytes(self) -> int:
        tables = (self.first_tap, self.tap_pixel, self.tap_weight, self.first_output, self.base, self.output)
        return sum(table.nbytes for table in tables) + 100 * len(self.rows)

    @functools.cached_property
    def offsets(self) -> Tensor:  # (rows,) int64; of an edge (rows, its pixels)
        """Each row's tap by its place in the kernel, row-major; −1 for an edge's that is none."""

        def place(row: Sequence[Any]) -> Any:
            if not any(isinstance(taps, tuple) for taps in row):
                return ravel(row, self.kernel)
            each = itertools.product(*(taps if isinstance(taps, tuple) else (taps,) for taps in row))
            return [-1 if min(taps) < 0 else ravel(taps, self.kernel) for taps in each]

        return torch.from_numpy(np.asarray([place(row) for row in self.rows], dtype=np.int64))

    @functools.cached_property
    def arguments(self) -> tuple[int, ...]:
        """Classes, outputs, and the tables' addresses."""
        tables = (self.first_tap, self.tap_pixel, self.tap_weight, self.first_output, self.base, self.output)
        return len(self.first_tap) - 1, len(self.output), *(table.data_ptr() for table in tables)


def ravel(index: Sequence[Any], size: Sequence[int]) -> int:
    """The place of an index in row-major order."""
    flat = 0
    for at, length in zip(index, size, strict=True):
        flat = flat * length + int(at)
    return flat


def axis_of(found: list[list[tuple[Any, int]]]) -> _Axis:
    """From the (key, input) pairs of each output; an output that reads nothing has base 0."""
    classes: _Axis = {}
    for output, taps in enumerate(found):
        base = min((at for _, at in taps), default=0)
        classes.setdefault(tuple((key, at - base) for key, at in taps), []).append((output, base))
    return classes


def _forward_axis(inputs: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
    """Output o reads input o·stride − padding + t·dilation by tap t."""
    reads = [[(t, o * stride - padding + t * dilation) for t in range(kernel)] for o in range(outputs)]
    return axis_of([[(t, at) for t, at in taps if 0 <= at < inputs] for taps in reads])


def _reading(inputs: int, outputs: int, kernel: int, stride: int, padding: int, dilation: int) -> list[dict[int, int]]:
    """For each input, {output that reads it: tap}."""
    readers: list[dict[int, int]] = [{} for _ in range(inputs)]
    for o in range(outputs):
        for t in range(kernel):
            at = o * stride - padding + t * dilation
            if 0 <= at < inputs:
                readers[at][o] = t
    return readers


def _backward_axis(*geometry: int) -> _Axis:
    return axis_of([[(t, o) for o, t in sorted(readers.items())] for readers in _reading(*geometry)])


def _edge_axis(*geometry: int) -> _Axis:
    """Runs of EDGE_PIXELS inputs; a key holds the tap by which each of them is read, −1 where it is not."""
    readers = _reading(*geometry)
    runs: list[list[tuple[Any, int]]] = []
    for start in range(0, len(readers), EDGE_PIXELS):
        run = readers[start : start + EDGE_PIXELS]
        run += [{}] * (EDGE_PIXELS - len(run))
        outputs = sorted(set().union(*run))
        runs.append([(tuple(pixel.get(o, -1) for pixel in run), o) for o in outputs])
    return axis_of(runs)


def product(
    axes: Sequence[_Axis], read_size: Sequence[int], out_size: Sequence[int], kernel: tuple[int, ...] = ()
) -> Windows:
    """The classes of a map from those of its dimensions; `read_size` is the map that is read."""
    rows: dict[tuple[Any, ...], int] = {}
    first_tap, first_output = [0], [0]
    pixels: list[int] = []
    weights: list[int] = []
    bases, outputs = [], []

    def products(parts: Sequence[Sequence[int]], size: Sequence[int]) -> np.ndarray:
        total = np.zeros((1,) * len(parts), dtype=np.int64)
        for axis, part in enumerate(parts):
            shape = [1] * len(parts)
            shape[axis] = -1
            total = total * size[axis] + np.asarray(part, dtype=np.int64).reshape(shape)
        return total.reshape(-1)

    for classes in itertools.product(*(axis.items() for axis in axes)):
        taps = [taps for taps, _ in classes]
        pixels += products([[offset for _, offset in part] for part in taps], read_size).tolist()
        for keys in itertools.product(*([key for key, _ in part] for part in taps)):
            weights.append(rows.setdefault(keys, len(rows)))
        outputs.append(products([[output for output, _ in places] for _, places in classes], out_size))
        bases.append(products([[base for _, base in places] for _, places in classes], read_size))
        first_tap.append(len(weights))
        first_output.append(first_output[-1] + len(outputs[-1]))

    def table(values: Sequence[int] | np.ndarray) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int32))

    return Windows(
        table(first_tap), table(pixels), table(weights), table(first_output), table(np.concatenate(bases)),
        table(np.concatenate(outputs)), tuple(rows), kernel,
    )  # fmt: skip


Sizes = tuple[int, ...]
_KEPT_BYTES = 64 << 20
_lock = threading.Lock()


class Tables(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Tables)
_kept: collections.OrderedDict[tuple[Any, ...], Tables] = collections.OrderedDict()


def remembered(make: Callable[..., T]) -> Callable[..., T]:
    """`make`, whose latest results are kept while they take at most _KEPT_BYTES in all: those of many sizes may take
    gigabytes."""

    @functools.wraps(make)
    def found(*geometry: Sizes) -> T:
        key = (make.__name__, *geometry)
        with _lock:
            if key in _kept:
                _kept.move_to_end(key)
                return cast(T, _kept[key])
        made = make(*geometry)
        with _lock:
            _kept[key] = made
            while len(_kept) > 1 and sum(tables.nbytes for tables in _kept.values()) > _KEPT_BYTES:
                _kept.popitem(last=False)
        return made

    return found


@remembered
def forward_windows(
    inputs: Sizes, outputs: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Windows:
    """The convolution: rows are taps (one index a dimension), outputs the map's pixels."""
    axes = [_forward_axis(*axis) for axis in zip(inputs, outputs, kernel, stride, padding, dilation, strict=True)]
    return product(axes, inputs, outputs, kernel)


@remembered
def backward_windows(
    inputs: Sizes, outputs: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Windows:
    """Its data gradient: what is read is the map of outputs, what is made that of inputs."""
    axes = [_backward_axis(*axis) for axis in zip(inputs, outputs, kernel, stride, padding, dilation, strict=True)]
    return product(axes, outputs, inputs, kernel)


@remembered
def edge_windows(
    inputs: Sizes, outputs: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Windows:
    """The data gradient in runs of EDGE_PIXELS pixels along the last dimension, for the state."""
    geometry = list(zip(inputs, outputs, kernel, stride, padding, dilation, strict=True))
    axes = [_backward_axis(*axis) for axis in geometry[:-1]] + [_edge_axis(*geometry[-1])]
    runs = -(-inputs[-1] // EDGE_PIXELS)
    return product(axes, outputs, (*inputs[:-1], runs), kernel)


def in_patches(channels: int, size: Sizes) -> bool:
    """Whether an edge's outputs are patches of EDGE_PIXELS × EDGE_PIXELS pixels: of a single channel, runs would leave
    three quarters of a strip empty."""
    return channels == 1 and len(size) > 1


@remembered
def patch_windows(
    inputs: Sizes, outputs: Sizes, kernel: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
) -> Windows:
    """The data gradient in patches along the last two dimensions, for the state."""
    geometry = list(zip(inputs, outputs, kernel, stride, padding, dilation, strict=True))
    axes = [_backward_axis(*axis) for axis in geometry[:-2]] + [_edge_axis(*axis) for axis in geometry[-2:]]
    return product(axes, outputs, (*inputs[:-2], *(-(-length // EDGE_PIXELS) for length in inputs[-2:])), kernel)
