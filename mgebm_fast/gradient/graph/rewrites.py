"""Functions of torch that are put into other ops of the same result while an energy is read, since those that torch
makes of them write into memory or move the batch."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions and attributes that give Python what no op shows: a tensor's numbers, or what it is besides.
_NUMBERS = {
    getattr(torch.Tensor, name, None)
    for name in ("__array__", "numpy", "tolist", "__repr__", "__format__", "__dlpack__", "data_ptr", "storage",
                 "untyped_storage", "__deepcopy__", "__reduce_ex__")
}  # fmt: skip
_HIDING = _NUMBERS | {getattr(Tensor, name).__get__ for name in ("requires_grad", "is_leaf", "grad", "_version")}

# And those that lead to code of the user's in the backward pass.
_HOOKING = {
    torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook, torch.Tensor.grad_fn.__get__,
    torch.Tensor._backward_hooks.__get__, torch.Tensor._backward_hooks.__set__,
}  # fmt: skip


class Rewrites(TorchFunctionMode):
    """Circular padding as an index of pixels, einsum as products and sums that keep the output's first letter first,
    cosines as a quotient. `hidden`: whether the energy's code took something from a tensor that no op shows.

    depends: whether a tensor depends on x; refuse: raises Unreadable.
    """

    def __init__(self, depends: Callable[[Any], bool], refuse: Callable[[str], NoReturn]) -> None:
        super().__init__()
        self._depends, self._refuse, self.hidden = depends, refuse, False

    def __torch_function__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _HIDING and not _is_ours(sys._getframe(1)):
            if func in _NUMBERS and self._depends(args[0]):
                self._refuse(f"numbers that depend on x are taken out ({func.__name__})")
            self.hidden = True
        if func in _HOOKING and self._depends(args[0]):
            self._refuse("a hook may change a gradient (register_hook, grad_fn)")
        if func is F.pad and "circular" in (kwargs.get("mode"), *args[2:3]):
            return _circular(*args, **kwargs)
        if func is torch.einsum and not kwargs and isinstance(args[0], str):
            return _einsum(args[0], args[1] if isinstance(args[1], (list, tuple)) else args[1:])
        if func is torch.cosine_similarity:  # F's is the same; torch clamps the norms where no gradient sees it
            return _cosine(*args, **kwargs)
        return func(*args, **kwargs)


def _is_ours(frame: types.FrameType | None) -> bool:
    """Whether this package's code called a method of tensors: a check of labels in one of its nets has no other result,
    and a reading asks where tensors lie."""
    between = "torch._tensor", "torch.overrides", "torch.utils._device"
    while frame is not None and frame.f_globals.get("__name__") in between:
        frame = frame.f_back
    name = "" if frame is None else str(frame.f_globals.get("__name__"))
    return name.partition(".")[0] == __name__.partition(".")[0]


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    x1, x2 = torch.broadcast_tensors(x1, x2)
    norms = (torch.linalg.vector_norm(x, dim=dim).clamp_min(eps) for x in (x1, x2))
    return (x1 * x2).sum(dim) / math.prod(norms)


def _circular(input: Tensor, pad: Any, mode: str = "circular", value: Any = None) -> Tensor:
    x = input
    for place in range(len(pad) // 2):
        n, before, after = x.shape[-1 - place], pad[2 * place], pad[2 * place + 1]
        if max(before, after) > n:
            return F.pad(input, pad, mode, value)  # which refuses it
        x = x.index_select(-1 - place, torch.arange(-before, n + after) % n)
    return x


def _einsum(equation: str, operands: Any) -> Tensor:
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    plain = arrow and out and all(term.isalpha() and len(set(term)) == len(term) for term in (*terms, out))
    if not plain or len(terms) != len(operands) or any(t.dim() != len(term) for t, term in zip(operands, terms)):
        return torch.einsum(equation, operands)
    result, letters = operands[0], terms[0]
    for place, (tensor, term) in enumerate(zip(operands[1:], terms[1:], strict=True), 2):
        later = set(out).union(*terms[place:])
        kept = "".join(dict.fromkeys(c for c in letters + term if c in later))
        kept = "".join(sorted(kept, key=lambda c: c != out[0]))
        result, letters = _product(result, letters, tensor, term, kept), kept
    if gone := [i for i, c in enumerate(letters) if c not in out]:
        result, letters = result.sum(gone), "".join(c for c in letters if c in out)
    return result if letters == out else result.permute([letters.index(c) for c in out])


def _product(a: Tensor, first: str, b: Tensor, second: str, kept: str) -> Tensor:
    """The sum over all letters but those that are kept."""
    if kept and kept[0] not in first:
        a, first, b, second = b, second, a, first
    summed = "".join(c for c in dict.fromkeys(first + second) if c not in kept)
    if kept and first == kept[0] + summed and set(second) == set(kept[1:] + summed):
        order = [second.index(c) for c in summed + kept[1:]]
        matrix = b.permute(order).reshape(math.prod(a.shape[1:]), -1)
        return (a.flatten(1) @ matrix).reshape(len(a), *b.permute(order).shape[len(summed) :])
    whole = kept + summed
    product = _spread(a, first, whole) * _spread(b, second, whole)
    return product.sum(list(range(len(kept), len(whole)))) if summed else product


def _spread(tensor: Tensor, letters: str, whole: str) -> Tensor:
    """With a dimension for each letter of `whole`, of length 1 where it has none."""
    order = [letters.index(c) for c in whole if c in letters]
    tensor = tensor if order == sorted(order) else tensor.permute(order)
    for place, c in enumerate(whole):
        tensor = tensor if c in letters else tensor.unsqueeze(place)
    return tensor
