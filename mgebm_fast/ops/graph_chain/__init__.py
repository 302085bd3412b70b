"""graph_chain: K Langevin steps of an energy given as a graph of layers in one native call, or its ∇E; CPU, float32.

    E(x) = layers[-1](… layers[0](x));   for k in 0 … K − 1:   x ← langevin_step(x, ∇E(x))

Convolutions, dense layers, pooling, norms of a sample, residual additions, functions (`layers`). Results do not
depend on threads, on the batch that a sample is in or on the layout of x.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ... import native
from ..backend import choose, register
from ..conv_chain.packed import PackedChain
from ..conv_chain.scratch import Scratch
from ..counters import Counters, seed_or_fresh
from ..langevin_step import langevin_step_reference
from ..state import addresses, all_finite, why_not_plain
from ..update import Number, Update, check_steps, prepare
from .graph import Graph
from .program import Program
from .refill import Refill

OP = "graph_chain"
register("graph_chain", cpu=True, traced=False)


def _on_cpu() -> contextlib.AbstractContextManager[object]:
    """Makes tensors on the CPU whatever torch's default device is. Where no mode of torch's is on, as a default device
    is one, that is so already, and a context would only make every op slower."""
    return torch.device("cpu") if torch._C._len_torch_function_stack() else contextlib.nullcontext()


class GraphChain(PackedChain):
    """A graph with its constants packed for the native engine; bfloat: its products in bfloat16, sums in float32;
    split: those of dense layers as sums of three, of what rounding to bfloat16 gives and leaves, off by 1e-5.

    On CPUs that do not multiply bfloat16 those are computed in float32 from rounded operands, slowly: for tests.

    Raises ValueError where the graph is too large for it, TypeError for constants that are no plain tensors.
    """

    op = OP
    _packed: Scratch | None = None  # holds the constants of one that was refilled

    def __init__(self, graph: Graph, *, bfloat: bool = False, split: bool = False) -> None:
        tensors = [tensor for _, tensor in graph.tensors()]
        addresses(OP, *tensors)
        self._x, self.samples = graph.x, graph.samples
        # A function may hide a NaN (ReLU makes it 0): every gradient of such weights is NaN, as autograd's are.
        self._finite = all_finite(tensors)
        with torch.no_grad(), _on_cpu():
            self._program = Program(graph, bfloat, split)
        self._arguments = self._program.arguments

    def refill(self, graph: Graph, values: Tensor, places: dict[int, Tensor]) -> Refill:
        """The table that packs other weights, of the graph that this was made of in float32; ValueError for none."""
        with torch.no_grad(), _on_cpu():
            return Refill(graph, self._program, values, places)

    def refilled(self, refill: Refill, values: Tensor) -> GraphChain:
        """The same chain with other weights, that are finite."""
        chain = object.__new__(GraphChain)
        chain._x, chain.samples, chain._finite, chain._program = self._x, self.samples, True, self._program
        chain._packed = refill.pack(values)
        chain._arguments = refill.arguments(chain._packed)
        return chain

    @property
    def split(self) -> bool:
        """Whether a dense layer is computed so."""
        return any(step.split >= 0 for step in self._program.steps)

    def _call(
        self, x: Tensor, gradient: Tensor | None, mask: Tensor | None, steps: int, numbers: Update, place: Counters
    ) -> None:
        if not self._finite:
            moved = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
            (x if gradient is None else gradient).masked_fill_(moved, torch.nan)
            return
        module = native.module()
        arguments = [
            *self._arguments, *addresses(OP, x, gradient, mask), x.shape[0], steps, self._x.channels, self._x.pixels,
            numbers.native_arguments, place.native_arguments,
        ]  # fmt: skip
        threads = torch.get_num_threads()
        workspace = Scratch(module.graph_chain_workspace(*arguments, 0, threads))
        module.graph_chain_cpu(*arguments, workspace.address, threads)

    def _check_shape(self, x: Tensor) -> None:
        elements = self._x.channels * self._x.pixels
        if x.dim() == 0 or x.shape[1:].numel() != elements:
            raise ValueError(f"{OP}: x must have {elements} elements a sample, got {tuple(x.shape)}")
        if self.samples not in (None, x.shape[0]):
            raise ValueError(f"{OP}: x must have the {self.samples} samples of the graph's constants, got {len(x)}")


def graph_chain(
    graph: Graph,
    x: Tensor,  # (N, ...) float32
    *,
    steps: int,
    step_size: Number | None = None,
    noise_scale: Number = 1.0,
    drift: Number | None = None,
    noise_std: Number | None = None,
    reference_std: Number | None = None,
    reference_mean: float | Tensor = 0.0,
    grad_clamp: float | None = None,
    clamp: tuple[float, float] | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    first_sample: int | Tensor = 0,
    first_step: int | Tensor = 0,
    stream: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The state `steps` steps after x, a new contiguous tensor.

        for k in 0 … K − 1:   x ← `langevin_step_`(x, ∇E(x), …) at step first_step + k

    Args:
        graph: the energy (`graph.Graph`); `gradient.energy_graph` reads one from a module or callable.
        step_size … mask, seed … stream: as in `langevin_step_`; first_step a number or a 0-dim int64 tensor.
        backend: "native", or "reference": float64 gradients by autograd, x rounded to float32 at each step.

    Raises: TypeError, ValueError, BackendError.
    """
    seed = seed_or_fresh(seed, x, OP)
    if backend == "auto" and why_not_plain(x.resolve_neg()):
        backend = "reference"
    backend = choose(OP, backend, x.device)
    check_steps(steps, OP)
    numbers, mask, place = prepare(
        OP, x, mask, steps=steps, step_size=step_size, noise_scale=noise_scale, drift=drift, noise_std=noise_std,
        reference_std=reference_std, reference_mean=reference_mean, grad_clamp=grad_clamp, clamp=clamp, seed=seed,
        first_sample=first_sample, step=first_step, stream=stream,
    )  # fmt: skip
    out = x.detach().clone(memory_format=torch.contiguous_format)
    if backend == "reference":
        graph_chain_reference(graph, out, steps=steps, numbers=numbers, place=place, mask=mask)
    else:
        GraphChain(graph).advance_(out, steps, numbers, place, mask)
    return out


def gradient_reference(graph: Graph, x: Tensor) -> Tensor:  # -> float64, the shape of x
    """∇E by autograd in float64."""
    with torch.enable_grad():
        leaf = x.detach().double().requires_grad_()
        return torch.autograd.grad(graph.energies(leaf).sum(), leaf)[0]


def graph_chain_reference(
    graph: Graph, x: Tensor, *, steps: int, numbers: Update, place: Counters, mask: Tensor | None = None
) -> None:
    """The steps in place: gradients in float64, the state rounded to float32 after each."""
    for k, here in enumerate(place.steps(0, steps)):
        langevin_step_reference(x, gradient_reference(graph, x), mask, numbers.steps(k, k + 1), here)
