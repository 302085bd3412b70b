"""The multi-grid cascade as functions: one chain a grid, coarse to fine, with known pixels imposed at every size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import noise, ops
from ..gradient.plan import Energy
from .langevin import Langevin

GridCallback = Callable[[int, int, Tensor], Any]


def check_sizes(sizes: Sequence[int], where: str = "MultiGrid") -> tuple[int, ...]:
    """`sizes` as a tuple when they start at 1, grow, and each divides the next; else an error naming the pair."""
    ladder = tuple(sizes)
    if len(ladder) < 2 or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in ladder):
        raise ValueError(f"{where}: sizes must be two or more positive ints, got {list(ladder)}")
    if ladder[0] != 1:
        raise ValueError(f"{where}: sizes must start at 1, the colour that chains start from, got {list(ladder)}")
    for coarse, fine in zip(ladder, ladder[1:], strict=False):
        if fine <= coarse or fine % coarse:
            raise ValueError(f"{where}: sizes must grow and each must divide the next, got {coarse} → {fine}")
    return ladder


def updated_cells(mask: Tensor, size: int) -> Tensor:
    """The mask at a coarser size: a cell is held (False) only where its whole block is held."""
    for dim in range(2, mask.dim()):
        mask = mask.unflatten(dim, (size, -1)).any(dim + 1)
    return mask


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
    seed: int | Tensor,
    first_sample: int | Tensor = 0,
    first_step: int | Sequence[int] = 0,
    purpose: noise.Purpose = noise.Purpose.SAMPLING,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    callback: GridCallback | None = None,
    precision: str = "auto",
    backend: str = "auto",
) -> list[Tensor]:
    """The result at every size, `start` first: each grid's chain starts at the replicated result of the one before.

    nets[i] and dynamics[i] serve sizes[i + 1], whose noise stream is (purpose, i + 1). With `known` and `mask` (at the
    finest size, False = known) the known pixels stand at each size as the means of their blocks.
    """
    where = "cascade"
    if not isinstance(start, Tensor) or start.dtype != torch.float32:
        kind = start.dtype if isinstance(start, Tensor) else type(start).__name__
        raise TypeError(f"{where}: start must be a float32 tensor, got {kind}")
    rank = start.dim() - 2
    if rank < 1 or start.shape[2:] != (sizes[0],) * rank:
        raise ValueError(f"{where}: start must have shape (N, C, {sizes[0]}, …), got {tuple(start.shape)}")
    steps = [first_step] * len(nets) if isinstance(first_step, (int, Tensor)) else list(first_step)
    if len(steps) != len(nets) or len(dynamics) != len(nets):
        got = f"{len(dynamics)} and {len(steps)}"
        raise ValueError(f"{where}: langevin and first_step must hold one entry a net ({len(nets)}), got {got}")
    held = check_known(known, mask, (*start.shape[:2], *(sizes[-1],) * rank), start.device, where)
    means = ops.pyramid(held[0], list(sizes)) if held is not None else []

    def imposed(x: Tensor, grid: int) -> tuple[Tensor, Tensor | None]:
        if held is None:
            return x, None
        cells = updated_cells(held[1], sizes[grid])
        return torch.where(cells, x, means[grid]), cells

    results = [imposed(start, 0)[0]]
    for grid, (net, langevin) in enumerate(zip(nets, dynamics, strict=True), start=1):
        x, cells = imposed(ops.upsample(results[-1], sizes[grid] // sizes[grid - 1]), grid)
        results.append(
            langevin(
                net,
                x,
                mask=cells,
                seed=seed,
                first_sample=first_sample,
                first_step=steps[grid - 1],
                stream=noise.stream(purpose, grid),
                precision=precision,
                backend=backend,
                callback=None if callback is None else _of_grid(callback, grid),
                where=f"{where}: grid {grid} (size {sizes[grid]})",
            )
        )
    return results


def _of_grid(callback: GridCallback, grid: int) -> Callable[[int, Tensor], Any]:
    return lambda step, x: callback(grid, step, x)
