"""Whole chains of small stacks as dense matrices: the part of the GPU's plan that makes all steps in one kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import counters, dense_chain
from ..ops.dense_net import PAD, bias_of, dense_net_of, dense_places
from ..ops.update import Update
from .stack import Stack

LEAST_COUPLED_SPLIT = 4  # programs a tile


class DenseSteps:
    """A stack's matrices in buffers of their own, which `load` fills again in place."""

    def __init__(self, stack: Stack, dtype: torch.dtype, backend: str) -> None:
        self._backend = backend
        made = dense_net_of(stack, dtype)
        assert not isinstance(made, str), made
        self._net = made
        device = stack.head.device
        # The factor that the kernel applies to the head; on the device, so that a captured graph reads its value then.
        self._scale = torch.ones((), dtype=torch.float32, device=device)
        self._values, self._places = [], []
        for stage, weight in zip(stack.stages, made.weights, strict=True):
            self._values.append(torch.zeros(stage.weight.numel() + 1, dtype=dtype, device=device))  # and a last 0
            places = torch.full(weight.shape, stage.weight.numel(), dtype=torch.int32, device=device)
            found = dense_places(stage)
            places[: found.shape[0], : found.shape[1]] = found
            self._places.append(places.reshape(-1))

    def most_samples(self, device: torch.device) -> float:
        """The largest batch that is made in one kernel. With batch statistics every program waits for all
        others, so that all must be on the GPU at once, and where few share a tile each reads most of the weights."""
        if not self._net.coupled or device.type != "cuda":
            return math.inf
        return _processors(device) // LEAST_COUPLED_SPLIT * dense_chain.TILE

    def load(self, stack: Stack, unscale: Tensor) -> None:
        """The stack's present weights; `unscale` is one over what its head is multiplied by, on the device."""
        torch.reciprocal(unscale, out=self._scale)  # of a power of two: exact
        net = self._net
        for index, stage in enumerate(stack.stages):
            values, bias, norm = self._values[index], bias_of(stage), net.norms[index]
            values[:-1].copy_(stage.weight.reshape(-1))
            torch.index_select(values, 0, self._places[index], out=net.weights[index].view(-1))
            if bias is not None:
                net.biases[index][: net.sizes[index + 1]].view(len(bias), -1).copy_(bias[:, None])
            if norm is not None and stage.norm is not None:
                norm.take(stage.norm.weight)
        net.head[: net.sizes[-1]].copy_(stack.head.reshape(-1))

    def advance_(
        self, x: Tensor, place: counters.Counters, steps: int, numbers: Update, mask: Tensor | None, bad_step: Tensor
    ) -> None:
        """`steps` Langevin steps on x in place; `place` has the counters of the first."""
        state = x.contiguous()
        mask = None if mask is None else mask.expand(x.shape).contiguous()
        split = split_of(x, max(weight.shape[0] for weight in self._net.weights))
        dense_chain.launch(state, self._net, steps, self._scale, mask, bad_step, numbers, place, split, self._backend)
        if state is not x:
            x.copy_(state)


def split_of(x: Tensor, widest: int) -> int:
    """Programs a tile of samples: a power of two, so many that all together fill a GPU without queueing, and that
    none is without columns of the widest layer (it would only wait for the others)."""
    if x.device.type != "cuda":
        return 1
    free = _processors(x.device) // -(-x.shape[0] // dense_chain.TILE)
    most = max(1, min(free, widest // PAD, dense_chain.MAX_SPLIT))
    return 1 << most.bit_length() - 1


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
