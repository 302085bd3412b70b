"""What the native CPU chains share: weights packed in strips, and the checks on a state before its address is taken."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from ... import native
from ..counters import Counters, check
from ..state import addresses, check_mask
from ..update import Update, check_steps
from . import sharing
from .scratch import ALIGN, Scratch
from .sharing import once

STRIP = 16  # outputs of a strip of weights
_FIRST = torch.zeros(1, dtype=torch.int64, device="cpu")
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


class Packs:
    """Weights of one form of a net, laid out in one buffer: what goes where is settled once, for any numbers of them.

    A job is [strip][row][channel up to depth][16] of the weight from input i to output o of a float32 source at
    rows[r] + i·strides[0] + o·strides[1]; bfloat16 with channels in pairs.
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[int, int, tuple[Any, ...]]] = []  # (source, its offset in the buffer, the native fields)
        self._rows: list[Tensor] = []
        self._nbytes = 0

    def add(
        self, source: int, rows: Tensor, inputs: int, outputs: int, strides: tuple[int, int], *, depth: int,
        bfloat: bool = False, rest: bool = False, run: int = 1,
    ) -> int:  # fmt: skip
        """The number of a new job. source: which of those that `run` is given. rows: int64, (rows,) or (rows, run)
        with −1 for zeros: each output is then `run` lanes wide. rest: of what rounding leaves of the weights."""
        self._rows.append(rows)
        fields = (bfloat, rest, rows.data_ptr(), len(rows), inputs, depth, outputs, *strides, run)
        self._jobs.append((source, self._nbytes, fields))
        nbytes = -(-outputs * run // STRIP) * len(rows) * depth * STRIP * (2 if bfloat else 4)
        self._nbytes += -(-nbytes // ALIGN) * ALIGN
        return len(self._jobs) - 1

    def vector(self, source: int | None, length: int) -> int:
        """The job of a vector, filled up with zeros to whole strips; None: of zeros alone."""
        return self.add(source or 0, _FIRST, 0 if source is None else 1, length, (0, 1), depth=1)

    def run(self, sources: Sequence[Tensor]) -> tuple[list[int], list[Any]]:
        """(where each job's result lies, what holds those addresses) for contiguous float32 sources."""
        packed, shared = Scratch(self._nbytes), sharing.made()
        found: list[int] = []
        held: list[Any] = [packed, self]
        todo: list[tuple[Any, ...]] = []
        for source, offset, fields in self._jobs:
            start, address = sources[source].data_ptr(), packed.address + offset
            if shared is not None:
                # What is held owns the addresses that the key names: nothing else can come to lie there.
                known, *owners = shared.setdefault(("packed", start, fields), (address, packed, self, sources[source]))
                if known != address:
                    found.append(known)
                    held.append(owners[0])
                    continue
            found.append(address)
            todo.append((start, address, *fields))
        if todo:
            native.module().conv_chain_pack(todo, torch.get_num_threads())
        return found, held


def pack(
    source: Tensor, rows: Tensor, inputs: int, outputs: int, strides: tuple[int, int], *, depth: int, bfloat: bool,
    rest: bool = False,
) -> Scratch:  # fmt: skip
    """One job as in `Packs.add`, of float32 `source`."""
    shape = (bfloat, rest, rows.data_ptr(), len(rows), inputs, depth, outputs, *strides, 1)

    def make() -> Scratch:
        packed = Scratch(-(-outputs // STRIP) * len(rows) * depth * STRIP * (2 if bfloat else 4))
        native.module().conv_chain_pack([(source.data_ptr(), packed.address, *shape)], torch.get_num_threads())
        return packed

    return once(("packed alone", source.data_ptr(), *shape), (source, rows), make)


def as_source(tensor: Tensor) -> Tensor:
    """float32 and contiguous, the tensor itself where it is that."""
    if tensor.dtype == torch.float32 and tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.detach().float().resolve_neg().contiguous()


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry of `as_source` tensors is NaN or infinite."""
    return native.module().all_finite([(tensor.data_ptr(), tensor.numel()) for tensor in tensors])
