"""The same chain in other packages, where they are installed: TorchEBM, ebmkit, posteriors, a `lax.scan` in JAX.

Each is a factory: (energy net, plain net of the same weights) -> loop(x, dynamics). ModuleNotFoundError where missing.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nets import EnergyNet
from ..sampling import Langevin

BoundLoop = Callable[[Tensor, Langevin], Tensor]
PACKAGES = {"torchebm": "torchebm==0.8.9", "ebm": "ebmkit==0.16.0", "posteriors": "posteriors==0.1.3", "jax": "jax"}


def version(module: str) -> str:
    """`torchebm 0.8.9`: the distribution of a module of PACKAGES and the version that is installed."""
    name = PACKAGES[module].partition("==")[0]
    return f"{name} {importlib.metadata.version(name)}"


def _potential(energy: nn.Module, x: Tensor, dynamics: Langevin) -> Tensor:
    """U(x) = E(x) + ‖x − m‖²/2σ²: packages that know no reference take it as part of the energy."""
    numbers = dynamics.update()
    if not numbers.inverse_variance:
        return energy(x)
    return energy(x) + 0.5 * numbers.inverse_variance * (x - numbers.reference_mean).square().flatten(1).sum(1)


def _temperature(dynamics: Langevin) -> float:
    """noise_std² over 2·drift, 1 for the coupled form at noise_scale 1."""
    numbers = dynamics.update()
    if numbers.grad_clamp < math.inf:
        raise ValueError("this package has no bound on gradient entries")
    return numbers.noise_std**2 / (2 * numbers.drift)


def torchebm_loop(net: nn.Module, plain: nn.Module) -> BoundLoop:
    """TorchEBM's LangevinDynamics: x − η∇U + √(2η)·noise_scale·ε, with its own clamp."""
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    class Potential(BaseModel):
        def __init__(self, dynamics: Langevin, device: torch.device) -> None:
            super().__init__(device=device)
            self.net, self.dynamics = plain, dynamics

        def forward(self, x: Tensor) -> Tensor:
            return _potential(self.net, x, self.dynamics)

    def loop(x: Tensor, dynamics: Langevin) -> Tensor:
        plain.requires_grad_(False)
        sampler = LangevinDynamics(
            Potential(dynamics, x.device),
            step_size=dynamics.update().drift,
            noise_scale=math.sqrt(_temperature(dynamics)) or 1e-30,  # it must be positive there
            clamp=dynamics.clamp,
            device=x.device,
        )
        return sampler.sample(x=x, n_steps=dynamics.steps)

    return loop


def ebmkit_loop(net: nn.Module, plain: nn.Module) -> BoundLoop:
    """ebmkit's LangevinDynamics: x − η∇U + σ·ε, with its own clamp; its bound on ∇U would bound the reference too."""
    from ebm import LangevinDynamics

    def loop(x: Tensor, dynamics: Langevin) -> Tensor:
        numbers = dynamics.update()
        _temperature(dynamics)
        sampler = LangevinDynamics(numbers.drift, dynamics.steps, noise_scale=numbers.noise_std, clamp=dynamics.clamp)
        plain.requires_grad_(False)
        return sampler.sample(lambda images: _potential(plain, images, dynamics), x)

    return loop


def posteriors_loop(net: nn.Module, plain: nn.Module) -> BoundLoop:
    """posteriors' SGLD with the images as its parameters: x + lr ∇log p + √(2·T·lr)·ε; the clamp is ours to add."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its import, about a later version of tensordict
        from posteriors import sgmcmc

    def loop(x: Tensor, dynamics: Langevin) -> Tensor:
        plain.requires_grad_(False)

        def log_posterior(images: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
            return -_potential(plain, images, dynamics).sum(), torch.empty(0, device=images.device)

        numbers = dynamics.update()
        transform = sgmcmc.sgld.build(log_posterior, lr=numbers.drift, temperature=_temperature(dynamics))
        state = transform.init(x.clone())
        for _ in range(dynamics.steps):
            state, _ = transform.update(state, None)
            if dynamics.clamp is not None:
                state.params.clamp_(*dynamics.clamp)
        return state.params

    return loop


def jax_loop(net: nn.Module, plain: nn.Module) -> BoundLoop:
    """One jitted `lax.scan` over the steps, NHWC, XLA's own convolutions, in its default precision.

    Tensors pass by DLPack, without a copy through the host; a JAX without the GPU that x is on raises.
    """
    if not isinstance(net, EnergyNet):
        raise TypeError("written for stacks of convolutions alone")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    weights, energy = _jax_energy(net, jax, jnp)

    def chain(x: Any, key: Any, numbers: Any, weights: Any, steps: int) -> Any:
        drift, noise_std, inverse_variance, mean, clip, low, high = numbers

        def step(x: Any, key: Any) -> tuple[Any, None]:
            gradient = jax.grad(lambda y: energy(y, weights).sum())(x)
            gradient = jnp.clip(gradient, -clip, clip) + (x - mean) * inverse_variance
            return jnp.clip(x - drift * gradient + noise_std * jax.random.normal(key, x.shape), low, high), None

        return jax.lax.scan(step, x, jax.random.split(key, steps))[0]

    jitted = jax.jit(chain, static_argnums=4)

    def loop(x: Tensor, dynamics: Langevin) -> Tensor:
        n = dynamics.update()
        numbers = (n.drift, n.noise_std, n.inverse_variance, n.reference_mean, n.grad_clamp, n.low, n.high)
        images = jnp.from_dlpack(x.permute(0, 2, 3, 1).contiguous())
        result = jitted(images, jax.random.key(0), tuple(map(float, numbers)), weights, dynamics.steps)
        return torch.from_dlpack(result.block_until_ready()).permute(0, 3, 1, 2).contiguous()

    return loop


def _jax_energy(net: EnergyNet, jax: Any, jnp: Any) -> tuple[Any, Callable[[Any, Any], Any]]:
    """The weights as arrays, and energy(x (N, H, W, C), weights) -> (N,)."""
    activations = {
        "leaky_relu": lambda z: jnp.where(z > 0, z, net.negative_slope * z), "relu": jax.nn.relu, "silu": jax.nn.silu,
        "elu": jax.nn.elu, "none": lambda z: z,
    }  # fmt: skip
    activate = activations[net.activation]

    def array(tensor: Tensor) -> Any:
        return jnp.asarray(tensor.detach().cpu().numpy())

    assert net.head is not None and net.head.bias is not None
    top = net.convolutions[-1].weight.shape[0]
    head = net.head.effective_weight().reshape(top, -1).T.flatten()  # from C, H, W order to H, W, C
    stages = []
    for layer in net.convolutions:
        norm = None if layer.norm is None else (array(layer.norm.weight), array(layer.norm.bias))
        bias = None if layer.bias is None else array(layer.bias)
        stages.append((array(layer.effective_weight().permute(2, 3, 1, 0)), bias, norm))

    def energy(x: Any, weights: Any) -> Any:
        stages, head, shift = weights
        for layer, (weight, bias, norm) in zip(net.convolutions, stages, strict=True):
            padding = [(layer.padding, layer.padding)] * 2
            x = jax.lax.conv_general_dilated(
                x, weight, (layer.stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = x if bias is None else x + bias
            if norm is not None:
                mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
                x = (x - mean) * jax.lax.rsqrt(variance + 1e-5) * norm[0] + norm[1]
            x = activate(x)
        return -(x.reshape(x.shape[0], -1) @ head + shift)

    return (stages, array(head), array(net.head.bias)), energy
