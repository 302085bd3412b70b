"""bias_act: a bias and an activation after a convolution, with the 1-bit mask that the backward pass needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import is_number, one_of
from .backend import choose, past_dispatcher, register
from .state import strides

OP = "bias_act"
register("bias_act", triton=True)
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "elu")
MASKED = ("relu", "leaky_relu")  # their slope depends on the sign of z + b alone
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def activate(v: Tensor, activation: str, slope: float) -> Tensor:
    """a(v), in v's dtype."""
    if activation == "none":
        return v
    if activation in MASKED:
        return torch.where(v > 0, v, v * slope) if _leaks(activation, slope) else torch.relu(v)
    return torch.nn.functional.silu(v) if activation == "silu" else torch.nn.functional.elu(v)


def _leaks(activation: str, slope: float) -> bool:
    """Whether anything passes below 0; relu's 0 holds for an infinite v or gradient too."""
    return activation == "leaky_relu" and slope != 0


def slope_at(v: Tensor, activation: str, slope: float) -> Tensor:
    """a′(v), in v's dtype; at 0 that of the negative side, as torch has it."""
    if activation == "none":
        return torch.ones_like(v)
    if activation in MASKED:
        low = slope if activation == "leaky_relu" else 0.0
        return torch.where(v > 0, torch.ones_like(v), torch.full_like(v, low))
    if activation == "silu":
        s = torch.sigmoid(v)
        return s * (1 + v * (1 - s))
    return torch.where(v > 0, torch.ones_like(v), v.exp())


def in_memory_order(t: Tensor) -> Tensor:
    """A dense tensor as a flat view: element i is the one at address i."""
    return (t if t.is_contiguous() else t.movedim(1, -1)).reshape(-1)


