"""Which of the plans that can run a stack of convolutions on a CPU is the fastest.

The native engine of stacks works on blocks of sixteen samples, that of graphs on rows of samples and pixels alike,
and the conv plan by torch's convolutions. Where samples are independent, no bit of a sample may depend on the batch
that it is in. With AMX both engines give a stack the same bits in bfloat16: there that of graphs takes small batches,
which would leave most of a block empty, where there are steps enough to make up for its packing, and that of stacks
the rest, at up to twice the speed. Elsewhere the net alone decides: up to maps of 8×8 pixels the engine of stacks is
up to twice as fast, and fast enough with a single sample; on larger maps the two are level from sixteen samples on,
and below the engine of stacks is up to eight times slower, which is slower than torch's convolutions. A dense layer
on a larger map is slow there for any batch: each of its pixels is a class of windows.
(`pytest bench/ops`.)
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Container, Iterator

from torch import Tensor

from ... import native
from ...ops.graph_chain import layers
from ...ops.graph_chain.forward import pays_in_bfloat
from ...ops.graph_chain.graph import Graph
from ..stack import Stack, Stage
from .tape import memory_of

_settled: contextvars.ContextVar[bool] = contextvars.ContextVar("_settled", default=False)
BLOCK = 16  # samples of a block of the engine of stacks
FEW = 8  # samples for which that of graphs is faster on larger maps
SMALL_MAP = 64  # pixels
LARGE_MAP = 64 * 64  # with bfloat16 where bits differ
# A block that is not full costs as much as a full one. Packing a graph takes longer than packing a stack, and pays
# where so many multiplications, over all steps, would be spent on samples that are not there.
WORTH_PACKING = 150_000_000


@contextlib.contextmanager
def settled_batch() -> Iterator[None]:
    """Inside, a sample's bits may depend on how many are in its batch, as in training, where that is settled: the
    engine of stacks then takes whole blocks on larger maps too, where it is up to a quarter faster."""
    token = _settled.set(True)
    try:
        yield
    finally:
        _settled.reset(token)


def fastest(stack: Stack, samples: int, precision: str, steps: int = 1) -> tuple[str, str]:
    """("native" | "graph" | "conv", why not "native"); `steps`, made in one call, decide only between engines that give
    the same bits."""
    largest = max(math.prod(size) for stage in stack.stages for size in (stage.in_size, stage.out_size))
    normed = any(stage.norm is not None for stage in stack.stages)
    if not normed and has_large_dense(stack):
        return "graph", f"the engine of stacks is slow for a dense layer on a map of more than {SMALL_MAP} pixels"
    if precision == "bf16" and largest > SMALL_MAP and _bits_agree(stack):
        each = sum(math.prod(stage.out_size) * stage.weight.numel() for stage in stack.stages)
        if samples > FEW or steps * (BLOCK - samples) * each < WORTH_PACKING:
            return "native", ""
        return "graph", f"the engine of stacks takes blocks of {BLOCK} samples, x has {samples}"
    small = SMALL_MAP if precision == "fp32" else LARGE_MAP
    if largest <= small or (_settled.get() and samples % BLOCK == 0):
        return "native", ""
    if not normed:
        return "graph", f"the engine of stacks is made for maps of up to {small} pixels, one here has {largest}"
    if samples >= BLOCK:
        return "native", ""
    return "conv", f"with batch statistics the native engine takes blocks of {BLOCK} samples, x has {samples}"


def has_large_dense(stack: Stack) -> bool:
    """Whether a convolution covers a map that is not small: a dense layer on it."""
    return any(
        math.prod(stage.in_size) > SMALL_MAP and tuple(stage.weight.shape[2:]) == stage.in_size
        for stage in stack.stages
    )


def _bits_agree(stack: Stack) -> bool:
    """Whether the two engines give a sample the same bits in bfloat16: they do by AMX, whose sums have no parts, where
    functions are computed alike and both round the operands of all products but those of x."""

    def alike(place: int, stage: Stage) -> bool:
        outputs, inputs, *kernel = stage.weight.shape
        channels = (outputs,) if place == 0 else (outputs, inputs)
        rounded = all(pays_in_bfloat(math.prod(kernel), c) for c in channels)
        same = stage.activation != "leaky_relu" or stage.slope >= 0
        return rounded and same and stage.norm is None and stage.shortcut is None

    # What is linear up to the energy, that of graphs takes as known, in float32.
    open_top = stack.stages[-1].activation == "none"
    return native.isa() == "amx" and not open_top and all(alike(*stage) for stage in enumerate(stack.stages))


def gains_by_bfloat(graph: Graph) -> bool:
    """Whether products of bfloat16 are a large part of the work: a convolution of some channels over a map. A dense
    energy of a few features is faster in float32 as it is, and often one whose law is to hold closely."""
    return any(
        isinstance(layer, layers.Convolution) and min(layer.weight.shape[:2]) >= 16 and layer.out.pixels > 1
        for layer in graph.layers
    )


# Entries of the matrices of ops that sum elements, many of them zeros. On one core with AVX2 a product of images of
# 3×14×14 by such a matrix takes as long as autograd of the op, with five samples.
MAX_SUMMING = 1 << 18


@dataclasses.dataclass(frozen=True)
class Work:
    """Seconds on one core, roughly: of reading a graph, and of a step by autograd, for the call and for each sample."""

    reading: float
    step: float
    sample: float

    def pays(self, samples: int, steps: int) -> bool:
        """Whether so many steps, made by the engine in half of the time, save more than reading takes."""
        return 0.5 * steps * (self.step + samples * self.sample) > self.reading


def work_of(graph: Graph) -> Work:
    """By the layers that an op of torch's takes 40 µs for, products at 10 GFLOP/s, and what a reading of each takes."""
    products = sum(count for _, count in _products(graph))
    moved = sum(len(layer.places) for layer in graph.layers if isinstance(layer, layers.Rearrange))
    numbers = sum(layer.out.channels * layer.out.pixels for layer in graph.layers)
    count = len(graph.layers)
    return Work(5e-3 * count + 5e-5 * moved, 4e-5 * count, 2.4e-10 * products + 2e-9 * numbers)


def _products(graph: Graph) -> Iterator[tuple[Tensor, int]]:
    """The weights of every layer with a kernel, and how many products it makes of a sample."""
    for layer in graph.layers:
        if isinstance(layer, layers.Kernel):
            over = graph.value(layer.inputs[0]) if isinstance(layer, layers.Transposed) else layer.out
            yield layer.weight, layer.weight.numel() * over.pixels


def why_slow(graph: Graph, matrices: Container[int]) -> str:
    """Why autograd is expected to be faster, "" where it is not. matrices: by their memory, those that stand for ops
    without products."""
    every = summing = 0
    for weight, products in _products(graph):
        every += products
        summing += products if memory_of(weight) in matrices else 0
    if summing > MAX_SUMMING and 2 * summing > every:
        return f"its elements are summed by matrices of {summing:,} entries, for which autograd is faster"
    return ""
