"""Who is measured: this package's chains, the baselines of `loops`, and the other packages of `peers`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..sampling import Langevin
from ..sampling.explanation import Explanation
from . import peers
from .loops import CompiledLoop, Loop, bf16_cast_loop, plain_loop, seed_loop
from .peers import BoundLoop

SEED = 1


@dataclasses.dataclass(frozen=True)
class Contender:
    """`loop(net, plain)` gives the chain of one net; `precision` is what the gradient is computed in."""

    name: str
    what: str
    precision: str
    loop: Callable[[Any, nn.Module], BoundLoop]
    plain: Callable[[], Loop] | None = None  # the loop to use inside PlainTrainer; None where there is none
    ours: str = ""  # the precision to ask this package for; empty: not this package
    package: str = ""  # the module that it needs, one of peers.PACKAGES
    slow: bool = False  # compiles or needs another package: measured on demand
    wall: bool = False  # runs outside torch's streams: timed by the host's clock


def _ours(precision: str) -> Contender:
    def loop(net: nn.Module, plain: nn.Module) -> BoundLoop:
        return lambda x, dynamics: dynamics(net, x, seed=SEED, precision=precision)

    what = "this package, as it chooses" if precision == "auto" else f"this package, {precision}"
    return Contender(f"mgebm_{precision}", what, precision, loop, ours=precision)


def _baseline(name: str, what: str, precision: str, make: Callable[[], Loop], slow: bool = False) -> Contender:
    def loop(net: nn.Module, plain: nn.Module) -> BoundLoop:
        return functools.partial(make(), plain)

    return Contender(name, what, precision, loop, plain=make, slow=slow)


def _peer(
    name: str, what: str, loop: Callable[[Any, nn.Module], BoundLoop], package: str, wall: bool = False
) -> Contender:
    return Contender(name, what, "fp32", loop, package=package, slow=True, wall=wall)


CONTENDERS = {
    contender.name: contender
    for contender in (
        _ours("auto"),
        _ours("fp32"),
        _baseline("plain_loop", "autograd.grad, frozen weights", "fp32", lambda: plain_loop),
        _baseline("seed_loop", "backward() with live weights, retain_graph", "fp32", lambda: seed_loop),
        _baseline("bf16_cast_loop", "plain_loop, net cast to bf16", "bf16", lambda: bf16_cast_loop),
        _baseline("compile_fp32", "torch.compile of the step", "fp32", lambda: CompiledLoop(torch.float32), slow=True),
        _baseline("compile_bf16", "the same, net in bf16", "bf16", lambda: CompiledLoop(torch.bfloat16), slow=True),
        _peer("torchebm", "TorchEBM's LangevinDynamics", peers.torchebm_loop, "torchebm"),
        _peer("ebmkit", "ebmkit's LangevinDynamics", peers.ebmkit_loop, "ebm"),
        _peer("posteriors", "posteriors' SGLD", peers.posteriors_loop, "posteriors"),
        _peer("jax_scan", "JAX, one jitted lax.scan", peers.jax_loop, "jax", wall=True),
    )
}
OURS, BASELINE = "mgebm_auto", "plain_loop"
QUICK = tuple(name for name, contender in CONTENDERS.items() if not contender.slow)
PEERS = ("mgebm_auto", "mgebm_fp32", "plain_loop", "torchebm", "ebmkit", "posteriors")  # of nets that all can take


def precision_of(contender: Contender, explained: Explanation | None, device: str) -> str:
    """What the gradient is computed in: of this package's chains, what `explain` says.

    On a GPU torch's float32 convolutions, and XLA's, are TF32 unless they are told otherwise.
    """
    precision = contender.precision if explained is None else explained.precision
    theirs = explained is None or explained.plan == "autograd"  # this package's own plans keep float32 float32
    if theirs and precision == "fp32" and device.startswith("cuda") and torch.backends.cudnn.allow_tf32:
        return "tf32"
    return precision


def described(contender: Contender, explained: Explanation | None) -> str:
    """What ran: of this package's chains what `explain` says, of another package's its version too."""
    package = f" ({peers.version(contender.package)})" if contender.package else ""
    return str(explained) if explained is not None else contender.what + package


def explain(contender: Contender, net: nn.Module, x: Tensor, dynamics: Langevin) -> Explanation | None:
    """What this package's chain runs; None for another contender."""
    return dynamics.explain(net, x, precision=contender.ours) if contender.ours else None
