"""The resident chain of csrc/ops/conv_chain/resident.h, built for the host and run on CPU tensors."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
import random
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mgebm_fast.ops.conv_chain.resident import ResidentChain, launch_arguments
from mgebm_fast.ops.counters import Counters, check
from mgebm_fast.ops.edge_step import NO_BAD_STEP
from mgebm_fast.ops.update import Update

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def library() -> ctypes.CDLL:
    target = Path(tempfile.mkdtemp()) / "resident.so"
    flags = "-std=c++17 -O1 -mf16c -mfma -ffp-contract=off -Wall -Wextra -Werror -shared -fPIC".split()
    include = [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc'}"]
    source = ROOT / "tests/helpers/resident_host.cpp"
    subprocess.run(["g++", *flags, *include, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def launch(
    chains: Sequence[ResidentChain], nets: Sequence[tuple], batch: int, *, blocks: int = 3, seed: int = 0
) -> int:
    """One launch on `blocks` blocks, the warps of a phase in an order drawn from `seed`; the first bad step.

    RuntimeError where a warp reads or writes what another one writes in the same phase, or past shared memory.
    """
    bad_step = torch.tensor(NO_BAD_STEP)
    words = list(flat(launch_arguments(chains, nets, batch, bad_step, blocks)))
    error = ctypes.create_string_buffer(400)
    if library().conv_chain_host((ctypes.c_int64 * len(words))(*words), seed, error, len(error)):
        raise RuntimeError(error.value.decode())
    return int(bad_step)


def flat(value: Any) -> Iterator[int]:
    """The numbers of nested fields, as resident_host.cpp reads them."""
    if isinstance(value, (tuple, list)):
        if isinstance(value, list) and value is not None and isinstance(value[0], tuple):  # a List of structs
            yield len(value)
        for item in value:
            yield from flat(item)
    elif isinstance(value, float):
        yield struct.unpack("<I", struct.pack("<f", value))[0]
    else:
        yield int(value) - (1 << 64) if int(value) >> 63 else int(value)


def place_of(x: Tensor, *, step: int = 0, first_sample: int | Tensor = 0, stream: int = 9) -> Counters:
    return check("test", len(x), x[0].numel(), x.device, seed=3, first_sample=first_sample, step=step, stream=stream)


IDLE = Update(0.0, 0.0, 0.0, 0.0, math.inf, -math.inf, math.inf)


def loaded(stages: Sequence[Stage], head: Tensor, samples: int) -> ResidentChain:
    chain = ResidentChain(stages, samples=samples, device="cpu")
    chain.load(stages, head)
    return chain


def gradient(stages: Sequence[Stage], head: Tensor, x: Tensor, *, samples: int, seed: int = 0) -> Tensor:
    chain, out = loaded(stages, head, samples), torch.full_like(x, math.nan)
    net = chain.arguments(x, out, steps=0, numbers=IDLE, place=place_of(x), gradient=out)
    assert launch([chain], [net], len(x), seed=seed) == NO_BAD_STEP
    return out


def advanced(
    stages: Sequence[Stage], head: Tensor, x: Tensor, numbers: Update, *, samples: int, steps: int, step: int = 0,
    mask: Tensor | None = None, seed: int = 0, blocks: int = 3, stream: int = 9,
) -> Tensor:  # fmt: skip
    chain, out = loaded(stages, head, samples), torch.full_like(x, math.nan)
    place = place_of(x, step=step, stream=stream)
    net = chain.arguments(x, out, steps=steps, numbers=numbers, place=place, mask=mask)
    assert launch([chain], [net], len(x), seed=seed, blocks=blocks) == NO_BAD_STEP
    return out


@dataclasses.dataclass
class Stage:
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    activation: str
    in_size: tuple[int, ...]
    out_size: tuple[int, ...]
    slope: float = 0.2
    shortcut: int | None = None
    norm: None = None
    name: str = "layer"


class _Rounded(torch.autograd.Function):
    """A map as it is stored: float16, on the way up and on the way down."""

    @staticmethod
    def forward(context, x: Tensor) -> Tensor:
        return x.half().double()

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        return gradient.half().double()


_ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.2),
    "silu": F.silu,
    "elu": F.elu,
}


def rounded_gradient(stages: Sequence[Stage], head: Tensor, x: Tensor) -> Tensor:
    """∇E in float64 of the net whose weights and maps are float16: signs that rounding turns are turned here too."""
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    leaf = h = x.double().requires_grad_()
    for stage in stages:
        bias = None if stage.bias is None else stage.bias.double()
        z = convolve(h, stage.weight.half().double(), bias, stage.stride, stage.padding, stage.dilation)
        h = _Rounded.apply(_ACTIVATIONS[stage.activation](z))
    return torch.autograd.grad((h * head.double()).sum(), leaf)[0]


def random_stack(seed: int) -> tuple[list[Stage], Tensor, tuple[int, ...]]:
    """Up to four convolutions of any kernel, stride, padding and dilation in 1-D to 3-D; head; x's size."""
    draw, numbers = random.Random(seed), torch.Generator().manual_seed(seed)
    ndim = draw.choice([1, 2, 2, 2, 3])
    size = start = tuple(draw.randint(1, {1: 40, 2: 9, 3: 5}[ndim]) for _ in range(ndim))
    channels, stages = draw.randint(1, 6), []
    first = channels
    while not stages or (len(stages) < 4 and draw.random() < 0.7):
        kernel, stride, dilation = ([draw.randint(1, high) for _ in range(ndim)] for high in (4, 3, 2))
        padding = [draw.randint(0, 2) for _ in range(ndim)]
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
        )
        if min(out) < 1:
            continue
        outputs = draw.randint(1, 72)
        weight = torch.randn(outputs, channels, *kernel, generator=numbers) / math.sqrt(channels * math.prod(kernel))
        bias = torch.randn(outputs, generator=numbers) * 0.3 if draw.random() < 0.7 else None
        activation = draw.choice(["none", "relu", "leaky_relu", "silu", "elu"])
        stages.append(Stage(weight, bias, tuple(stride), tuple(padding), tuple(dilation), activation, size, out))
        channels, size = outputs, out
    return stages, torch.randn(channels, *size, generator=numbers), (first, *start)
