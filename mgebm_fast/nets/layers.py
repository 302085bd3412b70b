"""The layer of an energy net: convolution, batch statistics, activation; and the spectral norm of its weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BN_EPS = 1e-5
# An observed batch enters the running statistics with this weight.
BN_MOMENTUM = 0.1
_POWER_ITERATIONS_AT_START = 20

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "elu": F.elu}
ACTIVATIONS = ("leaky_relu", *_FUNCTIONS, "none")


def activate(x: Tensor, activation: str, negative_slope: float) -> Tensor:
    """The activation of that name, one of `ACTIVATIONS`, on x."""
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return x if activation == "none" else _FUNCTIONS[activation](x)


class BatchStatistics(nn.Module):
    """Batch normalisation that always uses the statistics of the batch it is given, in the sampler too.

    The running statistics play no part in the forward. They follow observed batches only (`observe`), start at
    zero and are divided by `1 − (1 − momentum)^observed` when read, so that the first batch counts in full.
    """

    running_mean: Tensor
    running_var: Tensor
    observed: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("running_mean", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("running_var", torch.zeros(channels, dtype=torch.float32))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))
        self.observe = False

    def forward(self, x: Tensor) -> Tensor:  # (N, C, *spatial)
        if x.numel() <= x.shape[1]:
            raise ValueError(
                "EnergyNet: norm='batch' needs more than one value a channel in a batch, got one sample on a map of "
                "one pixel; use a larger batch, or norm='none'"
            )
        if not self.observe:
            return F.batch_norm(x, None, None, self.weight, self.bias, True, BN_MOMENTUM, BN_EPS)
        self.observed += 1
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, BN_MOMENTUM, BN_EPS)

    @torch.no_grad()
    def follow(self, mean: Tensor, variance: Tensor, values: int) -> None:
        """Take in the mean and the biased variance of each channel over so many observed values."""
        self.observed += 1
        self.running_mean.lerp_(mean, BN_MOMENTUM)
        self.running_var.lerp_(variance * (values / (values - 1)), BN_MOMENTUM)

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The affine map that this norm is under its running statistics: `y = scale x + shift`."""
        if int(self.observed) == 0:
            raise ValueError(
                "freeze_norm: the net must have observed data, got one that never did: run it on training images "
                "inside `with net.observing():`"
            )
        seen = 1.0 - (1.0 - BN_MOMENTUM) ** int(self.observed)
        scale = self.weight / torch.sqrt(self.running_var / seen + BN_EPS)
        return scale, self.bias - self.running_mean / seen * scale


class SpectralWeight(nn.Module):
    """A weight whose matrix (out, rest) may be divided by its largest singular value.

    σ = uᵀWv with v = Wᵀu/‖Wᵀu‖, the power iteration of Miyato et al. (ICLR 2018); the gradient flows through σ.
    `u` moves only when the net observes data, so a chain sees one fixed weight and leaves no trace.
    """

    u: Tensor | None

    def __init__(self, shape: tuple[int, ...], bias: bool, spectral_norm: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(shape[0], dtype=torch.float32)) if bias else None
        self.register_buffer("u", torch.empty(shape[0], dtype=torch.float32) if spectral_norm else None)
        self.observe = False

    def reset(self, generator: torch.Generator) -> None:
        """Xavier-uniform weight, zero bias."""
        nn.init.xavier_uniform_(self.weight, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.u is not None:
            with torch.no_grad():
                self.u.copy_(F.normalize(torch.randn(self.u.shape, generator=generator, dtype=torch.float32), dim=0))
                for _ in range(_POWER_ITERATIONS_AT_START):
                    self._iterate()

    def _iterate(self) -> None:
        assert self.u is not None
        matrix = self.weight.detach().flatten(1)
        v = F.normalize(matrix.T @ self.u, dim=0)
        self.u.copy_(F.normalize(matrix @ v, dim=0))

    def effective_weight(self) -> Tensor:
        """The weight that the layer uses: itself, or divided by its spectral norm."""
        if self.u is None:
            return self.weight
        if self.observe:
            with torch.no_grad():
                self._iterate()
        matrix = self.weight.flatten(1)
        u = self.u.clone()  # a later power iteration must not touch what this graph saved
        v = F.normalize(matrix.detach().T @ u, dim=0)
        return self.weight / torch.dot(u, matrix @ v)


class ConvLayer(SpectralWeight):
    """Convolution (zero padding kernel // 2 on every side) → batch statistics, where asked for → activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int,
        *,
        norm: str,
        activation: str,
        negative_slope: float,
        spectral_norm: bool,
        ndim: int,
    ) -> None:
        super().__init__((outputs, inputs) + (kernel,) * ndim, norm != "batch", spectral_norm)
        self.kernel, self.stride, self.padding = kernel, stride, kernel // 2
        self.norm = BatchStatistics(outputs) if norm == "batch" else None
        self.activation, self.negative_slope = activation, negative_slope

    def forward(self, x: Tensor) -> Tensor:
        convolve = _CONVOLUTIONS[self.weight.dim() - 2]
        x = convolve(x, self.effective_weight(), self.bias, self.stride, self.padding)
        if self.norm is not None:
            x = self.norm(x)
        return activate(x, self.activation, self.negative_slope)

    def map_size(self, size: int) -> int:
        """Length of the output map along a dimension of length `size`."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def macs(self, size: tuple[int, ...]) -> int:
        """Multiply-accumulates of one sample for an input map of `size`."""
        return self.weight.numel() * math.prod(self.map_size(s) for s in size)


class LinearHead(SpectralWeight):
    """f = w · x + b over the whole top map, flattened in logical C, H, W order."""

    def __init__(self, features: int, spectral_norm: bool) -> None:
        super().__init__((1, features), True, spectral_norm)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, *spatial) -> (N,)
        return F.linear(x.flatten(1), self.effective_weight(), self.bias).squeeze(1)
