"""The steps of a program and the buffers that they work on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..conv_chain import windows
from ..conv_chain.scratch import Scratch
from .functions import FUNCTIONS

_KINDS = {
    name: number
    for number, name in enumerate(
        "convolve gather pointwise affine add multiply norm norm_back fill softmax log_sum_exp copy max_pool "
        "max_pool_back depthwise rearrange rearrange_back".split()
    )
}  # fmt: skip
BUFFERS = ("source", "second", "third", "keep", "slope")
# The steps that end in a function or a slope.
FINISHING = ("convolve", "depthwise", "gather", "pointwise", "affine", "add", "multiply", "norm", "norm_back", "fill")
MAX_STEPS = MAX_BUFFERS = 1024
MAX_NORM_CHANNELS = 4096


@dataclasses.dataclass
class Buffer:
    """[pixel][depth] floats a sample; `of`: the buffer whose memory it names otherwise."""

    pixels: int
    depth: int
    of: int | None = None
    first: int = 0  # the steps that write it first and read it last
    last: int = -1
    offset: int = 0


@dataclasses.dataclass
class Step:
    """One step; the fields of GraphStep in csrc/ops/graph_chain/graph_chain.h."""

    kind: str
    source: int = -1
    second: int = -1
    third: int = -1
    out: int = -1
    keep: int = -1
    slope: int = -1
    accumulate: bool = False
    windows: windows.Windows | None = None
    weights: Tensor | Scratch | None = None
    bfloat: bool = False  # whether weights, and what they multiply, are bfloat16; then with `place`
    place: Tensor | None = None  # int32: (pixels of the map that windows are of,), as `frames` makes it; or `places_of`
    split: int = -1  # of a dense layer as three products of bfloat16: where its weights begin among all such
    rows: int = 0
    inputs: int = 0
    outputs: int = 0
    bias: Tensor | None = None
    top: Tensor | None = None  # of a convolution: dE/dh behind its function, where that is known
    per_element: bool = False
    row_floats: int = 0
    function: str = ""
    a: float = 0.0
    b: float = 0.0
    factor: float = 1.0
    groups: int = 1
    eps: float = 0.0
    from_channel: int = 0
    to_channel: int = 0

    def reads(self) -> set[int]:
        found = {self.source, self.third}
        if self.kind != "norm":
            found.add(self.second)
        if not self._keeps_slope:
            found.add(self.slope)
        if self.accumulate or self.kind == "copy":  # a part of out stays as it was
            found.add(self.out)
        return found - {-1}

    def writes(self) -> set[int]:
        found = {self.out, self.keep}
        if self.kind == "norm":
            found.add(self.second)
        if self._keeps_slope:
            found.add(self.slope)
        return found - {-1}

    @property
    def _keeps_slope(self) -> bool:
        """Whether `slope` is written, as on the forward pass."""
        return self.function not in ("", "leaky_relu") and self.top is None

    @property
    def arguments(self) -> tuple:
        table = (0,) * 8 if self.windows is None else self.windows.arguments
        weights = self.weights.address if isinstance(self.weights, Scratch) else _address(self.weights)
        place = (0, 0) if self.place is None else (self.place.data_ptr(), len(self.place))
        kinds = (0, weights) if self.bfloat else (weights, 0)
        function = FUNCTIONS[self.function][0] if self.function else 0
        return (
            _KINDS[self.kind], self.source, self.second, self.third, self.out, self.keep, self.slope, self.accumulate,
            table, *kinds, self.rows, self.inputs, self.outputs, _address(self.bias), self.per_element,
            self.row_floats, function, self.a, self.b, self.factor, self.groups, self.eps, self.from_channel,
            self.to_channel, *place, self.split, _address(self.top),
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    if tensor is None:
        return 0
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise TypeError(f"graph_chain: a step's numbers must be contiguous float32 on the CPU, got {tensor.dtype}")
    return tensor.data_ptr()
