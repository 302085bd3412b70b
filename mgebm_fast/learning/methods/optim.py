"""Optimisers, learning-rate schedules and what is done to gradients before an update."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as heard_by_all

from ...errors import CheckpointError
from ...nets import ScoreNet
from ..config.keys import pick
from ..config.sections import OptimiserConfig


def build_optimiser(parameters: Iterable[nn.Parameter], config: OptimiserConfig, net: int = 0) -> torch.optim.Optimizer:
    """The optimiser of one net; `net` counts the nets from 0 and picks from per-grid values.

    One fused call updates all tensors of a net where every one is float32 on a CPU or a CUDA device: small nets are
    bound by calls, not by arithmetic. On a CUDA device a graph may capture it.
    """
    parameters = list(parameters)
    fused = all(p.dtype == torch.float32 and p.device.type in ("cpu", "cuda") for p in parameters)
    options: dict[str, Any] = {"lr": pick(config.lr, net), "weight_decay": config.weight_decay, "fused": fused}
    if config.name == "sgd":
        sgd = torch.optim.SGD(parameters, momentum=config.momentum, **options)
        _begin_momentum(sgd)
        return sgd
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    groups: list[Any] = parameters
    if config.name == "muon":
        others, hidden = ([p for p in parameters if _is_hidden(p) == own] for own in (False, True))
        groups = [
            {"params": others},
            {"params": hidden, "momentum": config.muon_momentum, "rms": pick(config.muon_rms, net)},
        ]
    made = kind(groups, betas=config.betas, capturable=fused and parameters[0].device.type == "cuda", **options)
    if config.name == "muon":
        _begin_momentum(made)
        made.register_step_pre_hook(_step_hidden)
    vars(made)["_warned_capturable_if_run_uncaptured"] = True  # a fused step is no slower outside a graph
    return made


def _begin_momentum(optimiser: torch.optim.Optimizer) -> None:
    """Start momentum at 0, so that the first update makes it the gradient. torch creates it only in the first update,
    and not at all if that one is spoilt."""
    for group in optimiser.param_groups:
        for parameter in group["params"] if group.get("momentum") or "rms" in group else ():
            state = optimiser.state[parameter]
            state.setdefault("momentum_buffer", torch.zeros_like(parameter))
            if "rms" in group:  # Adam looks for it in every state
                state.setdefault("step", torch.zeros((), device=parameter.device))


def _is_hidden(parameter: Tensor) -> bool:
    """Whether it is the matrix of a hidden layer, not of one that takes an image's few channels or gives an energy."""
    return parameter.dim() >= 2 and min(parameter.shape[:2]) >= 16


@torch.no_grad()
def _step_hidden(optimiser: torch.optim.Optimizer, *_: Any) -> None:
    """Muon: the step of the hidden layers, before Adam's of all else, by momentum B of gradients G, as matrices with a
    row for each entry of their first dimension:

        B ← μB + G
        W ← (1 − lr·decay)·W − lr·rms·√max(rows, columns)·orthogonal(μB + G)

    so that an update has a root mean square of about lr·rms, less where G has a low rank. Where `found_inf` is 1, none.

    Source: Jordan et al., Muon (2024); the scale is that of Liu et al. (arXiv 2502.16982).
    """
    spoilt = vars(optimiser).get("found_inf")
    for group in optimiser.param_groups:
        for weight in group["params"] if "rms" in group else ():
            if weight.grad is None:
                continue
            gradient, weight.grad = weight.grad, None  # Adam is to leave it alone
            factor, old = group["momentum"], optimiser.state[weight]["momentum_buffer"]
            momentum = factor * old + gradient
            matrix = (factor * momentum + gradient).flatten(1)
            scale = group["rms"] * math.sqrt(max(matrix.shape))
            moved = weight * (1 - group["lr"] * group["weight_decay"])
            moved -= group["lr"] * scale * orthogonal(matrix).reshape(weight.shape)
            for tensor, now in ((old, momentum), (weight, moved)):
                tensor.copy_(now if spoilt is None else torch.where(spoilt == 1, tensor, now))


