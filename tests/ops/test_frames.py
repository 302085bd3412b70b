"""The windows of bfloat16 products over maps with zeros around them, against the definition of a convolution."""

import itertools
import random

import pytest
from torch import Tensor

from mgebm_fast.ops.conv_chain.windows import Windows
from mgebm_fast.ops.graph_chain.frames import Framed, framed_backward, framed_forward


def geometry_of(seed: int) -> tuple[tuple[int, ...], ...]:
    """(inputs, outputs, kernel, stride, padding, dilation) of one to three dimensions."""
    draw, axes = random.Random(seed), list[tuple[int, ...]]()
    while len(axes) < 1 + seed % 3:
        size, kernel, stride, dilation = draw.randint(1, 7), draw.randint(1, 5), draw.randint(1, 3), draw.randint(1, 3)
        padding = draw.randint(0, 4)
        outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if outputs >= 1:
            axes.append((size, outputs, kernel, stride, padding, dilation))
    return tuple(zip(*axes, strict=True))


def reads_of(framed: Framed) -> dict[int, dict[tuple[int, ...], int]]:
    """Of each output, the input pixel that it reads by each tap, −1 for a zero."""
    table: Windows = framed.windows
    place, found = framed.place.tolist(), dict[int, dict[tuple[int, ...], int]]()

    def part(first: Tensor, of: Tensor, c: int) -> list[int]:
        return of[first[c] : first[c + 1]].tolist()

    for c in range(len(table.first_tap) - 1):
        taps = list(zip(part(table.first_tap, table.tap_weight, c), part(table.first_tap, table.tap_pixel, c)))
        outputs = zip(part(table.first_output, table.output, c), part(table.first_output, table.base, c))
        for output, base in outputs:
            assert output not in found and all(0 <= base + pixel < len(place) for _, pixel in taps)
            found[output] = {table.rows[row]: place[base + pixel] for row, pixel in taps}
    return found


def flat(index: tuple[int, ...], size: tuple[int, ...]) -> int:
    """Its place in row-major order, −1 outside of the map."""
    at = 0
    for i, n in zip(index, size, strict=True):
        if not 0 <= i < n:
            return -1
        at = at * n + i
    return at


@pytest.mark.parametrize("seed", range(60))
def test_outputs_read_what_a_convolution_reads_and_zeros(seed: int) -> None:
    inputs, outputs, kernel, stride, padding, dilation = geometry = geometry_of(seed)
    found = reads_of(framed_forward(*geometry))
    assert sorted(found) == list(range(len(found)))
    for output in itertools.product(*map(range, outputs)):
        reads = found[flat(output, outputs)]
        for tap in itertools.product(*map(range, kernel)):
            at = [o * s - p + t * d for o, s, p, t, d in zip(output, stride, padding, tap, dilation, strict=True)]
            assert reads[tap] == flat(tuple(at), inputs)
        assert len(reads) == len(list(itertools.product(*map(range, kernel))))


@pytest.mark.parametrize("seed", range(60))
def test_a_data_gradient_reads_every_output_by_its_tap(seed: int) -> None:
    """And where it reads another output's place, that is a zero; pixels within a stride of each other share classes."""
    inputs, outputs, kernel, stride, padding, dilation = geometry = geometry_of(seed)
    framed = framed_backward(*geometry)
    found = reads_of(framed)
    wanted: dict[int, dict[tuple[int, ...], int]] = {i: {} for i in range(len(found))}
    for output in itertools.product(*map(range, outputs)):
        for tap in itertools.product(*map(range, kernel)):
            at = [o * s - p + t * d for o, s, p, t, d in zip(output, stride, padding, tap, dilation, strict=True)]
            if (pixel := flat(tuple(at), inputs)) >= 0:
                wanted[pixel][tap] = flat(output, outputs)
    assert {pixel: {t: o for t, o in reads.items() if o >= 0} for pixel, reads in found.items()} == wanted
    classes = len(framed.windows.first_tap) - 1
    assert classes <= int(stride[0] * (stride[1] if len(stride) > 1 else 1) * (stride[2] if len(stride) > 2 else 1))
