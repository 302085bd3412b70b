"""Are the samples of a batch coupled? The one answer, which memory, exact chains, diagnostics and reports ask for.

A batch is coupled where the energy of a sample depends on the samples beside it, as batch statistics make it. Then it
may not be split, and exact chains, which accept samples one by one, have another law than they promise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .. import noise
from ..gradient import frozen_parameters
from ..gradient.exact import exact_cudnn
from ..gradient.reach import modules_of
from ..gradient.stack import Stack, read
from ..nets.layers import BatchStatistics

# Relative difference above which an energy is taken to depend on the rest of its batch; rounding stays well below.
_COUPLED = 1e-4


def coupling(energy: Any, x: Tensor | None = None) -> str:  # x: (N, ...), of which 4 samples at most are used
    """Why the energies of a batch of samples like x depend on each other; an empty string where they do not.

    A module answers by what its layers are. Other code is asked for the energies of four samples, in pairs and
    together, at noisy x so that equal samples cannot hide it; without x, the modules that it reaches answer.
    """
    if reason := _of_layers(energy, _couples):
        return reason
    reason = next(filter(None, map(_couples, modules_of(energy))), "")
    if x is None or (reason and len(x) < 2) or isinstance(read(energy, x), Stack):
        return reason
    together, again, apart = _asked(energy, x)
    if together.numel() == 0 or not _agree(together, again):  # it refuses to be asked, or is random
        return reason
    return "" if _agree(together, apart) else reason or "the energy of a sample changes with the samples beside it"


def randomness(energy: Any, x: Tensor | None = None) -> str:
    """Why an energy has another value at every call, as by dropout in train mode; an empty string where it has not.

    A module answers by what its layers are, and other code is asked twice, as in `coupling`.
    """
    if reason := _of_layers(energy, _draws):
        return reason
    reason = next(filter(None, map(_draws, modules_of(energy))), "")
    if x is None or isinstance(read(energy, x), Stack):
        return reason
    together, again, _ = _asked(energy, x)
    if together.numel() == 0:
        return reason
    return "" if _agree(together, again) else reason or "the energy of one x changes from call to call"


def _of_layers(energy: Any, why: Callable[[nn.Module], str]) -> str:
    """What `why` says of the first of a module's layers that it says something of."""
    return next(filter(None, map(why, energy.modules() if isinstance(energy, nn.Module) else ())), "")


def _couples(module: nn.Module) -> str:
    if isinstance(module, BatchStatistics):
        return "norm='batch' normalises by the statistics of the batch"
    running = getattr(module, "running_mean", None) is not None or getattr(module, "running_var", None) is not None
    if isinstance(module, _BatchNorm) and (module.training or not running):
        return f"a {type(module).__name__} normalises by the statistics of the batch"
    return ""


def _draws(module: nn.Module) -> str:
    drops = isinstance(module, (_DropoutNd, nn.MultiheadAttention, nn.RNNBase))
    rate = getattr(module, "dropout", 0.0) or getattr(module, "p", 0.0)
    random = (isinstance(module, nn.RReLU) or (drops and rate)) and module.training
    return f"a {type(module).__name__} is random in train mode" if random else ""


def _asked(energy: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Energies near x of up to four samples: of all, of all again, and of their halves; empty where it refuses them."""
    probe = torch.nan_to_num(x[:4].detach(), 0.0, 0.0, 0.0)
    words, _ = noise.words(probe.shape[0], probe[0].numel() if len(probe) else 0, seed=0, step=0, device=x.device)
    devices = [x.device] if x.device.type == "cuda" else []
    # An energy that cannot run on so few samples, or has no memory for them, raises where it is really called.
    frozen, drawn, exact = frozen_parameters(energy), torch.random.fork_rng(devices), exact_cudnn(x.device)
    with contextlib.suppress(Exception), torch.no_grad(), frozen, drawn, exact:  # TF32 rounds by more than is allowed
        shake = noise.normal(words).flatten(1)[:, : probe[0].numel()].reshape(probe.shape).to(x.dtype)
        probe = probe + 0.1 * (1.0 + probe.abs().amax()) * shake
        together, again = (energy(probe).detach().double() for _ in range(2))
        apart = torch.cat([energy(part) for part in probe.split(-(-len(probe) // 2))]).double()
        if together.shape == apart.shape:  # others where a constant of two samples takes one of x by broadcasting
            return together, again, apart
    nothing = torch.empty(0, dtype=torch.float64)
    return nothing, nothing, nothing


def _agree(energies: Tensor, others: Tensor) -> bool:
    if energies.numel() == 0:
        return True
    apart, bound = (energies - others).abs(), _COUPLED * (energies.abs().amax() + 1e-6)
    return bool(((apart <= bound) | ~torch.isfinite(apart)).all())