def pack_bits(bits: Tensor) -> Tensor:
    """(n,) bool -> (ceil(n / 8),) uint8: bit j of byte i is element 8 i + j."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.numel() % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(mask: Tensor, count: int) -> Tensor:
    """(ceil(n / 8),) uint8 -> (n,) bool."""
    return (mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1).bool().reshape(-1)[:count]


def check_activation(activation: str, slope: float, where: str) -> None:
    one_of(activation, ACTIVATIONS, "activation", where)
    if not is_number(slope):
        raise TypeError(f"{where}: slope must be a number, got {type(slope).__name__}")


def check_map(t: Any, name: str, where: str, like: Tensor | None = None) -> None:
    """Raise unless t is a dense 16- or 32-bit map (N, C, *spatial); with `like`, of its shape, layout and device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{where}: {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in DTYPES:
        raise TypeError(f"{where}: {name} must be float32, float16 or bfloat16, got {t.dtype}")
    if t.dim() < 2 or strides(t) is None:
        raise ValueError(
            f"{where}: {name} must have shape (N, C, *spatial), contiguous or channels-last, got shape "
            f"{tuple(t.shape)} with strides {t.stride()}"
        )
    if t.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{where}: {name} must not require grad: these ops are the chain rule by hand; detach it")
    if like is None:
        return
    if t.shape != like.shape or t.device != like.device:
        got = f"{tuple(t.shape)} on {t.device}"
        raise ValueError(f"{where}: {name} must be {tuple(like.shape)} on {like.device}, got {got}")
    if not same_layout(t, like):
        raise ValueError(
            f"{where}: {name} must have the layout of z, whose strides are {like.stride()}, got {t.stride()}"
        )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two dense maps of one shape hold their elements in the same order."""
    return strides(a) == strides(b) or (a.is_contiguous() and b.is_contiguous())


def check_channels(t: Tensor | None, name: str, z: Tensor, where: str) -> None:
    if t is None:
        return
    if not isinstance(t, Tensor) or t.dtype != torch.float32:
        raise TypeError(f"{where}: {name} must be a float32 tensor, got {t.dtype if isinstance(t, Tensor) else t!r}")
    if tuple(t.shape) != (z.shape[1],) or t.device != z.device or not t.is_contiguous():
        raise ValueError(f"{where}: {name} must be ({z.shape[1]},) on {z.device}, contiguous, got {tuple(t.shape)}")


def check_head(head: Tensor, z: Tensor, where: str) -> Tensor:
    """The head, dense in the layout of one of z's samples: flat, element i belongs to address i of a sample."""
    if not isinstance(head, Tensor) or head.dtype != torch.float32:
        got = head.dtype if isinstance(head, Tensor) else head
        raise TypeError(f"{where}: head must be a float32 tensor, got {got}")
    if tuple(head.shape) != tuple(z.shape[1:]) or head.device != z.device:
        raise ValueError(f"{where}: head must be {tuple(z.shape[1:])} on {z.device}, got {tuple(head.shape)}")
    return (head if z.is_contiguous() else head.movedim(0, -1)).contiguous().reshape(-1)


def check_bits(mask: Any, z: Tensor, where: str) -> None:
    size = -(-z.numel() // 8)
    if not isinstance(mask, Tensor) or mask.dtype != torch.uint8 or tuple(mask.shape) != (size,):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"{where}: the mask must be ({size},) uint8, a bit an element, got {got}")
    if mask.device != z.device or not mask.is_contiguous():
        raise ValueError(f"{where}: the mask must be contiguous on {z.device}, got one on {mask.device}")


def bias_act(
    z: Tensor,  # (N, C, *spatial) float32 | float16 | bfloat16, contiguous or channels-last
    bias: Tensor | None = None,  # (C,) float32
    *,
    activation: str,
    slope: float = 0.0,
    head: Tensor | None = None,  # (C, *spatial) float32
    out: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """After a convolution; or, with `head`, after the last one, whose forward is needed for its signs alone:

        v = z + b;   y = a(v), mask bit = v > 0        with a head:   y = head · a′(v), no mask

    Arithmetic is float32; y is rounded once to its dtype.

    Args:
        activation, slope: "none", "relu", "leaky_relu" (slope below 0), "silu" or "elu" (alpha 1).
        head: dE/dy of the last map, the same for every sample; y is then the first operand of the backward pass.
        out: where y goes, of z's shape and layout, any of the dtypes. None: a new tensor of z's dtype. z itself may be
            given, unless the activation is "silu" or "elu" and there is no head: their backward pass reads z.
        mask: where the bits go, (ceil(z.numel() / 8),) uint8. None: a new tensor.

    Returns:
        (y, kept): `kept` is what `bias_act_backward` takes: the mask for "relu" and "leaky_relu", z for "silu" and
        "elu", None for "none" and with a head. Bit j of the mask's byte i is the element at address 8 i + j of z.

    Raises: TypeError, ValueError, BackendError.
    """
    check_activation(activation, slope, OP)
    check_map(z, "z", OP)
    check_channels(bias, "bias", z, OP)
    flat_head = None if head is None else check_head(head, z, OP)
    masked = activation in MASKED and head is None
    smooth = activation in ("silu", "elu") and head is None
    if out is None:
        out = torch.empty_like(z)
    else:
        check_map(out, "out", OP, like=z)
        if smooth and out.data_ptr() == z.data_ptr() and z.numel():
            raise ValueError(f"{OP}: out must not be z for activation {activation!r}, whose backward pass reads z")
    if not masked:
        if mask is not None:
            raise ValueError(f"{OP}: mask must be None for activation {activation!r}{' with a head' * (not smooth)}")
    elif mask is None:
        mask = torch.empty(-(-z.numel() // 8), dtype=torch.uint8, device=z.device)
    else:
        check_bits(mask, z, OP)
    backend = choose(OP, backend, z.device)
    arguments = (z, bias, flat_head, out, mask, activation, float(slope), backend)
    if past_dispatcher(z, out):
        launch(*arguments)
    else:
        torch.ops.mgebm_fast.bias_act(*arguments)
    return out, (z if smooth else mask)


def bias_act_backward(
    grad: Tensor,  # (N, C, *spatial) float32 | float16 | bfloat16, in the layout of z
    kept: Tensor | None,  # from bias_act
    bias: Tensor | None = None,  # as in bias_act; read for "silu" and "elu" alone
    *,
    activation: str,
    slope: float = 0.0,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """grad · a′(z + b), from what `bias_act` kept.

    Args:
        grad: dE/dy; its layout must be that of the forward's z, which the mask's bits follow.
        out: where the result goes, of grad's shape and layout; grad itself may be given. None: like grad.

    Raises: TypeError, ValueError, BackendError.
    """
    where = f"{OP}_backward"
    check_activation(activation, slope, where)
    check_map(grad, "grad", where)
    if activation in MASKED:
        check_bits(kept, grad, where)
    elif activation != "none":
        check_map(kept, "kept", where, like=grad)
        check_channels(bias, "bias", grad, where)
    if out is None:
        out = torch.empty_like(grad)
    else:
        check_map(out, "out", where, like=grad)
    backend = choose(OP, backend, grad.device)
    if activation in MASKED or activation == "none":
        bias = None
    arguments = (grad, kept, bias, out, activation, float(slope), backend)
    if past_dispatcher(grad, out):
        launch_backward(*arguments)
    else:
        torch.ops.mgebm_fast.bias_act_backward(*arguments)
    return out


@torch.library.custom_op(
    "mgebm_fast::bias_act",
    mutates_args=("out", "mask"),
    schema="(Tensor z, Tensor? bias, Tensor? head, Tensor(a0!) out, Tensor(a1!)? mask, str activation, float slope, "
    "str backend) -> ()",
)
def _bias_act(z, bias, head, out, mask, activation, slope, backend):
    launch(z, bias, head, out, mask, activation, slope, backend)


@_bias_act.register_fake
def _(z, bias, head, out, mask, activation, slope, backend):
    return None


@torch.library.custom_op(
    "mgebm_fast::bias_act_backward",
    mutates_args=("out",),
    schema="(Tensor grad, Tensor? kept, Tensor? bias, Tensor(a0!) out, str activation, float slope, str backend) -> ()",
)
def _bias_act_backward(grad, kept, bias, out, activation, slope, backend):
    launch_backward(grad, kept, bias, out, activation, slope, backend)


@_bias_act_backward.register_fake
def _(grad, kept, bias, out, activation, slope, backend):
    return None


def launch(
    z: Tensor,
    bias: Tensor | None,
    head: Tensor | None,  # flat, in the order of a sample's memory
    out: Tensor,
    mask: Tensor | None,
    activation: str,
    slope: float,
    backend: str,
) -> None:
    """The forward on checked arguments, past the dispatcher."""
    if z.numel() == 0:
        return
    if backend == "triton":
        from ..kernels.bias_act import bias_act as kernel

        kernel(z, bias, head, out, mask, activation=activation, slope=slope)
    else:
        bias_act_reference(z, bias, head, out, mask, activation, slope)


def launch_backward(
    grad: Tensor, kept: Tensor | None, bias: Tensor | None, out: Tensor, activation: str, slope: float, backend: str
) -> None:
    """The backward on checked arguments, past the dispatcher."""
    if grad.numel() == 0:
        return
    if backend == "triton":
        from ..kernels.bias_act import bias_act_backward as kernel

        kernel(grad, kept, bias, out, activation=activation, slope=slope)
    else:
        bias_act_backward_reference(grad, kept, bias, out, activation, slope)


def by_channel(t: Tensor, z: Tensor) -> Tensor:
    """(C,) as float64, shaped to broadcast over z."""
    return t.double().reshape(-1, *[1] * (z.dim() - 2))


def bias_act_reference(
    z: Tensor,
    bias: Tensor | None,
    head: Tensor | None,
    out: Tensor,
    mask: Tensor | None,
    activation: str,
    slope: float,
) -> None:
    """The formula in plain torch: float64 throughout, rounded once at the end."""
    v = z.double() if bias is None else z.double() + by_channel(bias, z)
    if mask is not None:
        mask.copy_(pack_bits(in_memory_order(v > 0)))
    if head is None:
        out.copy_(activate(v, activation, slope))
    else:
        by_address = in_memory_order(slope_at(v, activation, slope)).reshape(z.shape[0], -1) * head.double()
        in_memory_order(out).copy_(by_address.reshape(-1))


def bias_act_backward_reference(
    grad: Tensor, kept: Tensor | None, bias: Tensor | None, out: Tensor, activation: str, slope: float
) -> None:
    """The formula in plain torch: float64 throughout, rounded once at the end."""
    g = grad.double()
    if activation in MASKED:
        assert kept is not None
        positive, flat = unpack_bits(kept, grad.numel()), in_memory_order(g)
        below = flat * slope if _leaks(activation, slope) else torch.zeros_like(flat)
        in_memory_order(out).copy_(torch.where(positive, flat, below))
    elif activation == "none":
        out.copy_(g)
    else:
        assert kept is not None
        v = kept.double() if bias is None else kept.double() + by_channel(bias, kept)
        out.copy_(g * slope_at(v, activation, slope))
