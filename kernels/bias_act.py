"""bias_act: v = z + b, y = a(v) and a mask bit v > 0; or y = head a'(v). bias_act_backward: grad a'(v).

    z, out, grad    (N, C, *spatial), float32 / float16 / bfloat16, contiguous or channels-last, all in one layout: they
                    are walked flat, in the order of memory; arithmetic in float32
    mask            (ceil(count / 8),) uint8, bit j of byte i is the element at address 8 i + j
    thread mapping  128 eights a program, one a thread; at 16 bits a thread packs its own bits, at float32 two threads
                    share a byte
    bytes an element (16 bits)  forward 2 read + 2 written + 1/8; with a head 2 + 2; backward 2 + 2 + 1/8, of silu and
                    elu 4 + 2
    paths           128-bit loads and stores where 8 divides the count; the bias by vectors where 8 divides C
                    (channels-last), one a thread where 8 divides S (contiguous), else element by element

relu gives 0 below 0 whatever the factor, and passes a NaN; the bit of a NaN is 0.
"""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import OPTIONS

ACTIVATIONS = {"none": 0, "relu": 1, "leaky_relu": 2, "silu": 3, "elu": 4}
EIGHTS = 128  # of a program, one a thread: four warps

_SIZES = ["count", "elements", "channels", "spatial"]


@triton.jit
def sum_of(values, AXIS: tl.constexpr):
    """tl.sum; spelt so that the interpreter, which cannot call the library's own jitted functions, knows it."""
    return tl.reduce(values, AXIS, tl.standard._sum_combine)


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def activate(v, slope, ACTIVATION: tl.constexpr):
    """a(v) of float32."""
    if ACTIVATION == 1:
        v = tl.where(v <= 0.0, 0.0, v)
    elif ACTIVATION == 2:
        v = tl.where(v > 0.0, v, v * slope)
    elif ACTIVATION == 3:
        v = v * sigmoid(v)
    elif ACTIVATION == 4:
        # exp(v) - 1 loses its digits next to 0: there the series, whose rest is below 2e-8 of v.
        series = tl.fma(v, 1.0 / 7.0, 1.0)
        series = tl.fma(v * (1.0 / 6.0), series, 1.0)
        series = tl.fma(v * (1.0 / 5.0), series, 1.0)
        series = tl.fma(v * (1.0 / 4.0), series, 1.0)
        series = tl.fma(v * (1.0 / 3.0), series, 1.0)
        series = tl.fma(v * (1.0 / 2.0), series, 1.0)
        v = tl.where(v > 0.0, v, tl.where(v > -0.35, v * series, tl.exp(v) - 1.0))
    return v


@triton.jit
def times_slope(g, v, slope, ACTIVATION: tl.constexpr):
    """g a'(v) of float32, v as it was before the activation."""
    if ACTIVATION == 1:
        g = tl.where(v > 0.0, g, 0.0)
    elif ACTIVATION == 2:
        g = tl.where(v > 0.0, g, g * slope)
    elif ACTIVATION == 3:
        s = sigmoid(v)
        g = g * (s * tl.fma(v, 1.0 - s, 1.0))
    elif ACTIVATION == 4:
        g = tl.where(v > 0.0, g, g * tl.exp(v))
    return g


