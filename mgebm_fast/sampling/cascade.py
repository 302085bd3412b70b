"""The multi-grid cascade as functions: one chain a grid, coarse to fine, with known pixels imposed at every size."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .. import noise, ops
from ..checks import is_int, number
from ..errors import BackendError, Refused
from ..gradient.plan import Energy
from . import arguments, graphs
from .chain import Ids
from .langevin import Langevin
from .running import place_of, prepare
from .static import StaticCascade, StaticChain

GridCallback = Callable[[int, int, Tensor], Any]
UPSAMPLINGS = ("nearest", "linear")  # how a grid's chain gets its start from the coarser result


def check_sizes(sizes: Sequence[int], where: str = "MultiGrid") -> tuple[int, ...]:
    """`sizes` as a tuple when they start at 1, grow, and each divides the next; else an error naming the pair."""
    ladder = tuple(map(number, sizes))
    if len(ladder) < 2 or not all(is_int(s, 1) for s in ladder):
        raise ValueError(f"{where}: sizes must be two or more positive ints, got {list(ladder)}")
    if ladder[0] != 1:
        raise ValueError(f"{where}: sizes must start at 1, the colour that chains start from, got {list(ladder)}")
    for coarse, fine in zip(ladder, ladder[1:], strict=False):
        if fine <= coarse or fine % coarse:
            raise ValueError(f"{where}: sizes must grow and each must divide the next, got {coarse} → {fine}")
    return ladder


def check_upsampling(upsampling: str, where: str = "cascade") -> str:
    """`upsampling` when it is one of UPSAMPLINGS; else an error that names them."""
    if not isinstance(upsampling, str) or upsampling not in UPSAMPLINGS:
        raise Refused("upsampling", f"be {' or '.join(map(repr, UPSAMPLINGS))}", repr(upsampling), where)
    return upsampling


def updated_cells(mask: Tensor, size: int) -> Tensor:
    """The mask at a coarser size: a cell is held (False) where any pixel of its block is known."""
    for dim in range(2, mask.dim()):
        mask = mask.unflatten(dim, (size, -1)).all(dim + 1)
    return mask


def known_means(known: Tensor, mask: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """At every size the mean of each block's known pixels, 0 where there is none; `known` is 0 where it is unknown."""
    sums, shares = (ops.pyramid(x, list(sizes)) for x in (known, (~mask).to(known.dtype)))
    return [total / torch.where(share > 0, share, 1.0) for total, share in zip(sums, shares, strict=True)]


def check_known(
    known: Tensor | None, mask: Tensor | None, shape: tuple[int, ...], device: torch.device, where: str
) -> tuple[Tensor, Tensor] | None:
    """(known, mask) expanded to the finest shape (N, C, S, S), None when there are neither; one alone is an error."""
    if known is None and mask is None:
        return None
    if known is None or mask is None:
        raise ValueError(f"{where}: known and mask go together, got {'mask' if known is None else 'known'} alone")
    for name, value, dtype in (("known", known, torch.float32), ("mask", mask, torch.bool)):
        if not isinstance(value, Tensor) or value.dtype != dtype:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{where}: {name} must be a {str(dtype).removeprefix('torch.')} tensor, got {got}")
        if value.device != device:
            raise ValueError(f"{where}: {name} must be on {device}, where the model is, got {value.device}")
        lead = (1,) * (len(shape) - value.dim()) + tuple(value.shape)
        if len(lead) != len(shape) or any(v not in (1, s) for v, s in zip(lead, shape, strict=True)):
            raise ValueError(f"{where}: {name} must broadcast to {shape}, got {tuple(value.shape)}")
    # What a mask calls unknown may hold anything, NaN included: it must not leak into block means.
    mask = mask.expand(shape)
    known = torch.where(mask, 0.0, known.expand(shape))
    if not bool(torch.isfinite(known).all()):
        raise ValueError(f"{where}: known must be finite where the mask is False, got NaN or infinite values")
    return known.contiguous(), mask.contiguous()


