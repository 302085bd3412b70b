"""GenerativeConvNet and Frame: one net of any layers, chains that start from zero images, and images of any size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import is_int
from ..nets import ConvSpec, EnergyNet
from ..sampling.corrected import Corrected
from ..sampling.langevin import Langevin
from ..sampling.mcmc import HMC
from .model import Group
from .single import OneNet


class GenerativeConvNet(OneNet):
    """p(x) ∝ exp(f(x)) N(x; m, σ²I) with f a ConvNet of one's own layers (Xie, Lu, Zhu, Wu, ICML 2016).

    Args:
        size: of the training images, one side.
        layers: the convolutions, bottom first.
        head: "sum" of the top feature map, for textures, which then have any size; "linear" over it, for objects.
        depth: how many of the layers make the energy; None: all. Fewer are a net with the "sum" head, which shares its
            layers with the whole one: what growth layer by layer trains.
        init_std: of normal initial weights; None: Xavier-uniform ones.
        sample_steps: of a sample's chain, which starts at the zero image, m everywhere.

    State: as `EnergyModel`'s, and `bank` (M, C, S, S), the persistent chains of training. Other arguments as
    `EnergyModel`'s.
    """

    kind = "GenerativeConvNet"
    start = "bank"  # in model files
    _OWN: tuple[str, ...] = ("sample_steps", "depth")
    _tied = False  # whether a linear head has one weight a channel, and so fits any size

    def __init__(
        self,
        size: int,
        layers: Sequence[ConvSpec] = (),
        *,
        head: str = "sum",
        depth: int | None = None,
        activation: str | None = None,
        norm: str = "none",
        spectral_norm: bool = False,
        init_std: float | None = None,
        sample_steps: int = 300,
        channels: int = 3,
        seed: int = 0,
        nets: Sequence[nn.Module] | None = None,
        **arguments: Any,
    ) -> None:
        if nets is None:
            net = EnergyNet(
                size, channels, layers, norm=norm, activation=activation or "relu", spectral_norm=spectral_norm,
                head=head, seed=seed % 2**63,
            )  # fmt: skip
            if init_std is not None:
                draw_weights_(net, init_std, seed)
            nets = [net]
        super().__init__(size, sample_steps=sample_steps, channels=channels, nets=nets, seed=seed, **arguments)
        self._register_rows("bank", *self.sample_shape(size))
        self.depth = depth

    def _stack(self, what: str) -> EnergyNet:
        (net,) = self.energy_nets(what, EnergyNet)
        assert isinstance(net, EnergyNet)
        return net

    @property
    def layers(self) -> int:
        """How many layers the whole net has."""
        return len(self._stack("grown").specs)

    @property
    def depth(self) -> int:
        """How many layers make the energy."""
        return self._depth

    @depth.setter
    def depth(self, depth: int | None) -> None:
        net = self._stack("grown")
        count = len(net.specs)
        depth = count if depth is None else depth
        if not is_int(depth, 1) or depth > count:
            raise ValueError(f"{self.kind}: depth must be an int in [1, {count}] or None, got {depth!r}")
        if depth == getattr(self, "_depth", None):
            return
        part = net
        if depth < count:
            part = EnergyNet.from_config({**net.config(), "layers": net.config()["layers"][:depth], "head": "sum"})
            part.layers = nn.ModuleList(net.layers[:depth])
        # In a tuple so that nn.Module does not register its layers a second time.
        self._depth, self._part = depth, (part,)

    @property
    def net(self) -> EnergyNet:
        """The net of the layers in use."""
        return self._part[0]

    @property
    def active_nets(self) -> list[nn.Module]:
        return [self.net]

    def _start(self, group: Group) -> Tensor:
        return self.zeros(group.n)

    def at_size(self, size: int) -> GenerativeConvNet:
        """This model for images of another size, with its weights and no bank. ValueError where a head fits one."""
        net = self._stack("resized")
        if net.head is not None and not self._tied and size != self.sizes[-1]:
            raise ValueError(
                f"size: must be {self.sizes[-1]}, the size that this model was trained at, for a net with a linear "
                f'head, got {size}; a fully convolutional one (head "sum") takes any'
            )
        config = self.config()
        config.update(sizes=[1, size], nets=[{**net.config(), "size": [size, size]}])
        other = self.from_config(config).to(self.colours.device)
        other._take_weights(self)
        other.colours = self.colours.clone()
        return other

    def _take_weights(self, source: GenerativeConvNet) -> None:
        """Those of a model of the same layers, at whatever size."""
        self.nets.load_state_dict(source.nets.state_dict())

    def config(self) -> dict[str, Any]:
        own = {"start": self.start, "sample_steps": self.sample_steps, "depth": self.depth}
        return {**super().config(), **own}


class Frame(GenerativeConvNet):
    """FRAME: fixed filters F_k, and learned weights λ_k on their summed rectified responses (Zhu, Wu, Mumford, 1998;
    its deep version, Lu, Zhu, Wu, AAAI 2016):

        f(x) = Σ_k λ_k Σ_p h_k(x)(p),   h = top feature map of frozen layers, for a filter bank relu(F_k * x − b_k)

    λ stands in the linear head of the net, the same at every pixel of a feature map. `leapfrog_steps`: chains are
    Hamiltonian Monte Carlo with so many, of the law that `langevin` has without its steps' error; None: Langevin.
    """

    kind = "Frame"
    _tied = True
    _OWN = ("sample_steps", "leapfrog_steps")

    def __init__(self, size: int, *, leapfrog_steps: int | None = None, **arguments: Any) -> None:
        super().__init__(size, **{"head": "linear", **arguments})
        self.leapfrog_steps = leapfrog_steps
        self.exact(1)  # raises for wrong numbers
        net = self._stack("frozen")
        if net.head is None:
            raise ValueError("Frame: nets must have a linear head, which holds λ, got head='sum'")
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name == "head.weight")

    @property
    def weights(self) -> Tensor:  # (K,)
        """λ."""
        return self._head().detach()[:, 0].clone()

    def set_weights(self, weights: Tensor) -> None:  # (K,)
        """Make `weights` λ."""
        with torch.no_grad():
            self._head().copy_(weights[:, None].expand_as(self._head()))

    def _head(self) -> Tensor:  # (K, pixels), a view of the head's weight
        head = self.net.head
        assert head is not None
        return head.weight.view(self.net.specs[-1].channels, -1)

    @torch.no_grad()
    def responses(self, x: Tensor) -> Tensor:  # (N, C, S, S) -> (N, K)
        """Means of the rectified responses of every filter over an image: the statistics that λ matches."""
        for layer in self.net.layers:
            x = layer(x)
        return x.flatten(2).mean(2)

    def exact(self, steps: int) -> HMC | None:
        """The Hamiltonian chain of `steps` proposals whose law is exp(−U/T), T = s²/2d as `MALA.correcting` has it."""
        if self.leapfrog_steps is None:
            return None
        chain, numbers = self.langevin[0], self.langevin[0].update(where="Frame")
        if numbers.noise_std == 0:
            raise ValueError("Frame: langevin must have noise for Hamiltonian chains, got a noise-free one")
        return HMC(
            steps, self.leapfrog_steps, numbers.noise_std, chain.reference_std, chain.reference_mean,
            numbers.noise_std**2 / (2 * numbers.drift), chain.clamp, chain.grad_clamp,
        )  # fmt: skip

    def law(self, chain: Langevin) -> Langevin | Corrected:
        return self.exact(chain.steps) or chain

    def _take_weights(self, source: GenerativeConvNet) -> None:
        assert isinstance(source, Frame)
        self.net.layers.load_state_dict(source.net.layers.state_dict())
        self.set_weights(source.weights)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "leapfrog_steps": self.leapfrog_steps}


@torch.no_grad()
def draw_weights_(net: EnergyNet, std: float, seed: int) -> None:
    """Weights N(0, std²) for all layers and the head."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    for name, parameter in net.named_parameters():
        if name.endswith("weight"):
            parameter.normal_(0.0, std, generator=generator)
