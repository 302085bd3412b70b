"""Which of the plans that can run a stack of convolutions on a CPU is the fastest for so many samples.

The native engine of stacks works on blocks of sixteen samples, that of graphs on rows of samples and pixels alike, and
the conv plan by torch's convolutions. Measured with AVX2 on nets of 2 to 64 pixels a side, batches of 1 to 32
(`mgebm bench chains`): below sixteen samples the graph is the fastest on all of them, up to 5 times the engine of
stacks, which can be four times slower than the conv plan there; from sixteen samples on the two engines are level.
"""

from __future__ import annotations

import math

from ..stack import Stack

BLOCK = 16  # samples of a block of the engine of stacks
SMALL_MAP = 64  # pixels: up to here a block that is not full costs less than torch's calls do


def fastest(stack: Stack, samples: int, precision: str) -> tuple[str, str]:
    """("native" | "graph" | "conv", why not "native")."""
    if samples >= BLOCK or precision != "fp32":
        return "native", ""
    if not any(stage.norm is not None for stage in stack.stages):
        return "graph", f"the engine of stacks takes blocks of {BLOCK} samples, x has {samples}"
    largest = max(math.prod(size) for stage in stack.stages for size in (stage.in_size, stage.out_size))
    if largest <= SMALL_MAP:
        return "native", ""
    return "conv", f"with batch statistics the native engine takes blocks of {BLOCK} samples, x has {samples}"
