"""The choice of a gradient plan: conv for stacks of convolutions, autograd for any module or callable."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..errors import BackendError, suggest
from ..ops.state import why_not_plain
from . import autograd, conv, cuda, graph, resident
from . import native as engine
from .base import GradientPlan
from .holding import frozen_parameters
from .kept import read
from .stack import Stack
from .verify import why_not_trusted

Energy = Callable[[Tensor], Tensor]  # (N, ...) float32 -> (N,), energies
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def plan(
    energy: Energy,
    x: Tensor,
    precision: str = "auto",
    where: str = "gradient",
    *,
    steps: int = 1,
    compile: bool | str = False,
) -> GradientPlan:
    """The plan for `energy` on tensors like x. `where` names the caller in error messages; `steps`: how many steps are
    made with it in one go, since reading any energy as a graph pays from some on; `compile`: whether what only autograd
    can take goes through torch.compile, or by which of its backends.

    precision: "fp32" is float32 throughout; "bf16" and "fp16" are 16-bit operands of the convolutions, which need an
    energy that an engine reads (a stack of convolutions; bf16 on CPUs also any graph): BackendError, with the reason,
    where none can. "auto" is fp16 on CUDA (bf16 for more than eight layers) and bf16 on CPUs that multiply it faster,
    where the energy can be read, else fp32; a graph's large dense layers are then, by AMX, sums of three products of
    bfloat16, off by 1e-5. The autograd plan is always fp32. float16 underflows, silently, where a deep net shrinks
    gradients.
    """
    if not callable(energy):
        raise TypeError(f"{where}: energy must be a module or a callable x -> (N,), got {type(energy).__name__}")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{where}: x must be a floating-point tensor, got {got}; x.float() converts it")
    if precision not in PRECISIONS:
        near = suggest(str(precision), PRECISIONS)
        raise ValueError(f"{where}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}{near}")
    compiler = compiler_of(compile, where)
    plain = why_not_plain(x)
    on_gpu = x.device.type == "cuda"
    stack: Stack | str = f"x is {plain}" if plain else read(energy, x, blocks=on_gpu)
    if isinstance(stack, Stack) and stack.has_shortcuts:
        if reason := resident.why_not(stack, x, _precision(precision, stack, x)):
            stack = f"residual blocks are for the resident chain, which cannot run: {reason}"
    if isinstance(stack, Stack) and isinstance(energy, nn.Module) and (reason := why_not_trusted(energy, stack, x)):
        warnings.warn(
            f"{where}: {type(energy).__name__} looks like a stack of convolutions, but {reason}; it runs by autograd",
            stacklevel=3,
        )
        stack = f"its reading is not trusted: {reason}"
    if isinstance(stack, str):
        narrow = precision in ("bf16", "fp16")
        made = f"x is {plain}" if plain else _graph_plan(energy, x, where, precision, steps)
        if not isinstance(made, str):
            return made
        if compiler:
            return autograd.CompiledPlan(energy, x, where, precision if narrow else "fp32", compiler, (stack, made))
        if narrow:
            raise BackendError(
                f"{where}: no engine computes this energy in precision {precision!r} here: {stack}; {made}. "
                "compile=True computes any energy in it"
            )
        return autograd.AutogradPlan(energy, where, (stack, made), x.device.type)
    precision = _precision(precision, stack, x)
    if on_gpu:
        not_resident = resident.why_not(stack, x, precision)
        if not not_resident:
            return resident.ResidentPlan(stack, energy, x)
        reason = cuda.why_not(stack, x, precision)
        if not reason:
            return cuda.FusedPlan(stack, energy, precision, not_resident=not_resident)
        return conv.ConvPlan(stack, energy, precision, f"the fused plan cannot run: {reason}")
    reason = engine.why_not(stack, x, precision)
    if reason:
        return conv.ConvPlan(stack, energy, precision, f"the native engine cannot run: {reason}")
    faster, reason = graph.fastest(stack, x.shape[0], precision, steps)
    if faster == "graph":
        # Weights of a dense layer take as long to pack as to use: a reading that is kept has them.
        made = _graph_plan(energy, x, where, precision, steps) if graph.has_large_dense(stack) else ""
        if isinstance(made, graph.GraphPlan):
            return made
        return graph.plan_of_stack(stack, energy, where, precision, reason)
    if faster == "conv":
        return conv.ConvPlan(stack, energy, precision, reason)
    return engine.NativePlan(stack, energy, precision, where)


def _precision(precision: str, stack: Stack, x: Tensor) -> str:
    layers = sum(stage.shortcut is None for stage in stack.stages)
    return conv.auto_precision(x.device.type, layers) if precision == "auto" else precision


def compiler_of(compile: bool | str, where: str) -> str:
    """The backend of torch.compile that an argument `compile` means; an empty string for none."""
    if isinstance(compile, bool):
        return autograd.INDUCTOR if compile and not torch.compiler.is_compiling() else ""
    known = (autograd.INDUCTOR, *torch.compiler.list_backends(exclude_tags=()))
    if compile not in known:
        near = suggest(str(compile), known)
        raise ValueError(f"{where}: compile must be True, False or a backend of torch.compile, got {compile!r}{near}")
    return compile


def _graph_plan(energy: Energy, x: Tensor, where: str, precision: str, steps: int) -> GradientPlan | str:
    """An energy by its own code's graph, or why not."""
    if x.device.type != "cpu":
        return "other energies are read as graphs for CPU tensors alone"
    if steps < graph.MIN_STEPS and precision != "bf16":
        return f"it is read as a graph from {graph.MIN_STEPS} steps a call on, got {steps}"
    made = graph.plan_of(energy, x, where, precision, steps)
    return f"as a graph: {made}" if isinstance(made, str) else made


def energy_gradient(energy: Energy, x: Tensor, *, precision: str = "auto") -> Tensor:
    """∇E(x) of each sample: (N, ...) -> (N, ...), computed with frozen parameters.

    Raises TypeError or ValueError where the energy is not a differentiable map (N, ...) -> (N,).
    """
    with frozen_parameters(energy):
        return plan(energy, x, precision, "energy_gradient").gradient(x)
