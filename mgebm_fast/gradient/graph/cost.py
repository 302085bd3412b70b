"""Which of the plans that can run a stack of convolutions on a CPU is the fastest.

The native engine of stacks works on blocks of sixteen samples, that of graphs on rows of samples and pixels alike, and
the conv plan by torch's convolutions. Where samples are independent the net alone decides, so that the bits of a sample
do not depend on the batch that it is in: up to maps of 8×8 pixels the engine of stacks is up to twice as fast, and fast
enough with a single sample; on larger maps the two are level from sixteen samples on, and below the engine of stacks is
up to eight times slower, which is slower than torch's convolutions. (`pytest bench/ops`, AVX2.)
"""

from __future__ import annotations

import math

from ...ops.graph_chain import layers
from ...ops.graph_chain.layers import Graph
from ..stack import Stack

BLOCK = 16  # samples of a block of the engine of stacks
SMALL_MAP = 64  # pixels
LARGE_MAP = 64 * 64  # with bfloat16, where the engine of stacks multiplies as fast as that of graphs with few samples


def fastest(stack: Stack, samples: int, precision: str) -> tuple[str, str]:
    """("native" | "graph" | "conv", why not "native")."""
    largest = max(math.prod(size) for stage in stack.stages for size in (stage.in_size, stage.out_size))
    small = SMALL_MAP if precision == "fp32" else LARGE_MAP
    if largest <= small:
        return "native", ""
    if not any(stage.norm is not None for stage in stack.stages):
        return "graph", f"the engine of stacks is made for maps of up to {small} pixels, one here has {largest}"
    if samples >= BLOCK:
        return "native", ""
    return "conv", f"with batch statistics the native engine takes blocks of {BLOCK} samples, x has {samples}"


def gains_by_bfloat(graph: Graph) -> bool:
    """Whether products of bfloat16 are a large part of the work: a convolution of some channels over a map. A dense
    energy of a few features is faster in float32 as it is, and often one whose law is to hold closely."""
    return any(
        isinstance(layer, layers.Convolution) and min(layer.weight.shape[:2]) >= 16 and layer.out.pixels > 1
        for layer in graph.layers
    )
