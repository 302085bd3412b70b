"""The arguments that place a draw: seed, sample ids, step and stream, as numbers or as device tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise as philox
from ..checks import number
from .state import addresses

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# The tail of every counter-based op's schema, in the order of `Counters.arguments`.
SCHEMA = (
    "int seed, Tensor? seed_tensor, int first_sample, Tensor? sample_tensor, int step, Tensor? step_tensor, int stream"
)


@dataclasses.dataclass(frozen=True)
class Counters:
    """Checked counters. If a tensor is given, it overrides the number beside it."""

    seed: int  # two's complement of the 64-bit seed: op arguments are signed
    seed_tensor: Tensor | None
    first_sample: int
    sample_tensor: Tensor | None  # 0-dim: the base; (N,): one id a sample
    step: int
    step_tensor: Tensor | None
    stream: int

    def steps(self, start: int, stop: int) -> list[Counters]:
        """The counters start … stop − 1 steps further on; with a step tensor, one device addition for all of them."""
        if self.step_tensor is None:
            # Spelt out: dataclasses.replace costs four times as much, and this is done for every step.
            seed, first, stream = (self.seed, self.seed_tensor), (self.first_sample, self.sample_tensor), self.stream
            return [Counters(*seed, *first, self.step + k, None, stream) for k in range(start, stop)]
        ladder = torch.arange(start, stop, device=self.step_tensor.device) + self.step_tensor
        return [dataclasses.replace(self, step_tensor=step) for step in ladder.unbind()]

    @property
    def arguments(self) -> tuple:
        """The op's arguments, in the order of `SCHEMA`."""
        return (
            self.seed,
            self.seed_tensor,
            self.first_sample,
            self.sample_tensor,
            self.step,
            self.step_tensor,
            self.stream,
        )

    @property
    def native_arguments(self) -> tuple:
        """The native launchers' arguments: numbers, and addresses (0 where there is no tensor)."""
        samples = self.sample_tensor
        numbers = (self.seed & 0xFFFFFFFFFFFFFFFF, self.first_sample, self.step, self.stream)
        if self.seed_tensor is None and self.step_tensor is None and samples is None:
            return (*numbers, 0, 0, 0, False)
        tensors = addresses("counters", self.seed_tensor, self.step_tensor, samples, dispatched=True)
        return (*numbers, *tensors, samples is not None and samples.dim() == 0)

    @property
    def reference_arguments(self) -> dict:
        """Keyword arguments of `noise.words`."""
        return {
            "seed": self.seed if self.seed_tensor is None else self.seed_tensor,
            "first_sample": self.first_sample if self.sample_tensor is None else self.sample_tensor,
            "step": self.step if self.step_tensor is None else self.step_tensor,
            "stream": self.stream,
        }


def counter(value: Any, device: torch.device | None = None) -> Any:
    """An id, ids (N,), a step or a seed: an int, or an int64 tensor where a tensor, an array or a list of integers is
    given (on `device`, but for a tensor). What is of no such kind is returned, for a later check to refuse."""
    if type(value) is int:
        return value
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple, range, np.ndarray)):
        array = np.asarray(value)
        return torch.from_numpy(array.astype(np.int64)).to(device) if array.dtype.kind in "iu" else value
    if isinstance(value, Tensor) and value.dtype in _INTEGERS:
        return value.to(torch.int64)
    return value


def _counter_tensor(
    value: Tensor, name: str, op: str, device: torch.device, samples: int | None, last: int = 0
) -> Tensor:
    shapes = "a 0-dim tensor" if samples is None else f"a 0-dim tensor or one of shape ({samples},)"
    if value.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be an int or an int64 tensor, got dtype {value.dtype}")
    if value.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, as x is, got a tensor on {value.device}")
    if type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__ and philox.is_eager():
        raise TypeError(f"{op}: {name} must be a plain tensor, got a {type(value).__name__}")
    if value.dim() != 0 and (samples is None or tuple(value.shape) != (samples,)):
        raise ValueError(f"{op}: {name} must be {shapes}, got shape {tuple(value.shape)}")
    # A device tensor cannot be read without a synchronisation: there the kernels turn what passes 32 bits into NaN.
    if name != "seed" and value.device.type == "cpu" and not torch.compiler.is_compiling() and value.numel():
        philox.check_counter(int(value.min()), name, op)
        philox.check_counter(int(value.max()), name, op, last=0 if value.dim() else last)
    return value.contiguous()


def seed_or_fresh(seed: int | Tensor | None, x: Any, op: str) -> int | Tensor:
    """`seed`, or if it is None a seed drawn from torch's generator (`noise.resolve_seed`)."""
    if seed is not None or not isinstance(x, Tensor):  # an x that is no tensor is refused later, by name
        return 0 if seed is None else seed
    return philox.resolve_seed(None, None, x.device, op)


def check(
    op: str,
    samples: int,
    elements: int,
    device: torch.device,
    *,
    seed: int | Tensor,
    first_sample: int | Tensor,
    step: int | Tensor,
    stream: int,
    steps: int | None = None,
) -> Counters:
    """`Counters` for `samples` samples of `elements` each, or an error that names the argument.

    `steps`: of a chain whose first one is at `step`, which its callers know as `first_step`; all must fit 32 bits.
    """
    name, last_step = ("step", 0) if steps is None else ("first_step", max(steps - 1, 0))
    last_sample, word = max(samples - 1, 0), philox.WORD
    if (
        type(seed) is type(first_sample) is type(step) is type(stream) is int
        and 0 <= seed < 1 << 63
        and 0 <= first_sample <= word - last_sample
        and 0 <= step <= word - last_step
        and 0 <= stream <= word
        and elements // 4 <= word
    ):  # the usual case, at a third of the cost
        return Counters(seed, None, first_sample, None, step, None, stream)
    seed, first_sample, step = (counter(value, device) for value in (seed, first_sample, step))
    stream = number(stream)
    philox.check_counter(stream, "stream", op)
    philox.check_counter(0, "the number of elements // 4", op, last=elements // 4)
    seed_tensor = sample_tensor = step_tensor = None
    if isinstance(seed, Tensor):
        seed_tensor, seed = _counter_tensor(seed, "seed", op, device, None), 0
    else:
        seed = philox.check_seed(seed, op)
        seed = seed - (1 << 64) if seed >> 63 else seed
    if isinstance(first_sample, Tensor):
        sample_tensor, first_sample = _counter_tensor(first_sample, "first_sample", op, device, samples, last_sample), 0
    else:
        philox.check_counter(first_sample, "first_sample", op, last=last_sample)
    if isinstance(step, Tensor):
        step_tensor, step = _counter_tensor(step, name, op, device, None, last_step), 0
    else:
        philox.check_counter(step, name, op, last=last_step)
    return Counters(seed, seed_tensor, first_sample, sample_tensor, step, step_tensor, stream)
