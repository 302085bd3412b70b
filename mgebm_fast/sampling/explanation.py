"""What a chain would run, as a value with fields; printed, one line a field."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..gradient import GradientPlan, PlanReport, frozen_parameters
from .coupling import coupling, randomness


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` of a chain returns; `print` shows it in lines."""

    chain: str  # its steps, drift, noise, reference and bounds, in words
    gradient: PlanReport  # plan, precision, and why no faster plan runs
    device: str
    update: str  # the backend of the step, and why this one; empty for exact chains, whose steps are torch's
    graph: str  # whether a CUDA graph holds the chain, and why not
    coupling: str  # why the samples of a batch are coupled; empty where they are independent
    randomness: str  # why the energy has another value at every call, as by dropout; empty where it has not

    @property
    def plan(self) -> str:
        """native, graph, resident, fused, dense, conv, compiled or autograd."""
        return self.gradient.plan

    @property
    def precision(self) -> str:
        """What ∇E is computed in; the state and the update are float32 always."""
        return self.gradient.precision

    @property
    def why_not_faster(self) -> tuple[str, ...]:
        """Why faster plans do not run."""
        return self.gradient.why_not_faster

    def __str__(self) -> str:
        lines = [f"chain: {self.chain}", f"gradient: {self.gradient}", f"device: {self.device}"]
        lines += [f"update: {self.update}"] if self.update else []
        lines += [f"graph: {self.graph}"] if self.graph else []
        lines.append(f"samples: coupled, {self.coupling}" if self.coupling else "samples: independent")
        lines += [f"energy: random, {self.randomness}"] if self.randomness else []
        return "\n".join(lines)


def explained(energy: Any, x: Tensor, plan: GradientPlan, chain: str, update: str = "", graph: str = "") -> Explanation:
    """The explanation of a prepared chain on (energy, x). One gradient is computed, so that what a run refuses of the
    energy is refused here too: of four samples, or of all where the energy takes no fewer, as one with labels."""
    report = plan.explain()
    if update and not update.startswith(plan.backends or ("-",)):  # the plan then gives the gradient alone
        report = dataclasses.replace(report, steps="")
    if len(x):
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.inference_mode(False), frozen_parameters(energy), torch.random.fork_rng(devices):
            finite = torch.nan_to_num(x.detach(), 0.0, 0.0, 0.0)
            try:
                plan.gradient(finite[:4])
            except Exception:
                plan.gradient(finite)
    return Explanation(chain, report, str(x.device), update, graph, coupling(energy, x), randomness(energy, x))