@triton.jit
def tile(count, WHOLE: tl.constexpr, EIGHTS: tl.constexpr):
    """(first element, offsets (EIGHTS, 8) from it, which exist) of this program."""
    row = tl.expand_dims(tl.arange(0, EIGHTS), 1)
    first = tl.program_id(0).to(tl.int64) * (EIGHTS * 8)
    lane = row * 8 + tl.expand_dims(tl.arange(0, 8), 0)
    if WHOLE:
        # By rows: the compiler must see that eights are whole.
        inside = tl.broadcast_to(row < (count // 8 - tl.program_id(0).to(tl.int64) * EIGHTS), (EIGHTS, 8))
    else:
        inside = lane < count - first
    return first, lane, inside


@triton.jit
def place(first, elements, WIDE: tl.constexpr):
    """The program's first element within its sample; 32-bit division unless the tensor needs more."""
    if WIDE:
        return (first % elements).to(tl.int32)
    else:
        return first.to(tl.int32) % elements.to(tl.int32)


@triton.jit
def biased(v, bias, start, channels, spatial, BIAS_FROM: tl.constexpr, EIGHTS: tl.constexpr):
    """v + b. BIAS_FROM: 0 none; channels-last 1, 8 divides C 2; contiguous 3, 8 divides S 4."""
    row = tl.expand_dims(tl.arange(0, EIGHTS), 1)
    column = tl.expand_dims(tl.arange(0, 8), 0)
    if BIAS_FROM == 2 or BIAS_FROM == 4:
        eight = start // 8 + row
        if BIAS_FROM == 2:
            v += tl.load(bias + (eight % (channels // 8)) * 8 + column)
        else:
            v += tl.load(bias + (eight // (spatial // 8)) % channels)
    elif BIAS_FROM != 0:
        element = start + row * 8 + column
        if BIAS_FROM == 1:
            v += tl.load(bias + element % channels)
        else:
            v += tl.load(bias + (element // spatial) % channels)
    return v


@triton.jit(do_not_specialize=_SIZES)
def bias_act_kernel(
    z,
    bias,
    head,
    out,
    mask,
    count,
    elements,  # of a sample
    channels,
    spatial,
    slope,
    ACTIVATION: tl.constexpr,
    BIAS_FROM: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_BY_EIGHTS: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    first, lane, inside = tile(count, WHOLE, EIGHTS)
    v = tl.load(z + first + lane, mask=inside, other=0.0).to(tl.float32)
    v = biased(v, bias, place(first, elements, WIDE), channels, spatial, BIAS_FROM, EIGHTS)
    if MASKED:
        bits = ((v > 0.0) & inside).to(tl.int32) << tl.expand_dims(tl.arange(0, 8), 0)
        byte = tl.arange(0, EIGHTS)
        tl.store(mask + first // 8 + byte, sum_of(bits, 1).to(tl.uint8), mask=byte < (count - first + 7) // 8)
    if HEAD:
        if HEAD_BY_EIGHTS:
            row = tl.expand_dims(tl.arange(0, EIGHTS), 1)
            eight = (place(first, elements, WIDE) // 8 + row) % (elements // 8)
            at = eight * 8 + tl.expand_dims(tl.arange(0, 8), 0)
        else:
            at = (place(first, elements, WIDE) + lane) % elements
        y = times_slope(tl.load(head + at), v, slope, ACTIVATION)
    else:
        y = activate(v, slope, ACTIVATION)
    tl.store(out + first + lane, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def bias_act_backward_kernel(
    grad,
    kept,
    bias,
    out,
    count,
    elements,
    channels,
    spatial,
    slope,
    ACTIVATION: tl.constexpr,
    BIAS_FROM: tl.constexpr,
    MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDE: tl.constexpr,
    EIGHTS: tl.constexpr,
):
    first, lane, inside = tile(count, WHOLE, EIGHTS)
    g = tl.load(grad + first + lane, mask=inside, other=0.0).to(tl.float32)
    if MASKED:
        byte = tl.arange(0, EIGHTS)
        bits = tl.load(kept + first // 8 + byte, mask=byte < (count - first + 7) // 8, other=0).to(tl.int32)
        # 1 where the bit is set, else 0: only the sign is used.
        v = ((tl.expand_dims(bits, 1) >> tl.expand_dims(tl.arange(0, 8), 0)) & 1).to(tl.float32)
    else:
        v = tl.load(kept + first + lane, mask=inside, other=0.0).to(tl.float32)
        v = biased(v, bias, place(first, elements, WIDE), channels, spatial, BIAS_FROM, EIGHTS)
    tl.store(out + first + lane, times_slope(g, v, slope, ACTIVATION).to(out.dtype.element_ty), mask=inside)


def activation_code(activation: str, slope: float) -> int:
    """A leaky slope of 0 is relu: 0 also where the factor is infinite."""
    return ACTIVATIONS["relu" if activation == "leaky_relu" and slope == 0 else activation]


def _sizes(z: Tensor, biased: bool) -> tuple[dict[str, int], int]:
    """(the size arguments, BIAS_FROM) of a dense tensor."""
    samples, channels = z.shape[0], z.shape[1]
    elements = z.numel() // samples
    spatial = elements // channels
    if elements >= 2**30:
        raise ValueError(f"bias_act: a sample must have fewer than 2**30 elements, got {elements}")
    if not biased:
        source = 0
    elif z.is_contiguous() and spatial > 1:
        source = 4 if spatial % 8 == 0 else 3
    else:
        source = 2 if channels % 8 == 0 else 1
    return {"count": z.numel(), "elements": elements, "channels": channels, "spatial": spatial}, source


def bias_act(
    z: Tensor,  # (N, C, *spatial), contiguous or channels-last
    bias: Tensor | None,  # (C,) float32
    head: Tensor | None,  # (C * S,) float32, in the order of a sample's memory
    out: Tensor,  # as z; may be z
    mask: Tensor | None,  # (ceil(z.numel() / 8),) uint8
    *,
    activation: str,
    slope: float = 0.0,
) -> None:
    """out <- a(z + bias) and the mask's bits; or, with a head, out <- head a'(z + bias)."""
    if z.numel() == 0:
        return
    sizes, source = _sizes(z, bias is not None)
    with torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext():
        bias_act_kernel[triton.cdiv(z.numel(), EIGHTS * 8),](
            z,
            z if bias is None else bias,
            z if head is None else head,
            out,
            z if mask is None else mask,
            **sizes,
            slope=float(slope),
            ACTIVATION=activation_code(activation, slope),
            BIAS_FROM=source,
            HEAD=head is not None,
            HEAD_BY_EIGHTS=sizes["elements"] % 8 == 0,
            MASKED=mask is not None,
            WHOLE=z.numel() % 8 == 0,
            WIDE=z.numel() >= 2**30,
            EIGHTS=EIGHTS,
            num_warps=4,
            **OPTIONS,
        )


def bias_act_backward(
    grad: Tensor,  # (N, C, *spatial), in the layout of the forward's z
    kept: Tensor | None,  # the mask; z for silu and elu; None for none
    bias: Tensor | None,  # read for silu and elu alone
    out: Tensor,  # as grad; may be grad
    *,
    activation: str,
    slope: float = 0.0,
) -> None:
    """out <- grad a'(z + bias)."""
    if grad.numel() == 0:
        return
    sizes, source = _sizes(grad, bias is not None)
    with torch.cuda.device(grad.device) if grad.is_cuda else contextlib.nullcontext():
        bias_act_backward_kernel[triton.cdiv(grad.numel(), EIGHTS * 8),](
            grad,
            grad if kept is None else kept,
            grad if bias is None else bias,
            out,
            **sizes,
            slope=float(slope),
            ACTIVATION=activation_code(activation, slope),
            BIAS_FROM=source,
            MASKED=activation in ("relu", "leaky_relu"),
            WHOLE=grad.numel() % 8 == 0,
            WIDE=grad.numel() >= 2**30,
            EIGHTS=EIGHTS,
            num_warps=4,
            **OPTIONS,
        )