def orthogonal(matrix: Tensor) -> Tensor:  # (rows, columns) -> the same
    """About U·Vᵀ of the singular value decomposition U·S·Vᵀ: five steps X ← PX, P = a + bXXᵀ + c(XXᵀ)², from X = M/‖M‖,
    after which singular values that were above a thousandth of ‖M‖ are between 0.6 and 1.3.

    The steps are taken on XXᵀ, which becomes P·XXᵀ·P, and the product of all P is applied to M/‖M‖ once: with many more
    columns than rows less than half of the work.

    Source: Jordan et al., Muon (2024), with their a, b and c.
    """
    x = matrix / (matrix.norm() + 1e-12)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    square, product = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(5):
        factor = 2.0315 * square @ square - 4.7750 * square
        factor.diagonal().add_(3.4445)
        product, square = factor @ product, factor @ square @ factor
    x = product @ x
    return x.T if tall else x


def rate_factor(config: OptimiserConfig, iteration: int, steps: int, epoch: int = 0) -> float:
    """The factor of lr at update `iteration` (from 0).

    warmup:  (iteration + 1) / warmup, until it is 1
    step:    decay_factor ^ floor(epoch / decay_every)
    cosine:  final + (1 − final)(1 + cos πu)/2        u = share of the time after `hold` that has passed
    linear:  final + (1 − final)(1 − u)
    """
    warm = min(1.0, (iteration + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "constant":
        return warm
    if config.schedule == "step":
        return warm * config.decay_factor ** (epoch // config.decay_every)
    held = config.hold * steps
    u = min(1.0, max(0.0, iteration - held) / max(1.0, steps - held))
    fall = (1 + math.cos(math.pi * u)) / 2 if config.schedule == "cosine" else 1 - u
    return warm * (config.final_lr + (1 - config.final_lr) * fall)


def step(
    optimiser: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    gradients: Sequence[Tensor | None],
    rate: float | Tensor,  # a tensor: (), float32 on a CUDA device, which a captured step reads; float64 on a CPU
    spoilt: Tensor,  # () float32, on the parameters' device
) -> None:
    """One update by `gradients` at learning rate `rate`; where `spoilt` is 1, none, and no trace of it in the state.
    A parameter whose gradient is None is left alone, its state and its weight decay with it.

    A fused optimiser reads `spoilt` on the device, and the host waits for nothing; another one needs a host sync.
    """
    if not isinstance(rate, Tensor) and optimiser.defaults["fused"] and spoilt.device.type == "cuda":
        rate = torch.full((), rate, dtype=torch.float32, device=spoilt.device)  # rounded as a captured step has it
    for group in optimiser.param_groups:
        group["lr"] = rate
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else _laid_as(parameter, gradient)
    try:
        if _is_plain_adam(optimiser, spoilt) and _adam_(optimiser, parameters, spoilt):
            pass
        elif optimiser.defaults["fused"]:
            vars(optimiser)["found_inf"] = spoilt  # as torch's own gradient scaler does it
            optimiser.step()
        elif not bool(spoilt):
            optimiser.step()
    finally:  # a capture may fail
        vars(optimiser).pop("found_inf", None)
        optimiser.zero_grad(set_to_none=True)


def _laid_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, of the parameter's shape, in its order of memory: torch's fused kernels on CPUs go by that alone."""
    return tensor if tensor.stride() == parameter.stride() else torch.empty_like(parameter).copy_(tensor)


def _is_plain_adam(optimiser: torch.optim.Optimizer, spoilt: Tensor) -> bool:
    """Whether a step is one call of a fused kernel on a CPU, and nobody listens to it."""
    try:
        heard = (
            optimiser._optimizer_step_pre_hooks, optimiser._optimizer_step_post_hooks,
            heard_by_all._global_optimizer_pre_hooks, heard_by_all._global_optimizer_post_hooks,
        )  # fmt: skip
    except AttributeError:  # of a torch that keeps them elsewhere
        return False
    usual = type(optimiser) in (torch.optim.Adam, torch.optim.AdamW) and "step" not in vars(optimiser)
    if not usual or any(heard) or len(optimiser.param_groups) > 1 or spoilt.device.type != "cpu":
        return False
    group = optimiser.param_groups[0]
    return bool(group["fused"]) and not (group["maximize"] or group["amsgrad"] or group["differentiable"])


def _adam_(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], spoilt: Tensor) -> bool:
    """What `step()` of a plain Adam makes, by its kernel alone: what torch does around it takes three times as long for
    a small net. False, with nothing done, before its state is there or where torch has another kernel."""
    group = optimiser.param_groups[0]
    given: list[Tensor] = [parameter for parameter in parameters if parameter.grad is not None]
    gradients = [parameter.grad for parameter in given if parameter.grad is not None]
    states: list[dict[str, Tensor]] = [optimiser.state.get(parameter, {}) for parameter in given]
    decoupled = group.get("decoupled_weight_decay", type(optimiser) is torch.optim.AdamW)
    kernel = _kernel("_fused_adamw_" if decoupled else "_fused_adam_")
    if kernel is None or not given or not all(states):
        return False
    steps = [state["step"] for state in states]
    with torch.no_grad():
        torch._foreach_add_(steps, 1)
        kernel(
            given, gradients, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            steps, amsgrad=False, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, grad_scale=None, found_inf=spoilt,
        )  # fmt: skip
        torch._foreach_sub_(steps, [spoilt] * len(steps))
    return True


@functools.cache
def _kernel(name: str) -> Callable[..., None] | None:
    """A kernel of torch's by its private name; None where there is none that makes of one number what it must."""
    try:
        kernel: Callable[..., None] = getattr(torch, name)
        with torch.inference_mode(False), torch.no_grad():
            number, gradient, mean, square, at = torch.tensor([1.0, 2.0, 0.0, 0.0, 1.0], device="cpu").split(1)
            kernel(
                [number], [gradient], [mean], [square], [], [at[0]], amsgrad=False, lr=0.5, beta1=0.5, beta2=0.75,
                weight_decay=0.0, eps=0.0, maximize=False, grad_scale=None, found_inf=torch.zeros((), device="cpu"),
            )  # fmt: skip
            made = torch.cat([number, mean, square]).tolist()
    except (AttributeError, TypeError, RuntimeError):
        return None
    return kernel if made == [0.5, 1.0, 1.0] else None


def map_areas(net: nn.Module) -> dict[int, float]:
    """id(parameter) -> pixels of the feature map of the layer that owns it, for the convolutions of a `ScoreNet`."""
    areas: dict[int, float] = {}
    for layer, size in net.placed() if isinstance(net, ScoreNet) else ():
        area = float(math.prod(layer.map_size(length) for length in size))
        areas.update({id(parameter): area for parameter in layer.parameters()})
    return areas


@torch.no_grad()
def condition_(gradients: list[Tensor], config: OptimiserConfig, divisors: list[float] | None = None) -> None:
    """The configured changes of one net's gradients, in place and in this order: division by areas of feature maps,
    rescaling of each tensor to max |g| ≤ c, clipping of entries, clipping of the net's norm. No value is read back."""
    if divisors is not None:
        torch._foreach_div_(gradients, divisors)
    if config.grad_rescale_max is not None:
        peaks = torch._foreach_norm(gradients, math.inf)
        torch._foreach_mul_(gradients, [(config.grad_rescale_max / peak).clamp(max=1.0) for peak in peaks])
    if config.grad_clip_value is not None:
        torch._foreach_clamp_min_(gradients, -config.grad_clip_value)
        torch._foreach_clamp_max_(gradients, config.grad_clip_value)
    if config.grad_clip_norm is not None:
        torch._foreach_mul_(gradients, (config.grad_clip_norm / norm(gradients)).clamp(max=1.0))


def norm(tensors: list[Tensor]) -> Tensor:
    """‖·‖₂ of all entries of all tensors, a 0-dim tensor."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))


def state_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: "<index of the parameter>.<name>"."""
    state = optimiser.state_dict()["state"]
    return {
        f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items() if value is not None
    }


def load_state_tensors(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor], where: str) -> None:
    """Restore what `state_tensors` gave; CheckpointError where it does not fit the parameters."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        if not index.isdigit() or int(index) >= len(parameters):
            raise CheckpointError(f"{where}: tensor {key!r} is not of this optimiser")
        parameter = parameters[int(index)]
        shape = tuple(parameter.shape)
        if tuple(value.shape) not in ((), shape):
            raise CheckpointError(f"{where}: tensor {key!r} must have shape {shape}, got {tuple(value.shape)}")
        state.setdefault(int(index), {})[name] = (_laid_as(parameter, value) if value.dim() else value).clone()
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    _begin_momentum(optimiser)
