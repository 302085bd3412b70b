"""What the native CPU chains share: weights packed in strips, and the checks on a state before its address is taken."""

from __future__ import annotations

import abc
import functools
import math
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from ... import native
from ..counters import Counters, check
from ..state import addresses, check_mask
from ..update import Update, check_steps
from .scratch import Scratch
from .sharing import once

STRIP = 16  # outputs of a strip of weights
# The numbers of a call that makes no step.
IDLE = Update(0.0, 0.0, 0.0, 0.0, math.inf, -math.inf, math.inf)


@functools.cache
def nowhere(device: torch.device) -> Counters:
    """Counters of a call that draws nothing."""
    return check("conv_chain", 1, 1, device, seed=0, first_sample=0, step=0, stream=0)


class PackedChain(abc.ABC):
    """An energy with its weights packed for the native engine: ∇E, and chains of it, on plain float32 CPU tensors."""

    op: ClassVar[str]

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{self.op}: a chain holds addresses and cannot be copied or pickled; make another")

    @abc.abstractmethod
    def _call(
        self, x: Tensor, gradient: Tensor | None, mask: Tensor | None, steps: int, numbers: Update, place: Counters
    ) -> None:
        """∇E of contiguous x into `gradient`, or where that is None `steps` steps on x in place."""

    @abc.abstractmethod
    def _check_shape(self, x: Tensor) -> None:
        """ValueError unless x has the shape that the energy takes."""

    def _check(self, x: Tensor) -> None:
        """Raw addresses go to native code: nothing but a plain float32 CPU tensor of the right shape may pass."""
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{self.op}: x must be a float32 tensor, got {got}")
        if x.device.type != "cpu":
            raise ValueError(f"{self.op}: x must be on the CPU, got a tensor on {x.device}")
        self._check_shape(x)
        addresses(self.op, x.resolve_neg())

    def gradient(self, x: Tensor) -> Tensor:  # (N, ...) float32, any layout -> the same, contiguous
        """∇E(x), float32."""
        self._check(x)
        x = x.detach().resolve_neg().contiguous()
        out = torch.empty_like(x)
        if x.shape[0]:
            self._call(x, out, None, 0, IDLE, nowhere(x.device))
        return out

    def advance_(self, x: Tensor, steps: int, numbers: Update, place: Counters, mask: Tensor | None = None) -> None:
        """`steps` Langevin steps on x in place; `place` has the counters of the first, `mask` is as in `check_mask`."""
        self._check(x)
        check_steps(steps, self.op)
        ids = place.sample_tensor
        if ids is not None and ids.dim() and ids.shape[0] != x.shape[0]:
            raise ValueError(f"{self.op}: first_sample must hold one id a sample, {x.shape[0]}, got {ids.shape[0]}")
        state = x if x.is_contiguous() and not x.is_neg() else x.resolve_neg().contiguous()
        if mask is not None:
            mask = check_mask(mask, x, self.op).expand(x.shape).contiguous()
        if x.shape[0] and steps:
            self._call(state, None, mask, steps, numbers, place)
        if state is not x:
            x.copy_(state)


def pack(
    source: Tensor, rows: Tensor, inputs: int, outputs: int, strides: tuple[int, int], *, depth: int, bfloat: bool,
    rest: bool = False,
) -> Scratch:  # fmt: skip
    """[strip][row][channel up to depth][16] of the weight from input i to output o at rows[r] + i·strides[0] +
    o·strides[1] of float32 `source`, rows int64; bfloat16 with channels in pairs. `rest`: of what rounding leaves of
    the weights."""
    shape = (bfloat, rest, rows.data_ptr(), len(rows), inputs, depth, outputs, *strides)

    def make() -> Scratch:
        packed = Scratch(-(-outputs // STRIP) * len(rows) * depth * STRIP * (2 if bfloat else 4))
        native.module().conv_chain_pack(source.data_ptr(), packed.address, *shape, torch.get_num_threads())
        return packed

    return once(("packed", source.data_ptr(), *shape), (source, rows), make)
