"""batch_norm_act: normalisation by the batch's own statistics and an activation, with the exact gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import choose, past_dispatcher, register
from .bias_act import activate, by_channel, check_activation, check_channels, check_head, check_map, slope_at

OP = "batch_norm_act"
register("batch_norm_act", triton=True)


def batch_norm_act(
    z: Tensor,  # (N, C, *spatial) float32 | float16 | bfloat16, contiguous or channels-last
    weight: Tensor,  # (C,) float32
    bias: Tensor,  # (C,) float32
    *,
    activation: str,
    slope: float = 0.0,
    eps: float = 1e-5,
    out: Tensor | None = None,
    statistics: Tensor | None = None,
    apply: bool = True,
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor]:
    """Over the N·S values z of each channel:

        m = mean z;   r = 1/√(mean (z − m)² + eps);   y = a( weight · (z − m) · r + bias )

    Statistics are float32 and the same from run to run (partial sums are combined in a fixed order), arithmetic is
    float32; y is rounded once. A bias of the convolution before cancels: leave it out there.

    Args:
        activation, slope: as in `bias_act`.
        out: where y goes, of z's shape and layout, any of the dtypes; not z, which backward reads. None: like z.
        statistics: where (m, r) go, (2, C) float32. None: a new tensor.
        apply: False stops after the statistics: the last layer's, whose backward pass takes a head.
        workspace: `workspace(C, device)` that one chain's calls share, zeros between calls; None: a new one.

    Returns:
        (y, statistics); y is None without `apply`. No mask: the backward pass reads z and so has the sign.

    Raises: TypeError, ValueError, BackendError.
    Source: Ioffe and Szegedy (ICML 2015), with batch statistics always, as the published multi-grid nets have it.
    """
    check_activation(activation, slope, OP)
    _check_inputs(z, weight, bias, OP)
    if z.shape[0] == 0 or z.numel() == 0:
        raise ValueError(f"{OP}: z must hold at least one value a channel, got shape {tuple(z.shape)}")
    if not eps > 0:
        raise ValueError(f"{OP}: eps must be > 0, got {eps}")
    if not apply:
        if out is not None:
            raise ValueError(f"{OP}: out must be None without apply")
    elif out is None:
        out = torch.empty_like(z)
    else:
        check_map(out, "out", OP, like=z)
        if out.data_ptr() == z.data_ptr():
            raise ValueError(f"{OP}: out must not be z, which the backward pass reads")
    if statistics is None:
        statistics = torch.empty(2, z.shape[1], dtype=torch.float32, device=z.device)
    else:
        _check_statistics(statistics, z, OP)
    backend = choose(OP, backend, z.device)
    workspace = _check_workspace(workspace, z, OP, backend)
    arguments = (z, weight, bias, out, statistics, workspace, activation, float(slope), float(eps), backend)
    if past_dispatcher(z):
        launch(*arguments)
    else:
        torch.ops.mgebm_fast.batch_norm_act(*arguments)
    return out, statistics


def batch_norm_act_backward(
    grad: Tensor | None,  # (N, C, *spatial) float32 | float16 | bfloat16, in the layout of z
    z: Tensor,
    statistics: Tensor,  # (2, C) from batch_norm_act
    weight: Tensor,
    bias: Tensor,
    *,
    activation: str,
    slope: float = 0.0,
    head: Tensor | None = None,  # (C, *spatial) float32
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """dE/dz, through the statistics too; with M = N·S values a channel and n = (z − m)·r:

        d = grad · a′(weight · n + bias);   dz = weight · r · ( d − mean d − n · mean(d · n) )

    Args:
        grad: dE/dy; None with a head.
        head: dE/dy of the last map, the same for every sample.
        out: where dz goes, of z's shape and layout; grad itself may be given. None: like grad (with a head like z).
        workspace: as in `batch_norm_act`.

    Raises: TypeError, ValueError, BackendError.
    """
    where = f"{OP}_backward"
    check_activation(activation, slope, where)
    _check_inputs(z, weight, bias, where)
    _check_statistics(statistics, z, where)
    if (grad is None) == (head is None):
        raise ValueError(f"{where}: give grad or head, got {'neither' if grad is None else 'both'}")
    if grad is not None:
        check_map(grad, "grad", where, like=z)
    flat_head = None if head is None else check_head(head, z, where)
    if out is None:
        out = torch.empty_like(z if grad is None else grad)
    else:
        check_map(out, "out", where, like=z)
        if out.data_ptr() == z.data_ptr() and z.numel():
            raise ValueError(f"{where}: out must not be z, which both passes read")
    backend = choose(OP, backend, z.device)
    workspace = _check_workspace(workspace, z, where, backend)
    arguments = (
        grad, z, statistics, weight, bias, flat_head, out, workspace, activation, float(slope), backend
    )  # fmt: skip
    if past_dispatcher(z, out):
        launch_backward(*arguments)
    else:
        torch.ops.mgebm_fast.batch_norm_act_backward(*arguments)
    return out


def workspace(channels: int, device: torch.device | str) -> Tensor:
    """Zeroed counters for the kernels' last program a channel block; every call leaves zeros behind.

    One for a chain saves a memset a call. Calls that may overlap in time (two streams) must not share one.
    """
    return torch.zeros(channels, dtype=torch.int32, device=device)


def _check_inputs(z: Tensor, weight: Tensor, bias: Tensor, where: str) -> None:
    check_map(z, "z", where)
    for tensor, name in ((weight, "weight"), (bias, "bias")):
        if tensor is None:
            raise TypeError(f"{where}: {name} must be a float32 tensor, got None")
        check_channels(tensor, name, z, where)


def _check_statistics(statistics: Tensor, z: Tensor, where: str) -> None:
    wanted = (2, z.shape[1])
    if not isinstance(statistics, Tensor) or statistics.dtype != torch.float32 or tuple(statistics.shape) != wanted:
        got = f"{statistics.dtype} {tuple(statistics.shape)}" if isinstance(statistics, Tensor) else repr(statistics)
        raise ValueError(f"{where}: statistics must be {wanted} float32, got {got}")
    if statistics.device != z.device or not statistics.is_contiguous():
        raise ValueError(f"{where}: statistics must be contiguous on {z.device}, got one on {statistics.device}")


def _check_workspace(given: Tensor | None, z: Tensor, where: str, backend: str) -> Tensor | None:
    if backend != "triton":
        return None
    if given is None:
        return workspace(z.shape[1], z.device)
    if given.dtype != torch.int32 or given.numel() < z.shape[1] or given.device != z.device:
        got = f"{given.dtype} {tuple(given.shape)} on {given.device}"
        raise ValueError(f"{where}: workspace must be int32, ({z.shape[1]},) or larger, on {z.device}, got {got}")
    return given


@torch.library.custom_op(
    "mgebm_fast::batch_norm_act",
    mutates_args=("out", "statistics", "workspace"),
    schema="(Tensor z, Tensor weight, Tensor bias, Tensor(a0!)? out, Tensor(a1!) statistics, "
    "Tensor(a2!)? workspace, str activation, float slope, float eps, str backend) -> ()",
)
def _batch_norm_act(z, weight, bias, out, statistics, workspace, activation, slope, eps, backend):
    launch(z, weight, bias, out, statistics, workspace, activation, slope, eps, backend)


@_batch_norm_act.register_fake
def _(z, weight, bias, out, statistics, workspace, activation, slope, eps, backend):
    return None


@torch.library.custom_op(
    "mgebm_fast::batch_norm_act_backward",
    mutates_args=("out", "workspace"),
    schema="(Tensor? grad, Tensor z, Tensor statistics, Tensor weight, Tensor bias, Tensor? head, "
    "Tensor(a0!) out, Tensor(a1!)? workspace, str activation, float slope, str backend) -> ()",
)
def _batch_norm_act_backward(
    grad, z, statistics, weight, bias, head, out, workspace, activation, slope, backend
):  # fmt: skip
    launch_backward(grad, z, statistics, weight, bias, head, out, workspace, activation, slope, backend)


@_batch_norm_act_backward.register_fake
def _(grad, z, statistics, weight, bias, head, out, workspace, activation, slope, backend):
    return None


def launch(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    statistics: Tensor,
    workspace: Tensor | None,
    activation: str,
    slope: float,
    eps: float,
    backend: str,
) -> None:
    """The forward on checked arguments, past the dispatcher."""
    if backend == "triton":
        from ..kernels.batch_norm_act import batch_norm_act as kernel

        kernel(z, weight, bias, out, statistics, workspace, activation=activation, slope=slope, eps=eps)
    else:
        batch_norm_act_reference(z, weight, bias, out, statistics, activation, slope, eps)


def launch_backward(
    grad: Tensor | None,
    z: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    head: Tensor | None,  # flat, in the order of a sample's memory
    out: Tensor,
    workspace: Tensor | None,
    activation: str,
    slope: float,
    backend: str,
) -> None:
    """The backward on checked arguments, past the dispatcher."""
    if z.numel() == 0:
        return
    if backend == "triton":
        from ..kernels.batch_norm_act import batch_norm_act_backward as kernel

        kernel(grad, z, statistics, weight, bias, head, out, workspace, activation=activation, slope=slope)
    else:
        batch_norm_act_backward_reference(grad, z, statistics, weight, bias, head, out, activation, slope)


def _over(z: Tensor) -> list[int]:
    return [0, *range(2, z.dim())]


def batch_norm_act_reference(
    z: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor | None,
    statistics: Tensor,
    activation: str,
    slope: float,
    eps: float,
) -> None:
    """The formula in plain torch: float64 throughout, rounded once at the end."""
    v = z.double()
    variance, mean = torch.var_mean(v, dim=_over(z), correction=0)
    scale = torch.rsqrt(variance + eps)
    statistics.copy_(torch.stack((mean, scale)))
    if out is not None:
        normal = (v - by_channel(mean, z)) * by_channel(scale, z)
        out.copy_(activate(normal * by_channel(weight, z) + by_channel(bias, z), activation, slope))


def batch_norm_act_backward_reference(
    grad: Tensor | None,
    z: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor,
    head: Tensor | None,
    out: Tensor,
    activation: str,
    slope: float,
) -> None:
    """The formula in plain torch: float64 from the float32 statistics on, rounded once at the end."""
    mean, scale = statistics
    normal = (z.double() - by_channel(mean, z)) * by_channel(scale, z)
    if grad is not None:
        upstream = grad.double()
    else:
        assert head is not None
        sample = tuple(z.shape[1:])
        if z.is_contiguous():
            upstream = head.double().reshape(sample)
        else:
            upstream = head.double().reshape(*sample[1:], sample[0]).movedim(-1, 0)
    d = upstream * slope_at(normal * by_channel(weight, z) + by_channel(bias, z), activation, slope)
    over = _over(z)
    centred = d - d.mean(over, keepdim=True) - normal * (d * normal).mean(over, keepdim=True)
    out.copy_(centred * by_channel(scale, z) * by_channel(weight, z))
