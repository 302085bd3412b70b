"""What the predictions of docs/gpu.md take a GPU, a chain and the resident kernel to be (scripts/gpu_model.py)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from mgebm_fast.benchmarks.work import macs_inside
from mgebm_fast.gradient.stack import Stack, read
from mgebm_fast.nets import multigrid_net
from mgebm_fast.ops.conv_chain import resident
from mgebm_fast.ops.conv_chain.resident_layout import WARPS, Layout


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as the predictions take it. Rates of the data sheet, but for the shares named on the page."""

    name: str
    copy: float  # bytes a second
    matrix: float = 790e12  # FLOP a second, 16 bits, dense
    l2: float = 5.5e12  # bytes a second
    processors: int = 132
    clock: float = 989e12 / (132 * 4096)  # Hz; a processor's matrix units make 4,096 FLOP a clock

    def microseconds(self, clocks: float) -> float:
        return clocks / self.clock * 1e6


H100, H200 = Gpu("H100", 0.9 * 3.35e12), Gpu("H200", 0.9 * 4.8e12)
GPUS = (H100, H200)
GAP, LEAST = 1.2, 2.0  # microseconds: between two nodes of a graph; of the shortest kernel
STREAM, FORWARD, BACKWARD, NARROW, WARP_PRODUCT = 0.8, 0.7, 0.6, 0.35, 0.629  # shares of a rate
GRID_BARRIER = 1.2  # microseconds, of all blocks of a cooperative launch: 1 to 1.5 are reported
BARRIER, PRODUCT, NORMALS, SHARED, L2_TRIP = 135, 24, 240, 128, 263  # clocks, but SHARED: bytes a clock

EXCHANGE = 3 * L2_TRIP + BARRIER  # clocks: a barrier of the blocks that share a tile of `dense_chain`


@dataclasses.dataclass(frozen=True)
class Chain:
    """A chain of a net, at a batch."""

    variant: str
    size: int
    batch: int
    steps = 3

    @property
    def norm(self) -> str:
        return "batch" if self.variant == "B" else "none"

    @property
    def title(self) -> str:
        kind = "published" if self.variant == "B" else self.variant
        return f"{kind} {self.size}×{self.size}, batch {self.batch}"

    def net(self) -> Any:
        return multigrid_net(self.size, 3, norm=self.norm, variant=self.variant)

    def flop(self) -> int:
        """Of a step: the forward pass and the data gradient, without products with the zeros around maps."""
        return 2 * 2 * self.batch * macs_inside(self.net())


PUBLISHED = [Chain("B", size, batch) for batch in (128, 1056) for size in (64, 16, 4)]
COMPACT = [Chain("compact", size, 132) for size in (2, 4, 8, 16, 32)]
RESIDUAL = [Chain("residual", size, 132) for size in (2, 4, 8, 16)]


# The resident chain


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a block does between two barriers."""

    name: str
    products: int = 0  # of matrices of 16 × 16 and 16 × 8
    loaded: int = 0  # bytes of operands, from shared memory
    busiest: float = 0.0  # clocks of the warp that has most to do

    @property
    def clocks(self) -> float:
        return max(self.products / WARP_PRODUCT, self.loaded / SHARED, self.busiest) + BARRIER


def phases(layout: Layout) -> list[Phase]:
    """Those of a step, from the tables that the kernel is given."""
    layers = range(len(layout.stages))
    quads = -(-math.prod(layout.shape) // 4) * layout.samples
    rounds = -(-quads // (32 * WARPS))  # of all threads; a quarter of the warps shares a scheduler
    update = Phase("update", busiest=NORMALS * min(WARPS // 4, -(-quads // 128)) * rounds)
    return [
        *(_phase(layout, f"forward {i + 1}", i, False) for i in layers),
        *(_phase(layout, f"backward {i + 1}" if i else "edge", i, True) for i in reversed(layers)),
        update,
    ]


def _phase(layout: Layout, name: str, index: int, backward: bool) -> Phase:
    words, part, edge = dict(layout.tables), layout.parts[index], name == "edge"
    _, tile_rows, first_tap, _, first_output = layout.stages[index][backward][:5]
    depth = part.out_chunks if backward else part.in_chunks
    columns = -(-layout.shape[0] // 8) if edge else part.in_chunks if backward else part.out_chunks
    pairs = 1 if edge else 2
    taps, outputs = words[first_tap], words[first_output]
    products = loaded = unit = 0
    busy = [0.0] * WARPS
    for one in range(len(taps) - 1):
        count, rows = taps[one + 1] - taps[one], (outputs[one + 1] - outputs[one]) * layout.samples
        deep = -(-count // 2) if depth == 1 else count * depth // 2
        for first in range(0, rows, tile_rows):
            tiles = 2 if tile_rows > 16 and rows - first > 16 else 1
            for _ in range(-(-columns // (2 * pairs))):
                products += deep * tiles * 2 * pairs
                loaded += deep * (tiles + pairs) * 512
                # A sum waits for the one before; four schedulers share the matrix units.
                busy[unit % WARPS] += deep * max(PRODUCT, tiles * 2 * pairs * 4 / WARP_PRODUCT)
                unit += 1
    return Phase(name, products, loaded, max(busy))


def stack_of(chain: Chain) -> Stack:
    found = read(chain.net(), torch.zeros(2, 3, chain.size, chain.size), blocks=True)
    assert isinstance(found, Stack), found
    return found


def resident_step(stack: Stack, batch: int, gpu: Gpu = H100) -> tuple[Layout, float]:
    """The layout that the plan chooses, and the microseconds of a step of all samples."""
    layout = Layout(stack.stages, resident.best_samples(stack.stages, batch))
    waves = math.ceil(math.ceil(batch / layout.samples) / gpu.processors)
    return layout, waves * gpu.microseconds(sum(phase.clocks for phase in phases(layout)))
