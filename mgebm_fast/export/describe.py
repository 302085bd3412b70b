"""A trained model as plain values and tensors: what the modules of `plain` are built from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import Refused
from ..models import CoopNets, EnergyModel, GenerativeConvNet, SingleGrid, SpatialTemporal
from ..nets import ResidualNet, ScoreNet
from ..ops.varying import is_varying
from . import plain

_ACTIVATIONS = {"leaky_relu": "LeakyReLU", "relu": "ReLU", "silu": "SiLU", "elu": "ELU", "none": "Identity"}


def plain_model(model: Any) -> dict[str, Any]:
    """A model as plain values: its nets, and the chains of its samples in the decoupled form.

    Refused: a model without energies, or with one for each class, nets of one's own, an activation that torch.nn has no
    module of.
    """
    if not isinstance(model, EnergyModel):
        raise Refused("run", "hold a model with energies", f"a {model.kind}, which is a generator alone", "export")
    if model.classes:
        got = f"one class-conditional, of {', '.join(model.classes)}"
        raise Refused("run", "hold a model of one energy for all images", got, "export")
    chains = []
    for chain in model.sampling:
        steps, std = chain.by_step(), chain.reference_std
        chains.append({
            "steps": chain.steps, "drift": _number([n.drift for n in steps]),
            "noise_std": _number([n.noise_std for n in steps]),
            "reference_std": _number([n.inverse_variance**-0.5 for n in steps]) if is_varying(std) else std,
            "reference_mean": chain.reference_mean, "grad_clamp": chain.grad_clamp, "clamp": chain.clamp,
        })  # fmt: skip
    found = {
        "kind": model.kind,
        "nets": [_plain_net(net) for net in _nets(model)],
        "chains": chains,
        "value_range": model.value_range,
        "shape": model.sample_shape(model.sizes[-1]),
        "start": start_of(model),
        "upsampling": getattr(model, "upsampling", "nearest"),
        "cycles": list(getattr(model, "cycles", ())),
        "batch_size": model.batch_size,
        "coupled": bool(model.coupled),
    }
    if isinstance(model, CoopNets):
        config = model.generator.config()
        found["generator"] = {**config, "activation": _activation(config["activation"])}
    return found


def start_of(model: EnergyModel) -> str:
    """Where chains of samples start, by the name of a function of `plain`."""
    if isinstance(model, CoopNets):
        return "generator"
    if isinstance(model, SpatialTemporal):
        return "bank_in_order"
    if isinstance(model, GenerativeConvNet):
        return "mean"
    return model.start if isinstance(model, SingleGrid) else "colours"


def _nets(model: EnergyModel) -> list[ScoreNet]:
    model.energy_nets("exported")
    return [net for net in model.active_nets if isinstance(net, ScoreNet)]


def _number(by_step: list[float]) -> float | list[float]:
    """A number that does not vary as itself; without the last two digits, which are of rounding: 0.006, not
    0.005999999999999998."""
    by_step = [float(f"{value:.14g}") for value in by_step]
    return by_step if len(set(by_step)) > 1 else by_step[0]


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise Refused("activation", f"be one of {', '.join(_ACTIVATIONS)} to be exported", repr(name), "export")
    return _ACTIVATIONS[name]


def _plain_net(net: ScoreNet) -> dict[str, Any]:
    config = net.config()
    if isinstance(net, ResidualNet):
        layers = {name: config[name] for name in ("stages", "depth", "head")}
    else:
        layers = {"layers": config["layers"], "norm": "batch" if net.norm == "batch" else "none"}
    return {
        "size": config["size"],
        "channels": config["channels"],
        **layers,
        "activation": _activation(config["activation"]),
        "negative_slope": config["negative_slope"],
        "features": 0 if net.head is None else net.head.weight.shape[1],
    }


@torch.no_grad()
def plain_tensors(model: EnergyModel, *, start: bool = False) -> dict[str, Tensor]:
    """The tensors of `plain.Energies`, on the CPU, weights divided by a spectral norm where a net has one; with `start`
    also what chains of samples start from."""
    found: dict[str, Tensor] = {}
    for net in _nets(model):
        target: Any = plain.Energy(_plain_net(net))
        convolutions: list[Any] = [m for m in target.modules() if isinstance(m, torch.nn.modules.conv._ConvNd)]
        norms = [layer for layer in target if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)]
        for i, (source, layer) in enumerate(zip(net.convolutions, convolutions, strict=True)):
            layer.weight.copy_(source.effective_weight())
            if source.bias is not None:
                layer.bias.copy_(source.bias)
            if source.norm is not None:
                norms[i].weight.copy_(source.norm.weight)
                norms[i].bias.copy_(source.norm.bias)
        if net.head is not None and net.head.bias is not None:
            target[-1].weight.copy_(net.head.effective_weight())
            if isinstance(net, ResidualNet) and net.head_kind == "sum":  # the plain net takes the mean
                target[-1].weight.mul_(net.top_pixels)
            target[-1].bias.copy_(net.head.bias)
        found.update({f"size_{net.size[-1]}.{name}": t.clone() for name, t in target.state_dict().items()})
    if start:
        kind = start_of(model)
        if kind == "colours":
            found["colours"] = model.colours.cpu().clone()
        elif kind in ("bank", "bank_in_order"):
            found["bank"] = model.get_buffer("bank").cpu().clone()
        elif isinstance(model, CoopNets):
            for index, layer in enumerate(model.generator.layers):  # an activation follows every layer
                own = layer.state_dict().items()
                found.update({f"generator.{2 * index}.{name}": t.cpu().clone() for name, t in own})
    return found
