"""Where a net lies in the shared memory of a block of the resident chain, and what a step of it costs.

A net's *image* is what all blocks copy into shared memory, at the same byte offsets: zeros, biases, the small tables
and the weights. Behind it, in memory alone, lies what is read once a tile: which pixels the outputs of a window are,
the head and its scale.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import windows
from .windows import StageLike

WARPS = 16
_UNIT_COLUMNS = 4  # chunks of eight channels that a warp makes at a time
_ACTIVATIONS = {"none": 1, "leaky_relu": 1, "relu": 1, "silu": 2, "elu": 3}
_USUAL_SAMPLES = 2
_SHARED = 0.5  # share of a product's time for which its operands keep shared memory from all other warps
_BARRIER = 12  # what a phase costs beside its products, in steps of a product


def slope_of(stage: StageLike) -> float:
    """Of the negative half of a piecewise linear activation."""
    return {"none": 1.0, "relu": 0.0}.get(stage.activation, stage.slope)


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _chunks(channels: int) -> int:
    """Chunks of eight channels: 1, 2, 4, or whole eights, as `chunk_at` of resident.h takes them."""
    chunks = -(-channels // 8)
    return next((few for few in (1, 2, 4) if chunks <= few), _up(chunks, 8))


def _swizzled(groups: int, depth: int) -> Tensor:
    """Where each chunk of weights lies, in `groups` of eight rows of `depth` chunks: `weight_at` of resident.h."""
    index = torch.arange(8 * depth)
    return (torch.arange(groups)[:, None] * 8 * depth + (index ^ ((index >> 3) ^ (index >> 6)) & 7)).flatten()


@dataclasses.dataclass
class _Part:
    """A stage in the image."""

    in_chunks: int
    out_chunks: int
    swizzle: Tensor
    bias: int = 0
    weights: int = 0


class Layout:
    """Where everything of a net lies, for `samples` chains a block, and what a step costs."""

    def __init__(self, stages: Sequence[StageLike], samples: int) -> None:
        self.samples = samples
        self.parts: list[_Part] = []
        self.tables: list[tuple[int, list[int]]] = []  # int32, by offset
        self.cost = 0.0
        channels, size = stages[0].weight.shape[1], tuple(stages[0].in_size)
        pixels = math.prod(size)
        self.shape = (channels, *size)

        for index, stage in enumerate(stages):
            outputs, inputs, *kernel = stage.weight.shape
            in_chunks, out_chunks = _chunks(2 * inputs if index == 0 else inputs), _chunks(outputs)
            self.parts.append(_Part(in_chunks, out_chunks, _swizzled(math.prod(kernel) * out_chunks, in_chunks)))

        # The image: zeros, then biases and tables, then weights at multiples of 128 bytes, where the swizzle begins.
        at, waiting = 128, []
        descriptions = []
        for index, (part, stage) in enumerate(zip(self.parts, stages, strict=True)):
            if stage.shortcut is None:
                part.bias, at = at, at + 32 * part.out_chunks
            columns = (part.out_chunks, part.in_chunks if index else -(-channels // 8))
            depths = (part.in_chunks, part.out_chunks)
            found = []
            for table, column, depth in zip(_windows(stage), columns, depths, strict=True):
                words, entries, behind = self._place(table, stage, at, column, depth)
                self.tables += entries
                at = _up(max(start + 4 * len(values) for start, values in entries), 16)
                waiting.append((words, behind))
                found.append(words)
            descriptions.append(found)
        for part in self.parts:
            part.weights = at = _up(at, 128)
            at += 16 * len(part.swizzle)
        self.image_bytes = at = _up(at, 128)

        # Behind it, in memory alone.
        for words, tables in waiting:
            for values in tables:
                self.tables.append((at, values))
                words.append(at)
                at = _up(at + 4 * len(values), 16)
        self.head, at = at, at + 32 * self.parts[-1].out_chunks * math.prod(stages[-1].out_size)
        self.unscale = at
        self.memory_bytes = at + 16

        # Shared memory behind the image: the state, and the maps of all stages.
        at = self.image_bytes
        x, at = at, _up(at + 4 * samples * channels * pixels, 128)
        x_map, at = at, at + 16 * _up(samples * pixels * self.parts[0].in_chunks, 8)
        maps, kept, places = [], [], []
        sources = {stage.shortcut for stage in stages}
        last = -1  # the stage that the next one reads
        for index, (part, stage) in enumerate(zip(self.parts, stages, strict=True)):
            if stage.shortcut is None:
                size_of_map = 16 * _up(samples * math.prod(stage.out_size) * part.out_chunks, 8)
                maps.append(at)
                at += size_of_map
                adds = index > 0 and stages[index - 1].shortcut is not None
                needs_z = stage.activation in ("silu", "elu") and index + 1 < len(stages)
                needs_z = needs_z or adds or index in sources
                kept.append(at if needs_z else -1)
                at += size_of_map if needs_z else 0
                places.append((last, False, adds, last in sources))
                last = index
            else:  # its maps are those of the stage after it
                maps.append(at)
                kept.append(at + 16 * _up(samples * math.prod(stage.out_size) * part.out_chunks, 8))
                places.append((stage.shortcut, True, False, False))
        # dE/dx: maps above the first are free by then.
        dx = maps[1] if len(maps) > 1 else at
        self.shared_bytes = max(at, dx + 4 * samples * channels * pixels)

        self.stages = [
            (
                *(tuple(words) for words in found), part.weights, part.bias, source,
                x_map if source < 0 else (kept if shortcut else maps)[source], place, z, math.prod(stage.in_size),
                math.prod(stage.out_size), part.in_chunks, part.out_chunks, slope_of(stage),
                _ACTIVATIONS[stage.activation], shortcut, adds, adds_below,
            )
            for part, stage, found, place, z, (source, shortcut, adds, adds_below) in zip(
                self.parts, stages, descriptions, maps, kept, places, strict=True
            )
        ]  # fmt: skip
        # The fields of ResidentNet after `memory`, as far as the net settles them.
        self.arguments: list[Any] = [
            self.image_bytes, self.head, self.unscale, x, x_map, dx, 0, channels, pixels,
            (*[1] * (3 - len(size)), *size), samples, self.stages,
        ]  # fmt: skip

    def _place(
        self, table: windows.Windows, stage: StageLike, at: int, columns: int, depth: int
    ) -> tuple[list[int], list[tuple[int, list[int]]], list[list[int]]]:
        """A table's words but for what lies in memory, what goes into the image from `at` on, and what does not."""
        kinds = _classes(table, stage.weight.shape[2:])
        # Which classes there are settles the order of sums: it must not depend on the samples of a block.
        classes = min(
            (_merged(kinds), kinds),
            key=lambda some: min(_makespan(some, _USUAL_SAMPLES, rows, columns, depth) for rows in (16, 32)),
        )
        cost, tile_rows = min((_makespan(classes, self.samples, rows, columns, depth), rows) for rows in (32, 16))
        self.cost += cost + _BARRIER
        first_tap, first_tile, first_output = [0], [0], [0]
        for one in classes:
            first_tap.append(first_tap[-1] + len(one.taps))
            first_tile.append(first_tile[-1] + -(-len(one.outputs) * self.samples // tile_rows))
            first_output.append(first_output[-1] + len(one.outputs))
        taps = [value for one in classes for tap, offset in one.taps for value in (offset, tap)]
        words = [first_tile[-1], tile_rows]
        entries = []
        for values in (first_tap, first_tile, first_output, taps):
            entries.append((at, values))
            words.append(at)
            at += 4 * len(values)
        rest = zip(*(output for one in classes for output in one.outputs), strict=True)
        return words, entries, [list(values) for values in rest]


@dataclasses.dataclass
class _Class:
    """Outputs whose windows read the same taps at the same offsets."""

    taps: list[tuple[int, int]]  # (row of weights, pixel from the base)
    outputs: list[tuple[int, int, int]]  # (base, which taps are inside the map, as bits, output)


def _classes(table: windows.Windows, kernel: Sequence[int]) -> list[_Class]:
    """The classes of the CPU's table: all taps are inside the map."""
    first_tap, first_output = table.first_tap.tolist(), table.first_output.tolist()
    pixels, base, output = table.tap_pixel.tolist(), table.base.tolist(), table.output.tolist()
    rows = [windows.ravel(table.rows[row], kernel) for row in table.tap_weight.tolist()]
    classes = []
    for c in range(len(first_tap) - 1):
        taps = slice(first_tap[c], first_tap[c + 1])
        outputs = range(first_output[c], first_output[c + 1])
        classes.append(
            _Class(list(zip(rows[taps], pixels[taps], strict=True)), [(base[i], -1, output[i]) for i in outputs])
        )
    return classes


def _merged(classes: Sequence[_Class]) -> list[_Class]:
    """Fewer classes, of outputs that read at one set of offsets, some of them outside the map."""
    merged: list[_Class] = []
    for one in sorted(classes, key=lambda one: -len(one.taps)):
        own = dict(one.taps)
        for other in merged:
            theirs = dict(other.taps)
            shifts = {own[tap] - theirs[tap] for tap in own.keys() & theirs.keys()}
            if len(shifts) == 1 and len(own.keys() | theirs.keys()) <= 32:
                (shift,) = shifts
                other.taps += [(tap, offset - shift) for tap, offset in one.taps if tap not in theirs]
                break
        else:
            other, shift = _Class(list(one.taps), []), 0
            merged.append(other)
        bits = sum(1 << place for place, (tap, _) in enumerate(other.taps[:32]) if tap in own)
        signed = bits - (1 << 32) if bits >> 31 else bits
        other.outputs += [(base + shift, signed, output) for base, _, output in one.outputs]
    return merged


def _windows(stage: StageLike) -> tuple[windows.Windows, windows.Windows]:
    kernel = tuple(stage.weight.shape[2:])
    geometry = (stage.in_size, stage.out_size, kernel, stage.stride, stage.padding, stage.dilation)
    return windows.forward_windows(*geometry), windows.backward_windows(*geometry)


def _makespan(classes: Sequence[_Class], samples: int, tile_rows: int, columns: int, depth: int) -> float:
    """Steps of a phase, products of 16 rows, 32 columns, 16 channels: those of the busiest warp, where units are shared
    out in turn, or the time of shared memory for all."""
    groups = -(-columns // _UNIT_COLUMNS)
    loads = [0.0] * WARPS
    unit = 0
    for one in classes:
        rows = len(one.outputs) * samples
        steps = len(one.taps) * depth / 2 + 4
        for first in range(0, rows, tile_rows):
            tall = 1.5 if tile_rows > 16 and rows - first > 16 else 1.0  # weights are loaded once for both
            for _ in range(groups):
                loads[unit % WARPS] += tall * steps
                unit += 1
    return max(*loads, _SHARED * sum(loads))