def cascade(
    nets: Sequence[Energy],
    sizes: Sequence[int],
    dynamics: Sequence[Langevin],
    start: Tensor,  # (N, C, *sizes[0]) float32
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_sample: Ids = 0,
    first_step: int | Sequence[int] = 0,
    purpose: noise.Purpose | int = noise.Purpose.SAMPLING,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    callback: GridCallback | None = None,
    upsampling: str = "nearest",
    first_grid: int = 0,
    precision: str = "auto",
    backend: str = "auto",
    graph: graphs.Graph = None,
) -> list[Tensor]:
    """The result at every size, `start` first: each grid's chain starts at the enlarged result of the one before.

    nets[i] and dynamics[i] serve sizes[i + 1], whose noise stream is (purpose, first_grid + i + 1); `first_grid` is the
    number of `start`'s grid where that is not the first of a model. With `known` and `mask` (at the finest size,
    False = known) a cell of a coarser size is set to the mean of its block's known pixels, where it has any.
    `upsampling` as in `enlarged`. `graph` as in `langevin_sample`: one CUDA graph then holds all chains. In a training
    loop leave `seed` out, or let `first_step` count on: every call then has noise of its own (`generator` as in
    `langevin_sample`).
    """
    where = "cascade"
    if not isinstance(start, Tensor) or start.dtype != torch.float32:
        kind = start.dtype if isinstance(start, Tensor) else type(start).__name__
        raise TypeError(f"{where}: start must be a float32 tensor, got {kind}")
    rank = start.dim() - 2
    if rank < 1 or start.shape[2:] != (sizes[0],) * rank:
        raise ValueError(f"{where}: start must have shape (N, C, {sizes[0]}, …), got {tuple(start.shape)}")
    first = first_step if isinstance(first_step, (list, tuple)) else [first_step] * len(nets)
    steps = [arguments.counter(step) for step in first]
    if len(steps) != len(nets) or len(dynamics) != len(nets):
        got = f"{len(dynamics)} and {len(steps)}"
        raise ValueError(f"{where}: langevin and first_step must hold one entry a net ({len(nets)}), got {got}")
    held = check_known(known, mask, (*start.shape[:2], *(sizes[-1],) * rank), start.device, where)
    session = graphs.session_of(graph, callback, where)
    counted = arguments.place(seed, generator, first_sample, 0, start.device, where)
    seed, first_sample = counted["seed"], counted["first_sample"]
    grids = range(1, len(sizes))
    options: dict[str, Any] = {"precision": precision, "backend": backend}

    def name(grid: int) -> str:
        return f"{where}: grid {first_grid + grid} (size {sizes[grid]})"

    def placing(grid: int) -> dict[str, Any]:
        stream = noise.stream(purpose, first_grid + grid)
        return {"seed": seed, "first_sample": first_sample, "first_step": steps[grid - 1], "stream": stream}

    def shape(grid: int) -> tuple[int, ...]:
        return (*start.shape[:2], *(sizes[grid],) * rank)

    def build() -> StaticCascade:
        return static_cascade(
            nets, sizes, dynamics, start, held, upsampling=upsampling, first_grid=first_grid, purpose=purpose,
            first_sample=first_sample, session=session, **options,
        )  # fmt: skip

    ids = isinstance(first_sample, Tensor) and first_sample.dim() > 0
    slot = None  # in a pipeline each grid has a graph of its own
    if session.on is None and start.device.type in graphs.DEVICES:
        like = start.new_empty(())  # of an x only the shape and the device count: it takes no memory
        numbers = [d.update(like.expand(shape(g)), name(g)) for g, d in zip(grids, dynamics, strict=True)]
        forms = tuple((d.steps, n.form) for d, n in zip(dynamics, numbers, strict=True))
        rest = tuple(sizes), forms, purpose, ids, upsampling, first_grid
        slot = graphs.slot_for_cascade(nets, start, held, session, *rest, **options)
    if slot is not None:
        slot.refresh()
        places = [
            place_of(start.new_empty(shape(g)), dynamics[g - 1].steps, where=name(g), **placing(g)) for g in grids
        ]
        results = slot.run(session, build, start, held, places, numbers)
        if results is not None:
            return results

    def advance(grid: int, x: Tensor, cells: Tensor | None) -> Tensor:
        own = session if session.on is None else dataclasses.replace(session, lane=grid)
        return dynamics[grid - 1](
            nets[grid - 1], x, mask=cells, graph=own, where=name(grid), **placing(grid), **options,
            callback=of_grid(callback, first_grid + grid),
        )  # fmt: skip

    return walk(sizes, start, held, advance, session.on, upsampling=upsampling)


