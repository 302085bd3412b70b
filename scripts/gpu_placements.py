"""Kernels of docs/gpu.md that are not written: what they would move, wait for and take, on paper."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from gpu_predictions import BARRIER, EXCHANGE, GRID_BARRIER, H100, NORMALS, WARP_PRODUCT, Chain, Gpu, phases, stack_of

from mgebm_fast.benchmarks.work import taps_inside
from mgebm_fast.gradient.stack import Stack
from mgebm_fast.ops.conv_chain import resident
from mgebm_fast.ops.conv_chain.resident_layout import Layout
from mgebm_fast.tables import markdown

# What a block cannot hold: where the weights of the largest stages could lie instead

CLUSTER_TRIP, LARGE = 180, 64 << 10  # clocks of a load from another block's shared memory; bytes of a large stage


@dataclasses.dataclass(frozen=True)
class Placement:
    """One way to place a net whose weights and maps exceed a block's shared memory; of a sample's step."""

    name: str
    shared: float  # bytes of a block
    over: float  # bytes that a block receives from L2 or from others' shared memory
    clocks: float
    at_once: int  # samples

    def row(self, batch: int, gpu: Gpu = H100) -> list[str]:
        fits = self.shared <= resident.H100.shared_bytes
        time = math.ceil(batch / self.at_once) * gpu.microseconds(self.clocks)
        return [self.name, f"{self.shared / 1024:.0f}{'' if fits else ', too much'}", f"{self.over / 1024:.0f}",
                str(self.at_once), f"{time:.0f}" if fits else "–"]  # fmt: skip


def placements(stack: Stack, gpu: Gpu = H100) -> list[Placement]:
    """In a cluster, whose blocks share a sample: small stages by pixels, with all their weights; large ones by output
    channels, whose blocks need the whole map below and add up what each has of its gradient. By a block alone: the
    weights of large stages from L2, by tiles of 32 rows."""
    layout, rate = Layout(stack.stages, 1), gpu.l2 / gpu.processors / gpu.clock
    weights = [16.0 * len(part.swizzle) for part in layout.parts]
    maps = [16.0 * part.out_chunks * math.prod(stage.out_size) for part, stage in zip(layout.parts, stack.stages)]
    large = [i for i, size in enumerate(weights) if size > LARGE]
    rest = layout.shared_bytes - sum(weights) - sum(maps)
    steps, found = phases(layout), []
    for blocks in (4, 8):
        own = (blocks - 1) / blocks
        whole = {i - 1 for i in large}
        shared = rest / blocks + sum(w / blocks if i in large else w for i, w in enumerate(weights))
        shared += sum(m if i in whole else m / blocks for i, m in enumerate(maps))
        shared += 2 * max(maps[i] for i in whole) / blocks  # where one block's share of such sums arrives
        # Up: the map below; down: partial sums of its gradient in float32, and that gradient where all need it.
        over = own * sum(maps[i] + 2 * maps[i] + (maps[i] if i in large else 0) for i in whole)
        products = sum((phase.clocks - BARRIER) / blocks for phase in steps)
        clocks = products + over / rate + (len(steps) + len(large)) * (BARRIER + 2 * CLUSTER_TRIP)
        found.append(Placement(f"a cluster of {blocks}", shared, over, clocks, gpu.processors // blocks))
    shared = layout.shared_bytes - sum(weights[i] for i in large)
    of_large = [phase for phase in steps if any(phase.name.endswith(f"ward {i + 1}") for i in large)]
    tiles = [
        (-(-math.prod(stack.stages[i].out_size) // 32), -(-math.prod(stack.stages[i].in_size) // 32)) for i in large
    ]
    for name, over in (
        ("weights from L2, once a phase", sum(2 * weights[i] for i in large)),
        ("weights from L2, once a tile", sum(sum(both) * weights[i] for both, i in zip(tiles, large))),
    ):
        others = sum(phase.clocks for phase in steps if phase not in of_large)
        clocks = others + max(over / rate, sum(phase.clocks for phase in of_large))
        found.append(Placement(name, shared, over, clocks, gpu.processors))
    return found


def placement_section(chain: Chain) -> str:
    heads = ["", "shared memory of a block, KiB", "received by a block, KiB a step of a sample", "samples at a time",
             "predicted µs a step"]  # fmt: skip
    return f"{markdown(heads, [one.row(chain.batch) for one in placements(stack_of(chain))])}\n"


# Batch statistics in one kernel: the net at 4×4, whose samples are coupled at every layer of every step


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What blocks do between two barriers of all of them: rows (sample, pixel) of `columns` channels, of which each
    block makes a part, from all `depth` inputs of its rows, normalised as they are read."""

    rows: int
    columns: int
    depth: int  # products of an output, without those with the zeros around maps
    received: int  # bytes of a row
    statistics: int  # channels whose sums each block reads, of every group of rows

    def clocks(self, groups: int, blocks: int, gpu: Gpu) -> float:
        """Of a block, where the rows are shared out to so many groups, and the columns to what is left of the blocks;
        inf where there are too few."""
        width = 8 * math.ceil(self.columns / 8 / (blocks // groups))
        rows = math.ceil(self.rows / groups)
        products = math.ceil(rows / 16) * (width // 8) * math.ceil(self.depth / 16)
        over = rows * self.received + 8 * groups * self.statistics
        return max(products / WARP_PRODUCT, over / (gpu.l2 / gpu.processors / gpu.clock))

    def best(self, groups: Sequence[int], blocks: int, gpu: Gpu) -> float:
        return min(self.clocks(count, blocks, gpu) for count in groups if count <= blocks)


def exchanges(chain: Chain) -> list[Exchange]:
    """Those of a step: each layer up, the sums at the top, each layer down. Of a gradient the values that it is
    normalised with are read as well."""
    net, made = chain.net(), []
    layers = []
    for layer, size in net.placed():
        top = [layer.map_size(length) for length in size]
        taps = [taps_inside(a, b, layer.kernel, layer.stride, layer.padding) for a, b in zip(size, top)]
        layers.append((layer.weight.shape[1], layer.weight.shape[0], math.prod(size), math.prod(top), math.prod(taps)))
    for index, (inputs, outputs, below, above, taps) in enumerate(layers):
        read = (4 if index == 0 else 2) * inputs * below // above  # x is float32, maps are 16 bits
        made.append(Exchange(chain.batch * above, outputs, inputs * taps // above, read, inputs if index else 0))
    made.append(Exchange(chain.batch * layers[-1][3], layers[-1][1], 0, 0, layers[-1][1]))
    for inputs, outputs, below, above, taps in reversed(layers):
        made.append(
            Exchange(chain.batch * below, inputs, outputs * taps // below, 4 * outputs * above // below, outputs)
        )
    return made


def statistics_section(chain: Chain, layerwise: float, written: float, gpu: Gpu = H100) -> str:
    """Other kernels of all steps with the batch's statistics, beside a kernel a layer and the one that is written, of
    which the steps' microseconds are given."""
    steps = exchanges(chain)
    ways = (
        ("normalised as it is read, barriers of the grid", (1, 2, 4, 8, 16, 32), gpu.processors, GRID_BARRIER),
        ("the same, if a barrier is an exchange of `dense_chain`", (1, 2, 4, 8, 16, 32), gpu.processors,
         gpu.microseconds(EXCHANGE)),
        ("columns alone, barriers of the grid", (1,), gpu.processors, GRID_BARRIER),
        ("columns alone, in a cluster of 16", (1,), 16, gpu.microseconds(BARRIER + 2 * CLUSTER_TRIP)),
    )  # fmt: skip
    rows = [
        ["a kernel a layer", "–", "–", "–", f"{layerwise:.0f}"],
        ["`dense_chain`, which runs it", "–", "–", "–", f"{written:.0f}"],
    ]
    for name, groups, blocks, barrier in ways:
        work = gpu.microseconds(sum(step.best(groups, blocks, gpu) for step in steps) + NORMALS)
        waits = len(steps) * barrier
        rows.append([name, str(blocks), f"{work:.1f}", f"{waits:.1f}", f"{work + waits:.0f}"])
    heads = ["", "blocks", "work, µs", "barriers, µs", "predicted µs a step"]
    return f"{markdown(heads, rows)}\n"
