"""Checks on the state x of a chain and on its mask: what may be handed to native code, dtypes, shapes, layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


def why_not_plain(tensor: Any, *, dispatched: bool = False) -> str:
    """Why a tensor's values are not just the numbers in its memory, so that no native code may take its address; an
    empty string where they are: tensors and parameters with dense storage of their size, on a device.

    dispatched: torch's dispatcher handed the tensor to a kernel; a subclass that does not dispatch is plain then.
    """
    kind = type(tensor)
    if kind is not Tensor and kind is not Parameter:
        if not dispatched or not isinstance(tensor, Tensor) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return f"a {kind.__name__}"
    if _keys_of(tensor) not in _PLAIN_KEYS and (reason := _why_not_strided(tensor)):
        return reason
    elements = tensor.numel()
    if tensor.is_contiguous():
        last = tensor.storage_offset() + elements
    else:
        last = tensor.storage_offset() + 1
        last += sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if elements and last * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "larger than its storage"
    return ""


def _why_not_strided(tensor: Tensor) -> str:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return f"of layout {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')}"
    if tensor.is_neg() or tensor.is_conj():
        return "a negative or conjugate view"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or torch._is_functional_tensor(tensor):
        return "wrapped by a transform of torch's"
    return "on meta" if tensor.is_meta else ""


def _keys_of(tensor: Tensor) -> int | None:
    """Which of torch's kernels are for a tensor: every kind that is not plain has a key of its own."""
    try:
        return torch._C._dispatch_keys(tensor).raw_repr()
    except AttributeError:  # of a torch without that name
        return None


def _plain_keys() -> frozenset[int | None]:
    usual = torch.empty(0, device="cpu")
    with torch.inference_mode():
        return frozenset((_keys_of(usual), _keys_of(torch.empty(0, device="cpu")))) - {None}


_PLAIN_KEYS = _plain_keys()


def addresses(where: str, *tensors: Tensor | None, dispatched: bool = False) -> list[int]:
    """The address of each tensor, 0 for None: the one way from an op to native code. TypeError for one not plain."""
    pointers = []
    for tensor in tensors:
        if tensor is None:
            pointers.append(0)
            continue
        reason = why_not_plain(tensor, dispatched=dispatched)
        if reason:
            raise TypeError(
                f"{where}: native code takes plain tensors, got one that is {reason}; give "
                '`.as_subclass(torch.Tensor)`, the tensor inside, or backend="reference"'
            )
        pointers.append(tensor.data_ptr())
    return pointers


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no entry is NaN or infinite. Torch's sum of squares is ten times as fast as its largest entry, which is
    asked for only where a sum overflows."""
    some = [tensor for tensor in tensors if tensor.numel()]

    def holds(order: float) -> bool:
        return bool(torch.stack(torch._foreach_norm(some, order)).isfinite().all())

    return not some or holds(2) or holds(math.inf)


def dimensions(x: Tensor) -> tuple[int, int, int]:
    """(N, C, S): samples, channels, and the product of the spatial dimensions."""
    shape = tuple(x.shape)
    channels = shape[1] if len(shape) > 1 else 1
    return shape[0], channels, math.prod(shape[2:])


def strides(x: Tensor) -> tuple[int, int, int] | None:
    """(sample, channel, spatial) strides of a contiguous or channels-last tensor; None for any other layout."""
    _, channels, spatial = dimensions(x)
    if x.is_contiguous():
        return channels * spatial, spatial, 1
    if x.dim() > 2 and x.movedim(1, -1).is_contiguous():
        return channels * spatial, 1, channels
    return None


def check_state(x: Tensor, where: str) -> None:
    """Raise unless x is a dense float32 tensor (N, …) that may be written in place."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{where}: x must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        raise TypeError(f"{where}: x must be float32 (the state and the update are float32 always), got {x.dtype}")
    if x.dim() == 0:
        raise ValueError(f"{where}: x must have shape (N, ...), got a 0-dim tensor")
    if strides(x) is None:
        raise ValueError(
            f"{where}: x must be contiguous or channels-last, since it is updated in place, got shape "
            f"{tuple(x.shape)} with strides {x.stride()}; call .contiguous() and keep the result"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{where}: x must not require grad, since it is updated in place; detach it first")


def check_mask(mask: Tensor, x: Tensor, where: str) -> Tensor:
    """The mask as a contiguous bool tensor of x's rank, each dimension 1 or x's, the spatial ones all or none."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{where}: mask must be a bool tensor (True = updated), got {got}")
    if mask.device != x.device:
        raise ValueError(f"{where}: mask must be on {x.device}, as x is, got {mask.device}")
    shape = (1,) * (x.dim() - mask.dim()) + tuple(mask.shape)
    if len(shape) > x.dim() or any(m not in (1, n) for m, n in zip(shape, x.shape)):
        raise ValueError(f"{where}: mask must broadcast to x's shape {tuple(x.shape)}, got {tuple(mask.shape)}")
    mask = mask.reshape(shape)
    if any(size != 1 for size in shape[2:]):
        mask = mask.expand(*shape[:2], *x.shape[2:])
    return mask.contiguous()


def mask_strides(mask: Tensor, x: Tensor) -> tuple[int, int, int]:
    """(sample, channel, spatial) strides of a checked mask, 0 where it broadcasts."""
    samples, channels, spatial = dimensions(mask)
    return (
        channels * spatial if samples > 1 else 0,
        spatial if channels > 1 else 0,
        1 if spatial > 1 else 0,
    )


def dense_copy(x: Tensor) -> Tensor:
    """A copy that may be updated in place: channels-last stays so, any other layout becomes contiguous."""
    dense = x.is_contiguous() or strides(x) is not None
    layout = torch.preserve_format if dense else torch.contiguous_format
    if not torch.is_inference_mode_enabled():
        return x.detach().clone(memory_format=layout)
    with torch.inference_mode(False), torch.no_grad():
        return x.detach().clone(memory_format=layout)
