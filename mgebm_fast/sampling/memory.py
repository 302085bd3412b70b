"""Batches that do not fit in memory: split where samples are independent, refused with what fits where they are not.

Memory in a chain does not grow with its steps, so a batch that is through one step is through them all. What does not
fit is found out by trying: the first parts that fit are remembered for the energy, and later chains begin with them. A
sample's noise hangs on its id alone, so parts take the very noise of the whole batch; what a split changes is the
rounding of convolutions that run at another batch size (docs/reproducibility.md).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import noise
from ..errors import BatchTooLargeError
from ..gradient import frozen_parameters, plan
from ..nets.layers import BatchStatistics
from ..ops import counters

if TYPE_CHECKING:
    from .chain import Chain

# What torch, cuBLAS, cuDNN and oneDNN say when there is no memory; only torch on CUDA has a class for it.
_SAYINGS = (
    "out of memory", "can't allocate memory", "could not allocate", "not enough memory", "ALLOC_FAILED",
    "could not create a memory object",
)  # fmt: skip
# Energies of the same samples in another company may differ by rounding, by statistics they differ by far more.
_COUPLED = 1e-4

# energy -> {(shape of a sample, device): samples that fitted}
_fitted: MutableMapping[Any, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a GPU or a CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAYINGS)


def tried(call: Callable[[], Any], device: torch.device) -> bool:
    """Run `call`; False where memory ran out, with what the attempt held given back."""
    try:
        call()
        return True
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Past the except block, whose traceback keeps the tensors of the attempt alive.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def advance_(chain: Chain, x: Tensor, origin: Tensor, start: int, stop: int) -> None:
    """`chain.advance_` from x, whose values `origin` holds too, in parts of the batch where the whole does not fit.

    Raises BatchTooLargeError where it does not fit and cannot be split; the message says how many samples fit.
    """
    samples = x.shape[0]
    key = (tuple(x.shape[1:]), x.device)
    part = min(_remembered(chain.energy).get(key, samples), samples)
    done = 0
    while done < samples:
        rows = slice(done, min(done + part, samples))
        if tried(functools.partial(_advance_part, chain, x, rows, start, stop), x.device):
            done = rows.stop
            continue
        x[rows] = origin[rows]
        part = _smaller(chain, x, part)
        _remembered(chain.energy)[key] = part


def _advance_part(chain: Chain, x: Tensor, rows: slice, start: int, stop: int) -> None:
    if rows.stop - rows.start < x.shape[0]:
        chain, x = of_part(chain, x, rows), x[rows]
    chain.advance_(x, start, stop)


def _remembered(energy: Any) -> dict[tuple[Any, ...], int]:
    try:
        return _fitted.setdefault(energy, {})
    except TypeError:  # a callable without weak references
        return {}


def _smaller(chain: Chain, x: Tensor, part: int) -> int:
    """The size of part to try after `part` samples did not fit."""
    samples, where = x.shape[0], chain.where
    if part <= 1:
        raise BatchTooLargeError(f"{where}: one sample of shape {tuple(x.shape[1:])} does not fit in memory")
    if part >= samples:
        reason = why_coupled(chain.energy, x)
        if reason:
            fits = largest_that_fits(chain, x)
            what = f"at most {fits} fit" if fits else "not even one sample fits"
            raise BatchTooLargeError(
                f"{where}: a batch of {samples} does not fit in memory, {what}; it cannot be split, since {reason}"
            )
    smaller = (part + 1) // 2
    warnings.warn(
        f"{where}: {part} samples do not fit in memory; they run {smaller} at a time, each with the noise that it has "
        "in the whole batch",
        stacklevel=2,
    )
    return smaller


def of_part(chain: Chain, x: Tensor, rows: slice) -> Chain:
    """The chain of some samples of a batch, with their masks, their noise and a plan for their number."""
    mask = chain.mask
    if mask is not None and mask.shape[0] > 1:
        mask = mask[rows]
    part = dataclasses.replace(chain, mask=mask, place=_placed(chain.place, rows)).planned(x[rows])
    if chain.bad_step is None or part.bad_step is None:
        return part
    # One cell for the whole batch.
    if hasattr(part.plan, "bad_step"):
        part.plan.bad_step = chain.bad_step
    return dataclasses.replace(part, bad_step=chain.bad_step)


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
        if tried(functools.partial(_one_gradient, chain, x[:half]), x.device):
            fits = half
        else:
            too_many = half
    return fits


def _one_gradient(chain: Chain, x: Tensor) -> None:
    try:
        with frozen_parameters(chain.energy):
            plan(chain.energy, x, chain.precision, chain.where).gradient(x)
    except ValueError as error:  # batch statistics of one value
        raise MemoryError(str(error)) from None


def why_coupled(energy: Any, x: Tensor) -> str:
    """Why the energies of a batch hang on each other; an empty string where they do not.

    Modules say so; of any callable four samples are asked, in pairs and together, at noisy x so that equal samples
    cannot hide it.
    """
    if coupled := coupling_of(energy):
        return coupled
    probe = x[:4].detach()
    words, _ = noise.words(probe.shape[0], probe[0].numel(), seed=0, step=0, device=x.device)
    shake = noise.normal(words).flatten(1)[:, : probe[0].numel()].reshape(probe.shape).float()
    probe = probe + 0.1 * (1.0 + probe.abs().amax()) * shake
    halves: list[Tensor] = []
    whole: list[Tensor] = []

    def ask() -> None:
        with torch.no_grad():
            whole.append(energy(probe))
            halves.extend(energy(half) for half in probe.split(2))

    if not tried(ask, x.device):
        return ""  # where not four fit, statistics of a batch are of no use to anyone
    together, apart = whole[0], torch.cat(halves)
    if bool(((together - apart).abs() <= _COUPLED * (together.abs().amax() + 1e-6)).all()):
        return ""
    return "the energy of a sample changes with the samples beside it"


def coupling_of(energy: Any) -> str:
    """How the modules of an energy couple the samples of a batch; an empty string where none is known to."""
    for module in _modules_of(energy):
        if isinstance(module, BatchStatistics):
            return "norm='batch' normalises by the statistics of the batch"
        statistics = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if statistics and (module.training or (module.running_mean is None and module.running_var is None)):
            return f"a {type(module).__name__} normalises by the statistics of the batch"
    return ""


def _modules_of(energy: Any) -> Iterator[nn.Module]:
    """The modules that a callable is, is a method of, or closes over."""
    found: list[Any] = [energy, getattr(energy, "__self__", None), getattr(energy, "func", None)]
    if inspect.isfunction(energy):
        around = inspect.getclosurevars(energy)
        found += [*around.nonlocals.values(), *around.globals.values()]
    for value in found:
        if isinstance(value, nn.Module):
            yield from value.modules()
