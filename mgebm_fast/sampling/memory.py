"""Batches that do not fit in memory: split where samples are independent, refused with what fits where they are not.

Memory in a chain does not grow with its steps, so a batch that is through one step is through them all. What does not
fit is found out by trying: the first parts that fit are remembered for the energy, and later chains begin with them. A
sample's noise depends on its id alone, so parts take the very noise of the whole batch; what a split changes is the
rounding of convolutions that run at another batch size (docs/reproducibility.md).
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..errors import BatchTooLargeError
from ..gradient import frozen_parameters, plan
from ..ops import counters
from .chain import Chain
from .coupling import coupling

# Messages of allocators that ran out of memory, matched narrowly: a user's own error may contain similar words. Only
# torch on CUDA has an exception class for it.
_OUT_OF_MEMORY_MESSAGES = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory"
    r"|^CUDA error: out of memory|^CUDA out of memory\. |CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|^could not create a memory object$|^could not allocate|^std::bad_alloc$"
)

# energy -> {(shape of a sample, device): samples that fitted}
_fitted: MutableMapping[Any, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY_MESSAGES.search(str(error)))


def tried(call: Callable[[], Any], device: torch.device) -> BaseException | None:
    """Run `call`; returns the error where memory ran out, after freeing what the attempt held."""
    try:
        call()
        return None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = error.with_traceback(None)  # which keeps the tensors of the attempt alive
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return failure


def advance_(chain: Chain, x: Tensor, origin: Tensor, start: int, stop: int) -> None:
    """`chain.advance_` from x, whose values `origin` holds too, in parts of the batch where the whole does not fit.

    Raises BatchTooLargeError where it does not fit and cannot be split; the message says how many samples fit.
    """
    samples = x.shape[0]
    key = (x.shape[1:], x.device)
    part = min(_remembered(chain.energy).get(key, samples), samples)
    done = 0
    while done < samples:
        rows = slice(done, min(done + part, samples))
        failure = tried(functools.partial(_advance_part, chain, x, rows, start, stop), x.device)
        if failure is None:
            done = rows.stop
            continue
        x[rows] = origin[rows]
        part = _smaller(chain, x, part, failure)
        _remembered(chain.energy)[key] = part


def _advance_part(chain: Chain, x: Tensor, rows: slice, start: int, stop: int) -> None:
    if rows.stop - rows.start < x.shape[0]:
        part = of_part(chain, x, rows)
        part.advance_(x[rows], start, stop)
        if chain.bad_step is not None and part.bad_step is not None:
            chain.bad_step.copy_(torch.minimum(chain.bad_step, part.bad_step))
        return
    chain.advance_(x, start, stop)


def _remembered(energy: Any) -> dict[tuple[Any, ...], int]:
    try:
        return _fitted.setdefault(energy, {})
    except TypeError:  # a callable without weak references
        return {}


def _smaller(chain: Chain, x: Tensor, part: int, failure: BaseException) -> int:
    """The size of part to try after `part` samples did not fit."""
    samples, where = x.shape[0], chain.where
    said = " ".join(str(failure).split())
    if part <= 1:
        raise BatchTooLargeError(
            f"{where}: one sample of shape {tuple(x.shape[1:])} does not fit in memory: {said}"
        ) from failure
    if part >= samples:
        reason = coupling(chain.energy, x)
        if reason:
            fits = largest_that_fits(chain, x)
            what = f"at most {fits} fit" if fits else "not even one sample fits"
            raise BatchTooLargeError(
                f"{where}: a batch of {samples} does not fit in memory, {what}; it cannot be split, since {reason} "
                f"({said})"
            ) from failure
    smaller = (part + 1) // 2
    warnings.warn(
        f"{where}: {part} samples do not fit in memory; they run {smaller} at a time, each with the noise that it has "
        f"in the whole batch ({said})",
        stacklevel=2,
    )
    return smaller


def of_part(chain: Chain, x: Tensor, rows: slice) -> Chain:
    """The chain of some samples of a batch, with their masks, their noise and a plan for their number."""
    mask = chain.mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[rows]
    numbers = chain.numbers.part(rows)
    return dataclasses.replace(chain, mask=mask, place=_placed(chain.place, rows), numbers=numbers).planned(x[rows])


def _placed(place: counters.Counters, rows: slice) -> counters.Counters:
    ids = place.sample_tensor
    if ids is None:
        return dataclasses.replace(place, first_sample=place.first_sample + rows.start)
    return dataclasses.replace(place, sample_tensor=ids[rows].contiguous() if ids.dim() else ids + rows.start)


def largest_that_fits(chain: Chain, x: Tensor) -> int:
    """How many of x's samples go through one gradient; 0 where not one does."""
    fits, too_many = 0, x.shape[0]
    while too_many - fits > 1:
        half = (fits + too_many) // 2
        if tried(functools.partial(_one_gradient, chain, x[:half]), x.device) is None:
            fits = half
        else:
            too_many = half
    return fits


def _one_gradient(chain: Chain, x: Tensor) -> None:
    try:
        with frozen_parameters(chain.energy):
            plan(chain.energy, x, chain.precision, chain.where).gradient(x)
    except ValueError as error:  # batch statistics refuse a batch of one value
        raise MemoryError(str(error)) from None