def static_cascade(
    nets: Sequence[Energy],
    sizes: Sequence[int],
    dynamics: Sequence[Langevin],
    start: Tensor,  # (N, C, *sizes[0])
    held: tuple[Tensor, Tensor] | None = None,  # (known, mask) at the finest size
    *,
    upsampling: str = "nearest",
    first_grid: int = 0,
    purpose: noise.Purpose | int,
    first_sample: Ids = 0,
    session: graphs.Session = graphs.Session(),  # noqa: B008  (frozen)
    **options: Any,
) -> StaticCascade:
    """The chains of a cascade at fixed addresses, for a graph to capture; arguments as `cascade`'s, `options` its
    precision and backend. BackendError names the grid whose chain no graph can hold."""
    statics = []
    for grid, (net, langevin) in enumerate(zip(nets, dynamics, strict=True), start=1):
        x = start.new_empty((*start.shape[:2], *(sizes[grid],) * (start.dim() - 2)))
        cells = None if held is None else updated_cells(held[1], sizes[grid])
        chain = static_chain(
            net, x, langevin, session, mask=cells, first_sample=first_sample,
            stream=noise.stream(purpose, first_grid + grid),
            where=f"cascade: grid {first_grid + grid} (size {sizes[grid]})", **options,
        )  # fmt: skip
        statics.append(chain)
    walks = functools.partial(walk, sizes, upsampling=upsampling)
    return StaticCascade(statics, start, held, walks, replicates=upsampling == "nearest")


def static_chain(
    net: Energy, x: Tensor, langevin: Langevin, session: graphs.Session, *, where: str, **options: Any
) -> StaticChain:
    """One chain from tensors like x at fixed addresses; `options` as `prepare`'s. BackendError where no graph can hold
    it."""
    chain = prepare(net, x, langevin.steps, langevin, seed=0, where=where, **options).chain
    if reason := graphs.why_not_plan(chain.plan, session):
        raise BackendError(f"{where}: {reason}")
    return StaticChain(chain, x, langevin.steps)


def walk(
    sizes: Sequence[int],
    start: Tensor,
    held: tuple[Tensor, Tensor] | None,  # (known, mask) at the finest size
    advance: Callable[[int, Tensor, Tensor | None], Tensor],  # (grid, start of its chain, mask) -> its end
    on: Callable[..., contextlib.AbstractContextManager[None]] | None = None,  # (grid, *inputs): where a grid's work is
    *,
    upsampling: str,
    done: Sequence[Tensor] = (),  # results of the first grids, where they are there already
) -> list[Tensor]:
    """The loop over grids: each chain's result, enlarged and with known pixels imposed, is the start of the next."""
    means = known_means(*held, sizes) if held is not None else []

    def imposed(x: Tensor, grid: int) -> tuple[Tensor, Tensor | None]:
        if held is None:
            return x, None
        cells = updated_cells(held[1], sizes[grid])
        return torch.where(cells, x, means[grid]), cells

    results = [*done] or [imposed(start, 0)[0]]
    for grid in range(len(results), len(sizes)):
        with on(grid, results[-1], held, means) if on is not None else contextlib.nullcontext():
            x = enlarged(results[-1], sizes[grid], upsampling)
            results.append(advance(grid, *imposed(x, grid)))
    return results


def enlarged(x: Tensor, size: int, upsampling: str) -> Tensor:  # (N, C, s, …) -> (N, C, size, …)
    """x at a finer size, whose block means are x: "nearest" replicates its pixels, as Gao et al. do; "linear"
    interpolates between their centres, and adds to each block what its mean then lacks, so that pixels may be darker or
    brighter than all of x."""
    check_upsampling(upsampling)
    factor = size // x.shape[-1]
    if upsampling == "nearest" or x.shape[-1] == 1:
        return ops.upsample(x.contiguous(), factor)
    mode = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
    smooth = interpolate(x, size=(size,) * (x.dim() - 2), mode=mode, align_corners=False).contiguous()
    (means,) = ops.pyramid(smooth, [x.shape[-1]])
    return smooth.add_(ops.upsample(x - means, factor))


def of_grid(callback: GridCallback | None, grid: int) -> Callable[[int, Tensor], Any] | None:
    """The callback of one grid's chain."""
    return None if callback is None else functools.partial(callback, grid)
