"""Checks before an energy is read: modules whose code was replaced, tensors whose values are not those in memory."""

from __future__ import annotations

from torch import nn

from ..nets import EnergyNet, Negative, ResidualNet
from ..nets.layers import BatchStatistics, ConvLayer, LinearHead, SpectralWeight
from ..nets.residual import Activation, ResidualBlock

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
# The code of the classes that are read, as imported: a method replaced on a class later makes another net.
_READ = (
    nn.Module, nn.Sequential, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Flatten, nn.BatchNorm1d, nn.BatchNorm2d,
    nn.BatchNorm3d, nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.ELU, nn.Identity, EnergyNet, Negative, ConvLayer, LinearHead,
    BatchStatistics, SpectralWeight, ResidualNet, ResidualBlock, Activation,
)  # fmt: skip
_METHODS = ("__call__", "_call_impl", "forward", "_conv_forward", "score", "effective_weight", "check_input")
_CODE = [(kind, name, getattr(kind, name)) for kind in _READ for name in _METHODS if hasattr(kind, name)]


def why_not_known() -> str:
    """Which method of a class that is read was replaced since it was imported; an empty string where none was."""
    for kind, name, code in _CODE:
        if getattr(kind, name) is not code:
            return f"{kind.__name__}.{name} was replaced"
    return ""


def why_not_read(energy: nn.Module) -> str:
    """Why the modules of an energy may run other code than their classes'; an empty string where they do not."""
    if any(getattr(nn.modules.module, name, None) for name in GLOBAL_HOOKS):
        return "hooks are registered for all modules"
    if reason := why_not_known():
        return reason
    for path, module in energy.named_modules():
        kind = type(module)
        where = f"layer {path} ({kind.__name__})" if path else "the net"
        if any(getattr(module, hook, None) for hook in HOOKS):
            return f"{where} has hooks"
        for name in vars(module):
            if callable(getattr(kind, name, None)):
                return f"{where} has a {name} of its own"
    return ""
