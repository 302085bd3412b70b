"""∇E of an energy read as a graph, and whole chains of it, in one call of the native CPU engine (ops.graph_chain)."""

from __future__ import annotations

import collections
import hashlib
import math
import threading
import weakref
from collections.abc import Callable, Hashable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ... import native
from ...errors import BackendError, DivergenceError
from ...ops.conv_chain import has_bfloat, prefers_bfloat
from ...ops.counters import Counters
from ...ops.graph_chain import GraphChain, gradient_reference, layers
from ...ops.graph_chain.graph import Graph
from ...ops.graph_chain.layers import Map
from ...ops.update import Update
from ..autograd import AutogradPlan
from ..base import GradientPlan, PlanReport
from ..holding import frozen_parameters
from ..stack import Stack, example_input, reread
from . import kept
from .cost import Work, gains_by_bfloat, work_of
from .recorder import noise_like, read_graph, uncompiled
from .state import as_before, plain_values
from .tape import Tape
from .watch import Watch, identity_of, own_tensors, watch_of

# Reading an energy and packing its weights costs about as much as this many steps save.
MIN_STEPS = 16
# Largest ‖difference‖ / ‖gradient‖ of a reading that is trusted, since inputs at the kink of a ReLU give that much in a
# few elements; and the largest median of |difference|, against the gradient's root mean square.
BOUNDS = {"fp32": (0.01, 1e-4), "bf16": (0.15, 0.15)}
_SAMPLES = 4
_MOST_BYTES = 1 << 29  # of the maps of as many samples of x as are compared as well

Reader = Callable[[Any], "Graph | str"]  # energy -> its graph as it is now, or why it has none


class GraphPlan(GradientPlan):
    """∇E and Langevin steps of one energy with the weights, and the Python values, that it had at the last `refresh`.

    Raises DivergenceError where a constant of the graph is not finite: behind a ReLU, samples could stay finite and be
    wrong; ValueError where the graph is too large for the engine.
    """

    backends = ("native",)

    def __init__(
        self, graph: Graph, energy: Any, read: Reader, where: str, *, precision: str = "fp32", split: bool = False,
        why: str = "",
    ) -> None:  # fmt: skip
        self._energy, self._read, self._where, self._why = energy, read, where, why
        self.precision, self._split = precision, split
        self._pack(graph)

    @classmethod
    def of_chain(
        cls, chain: GraphChain, form: tuple[Hashable, ...], energy: Any, read: Reader, where: str, *, precision: str
    ) -> GraphPlan:
        """The plan of an energy that was read and packed before, and did not change."""
        plan = object.__new__(cls)
        plan._energy, plan._read, plan._where, plan._why = energy, read, where, ""
        plan.precision, plan.chain, plan.form, plan._split = precision, chain, form, chain.split
        return plan

    def _pack(self, graph: Graph) -> None:
        if name := not_finite(graph):
            raise DivergenceError(
                f"{self._where}: the energy's weights must be finite, got NaN or infinite values in {name}"
            )
        self.form = form_of(graph)
        self.chain = GraphChain(graph, bfloat=self.precision == "bf16", split=self._split)

    def gradient(self, x: Tensor) -> Tensor:  # (N, ...) float32 -> the same, contiguous
        """∇E(x), float32."""
        return self.chain.gradient(x)

    def advance_(self, x: Tensor, place: Counters, steps: int, numbers: Update, mask: Tensor | None) -> None:
        """`steps` Langevin steps on x in place, all in one native call."""
        self.chain.advance_(x, steps, numbers, place, mask)

    def refresh(self) -> None:
        graph = self._read(self._energy)
        if isinstance(graph, str):
            raise BackendError(f"refresh: the energy must still be a graph that the engine reads, but {graph}")
        if form_of(graph) != self.form:
            raise BackendError("refresh: the energy's layers must be those that the plan was made for; make a new plan")
        self._pack(graph)

    def explain(self) -> PlanReport:
        why = (self._why,) if self._why else ()
        how = f"{native.isa()}, {len(self.form) - 1} layers"
        if self.chain.samples:
            how += f", constants of {self.chain.samples} samples"
        if self.precision == "bf16":
            how += "; state, first convolution, functions and sums in fp32"
        if self.chain.split:
            how += "; dense layers as three products of bfloat16 each, off by 1e-5"
        return PlanReport("graph", self.precision, how, "all steps in one call", why)


def not_finite(graph: Graph) -> str:
    """The first layer of a graph with a constant that is not finite; an empty string where all are."""
    for name, tensor in graph.tensors():
        if tensor.numel() and not math.isfinite(torch.linalg.vector_norm(tensor.float(), math.inf)):
            return name
    return ""


def form_of(graph: Graph) -> tuple[Hashable, ...]:
    """What of a graph is not a number that training changes: its layers, how they are joined, and shapes."""
    form: list[Hashable] = [graph.x]
    for layer in graph.layers:
        fields = ((k, v) for k, v in vars(layer).items() if k != "name")
        form.append((type(layer).__name__, *((k, tuple(v.shape) if isinstance(v, Tensor) else v) for k, v in fields)))
    return tuple(form)


def graph_of(stack: Stack) -> Graph:
    """A stack without batch statistics as a graph; its energy is Σ head · h_L."""
    found: list[layers.Layer] = []
    for stage in stack.stages:
        out = Map(stage.weight.shape[0], stage.out_size)
        geometry = (stage.stride, stage.padding, stage.dilation)
        found.append(layers.Convolution((len(found),), out, stage.name, stage.weight, stage.bias, *geometry))
        if stage.activation != "none":
            slope = 0.0 if stage.activation == "relu" else stage.slope
            name = "leaky_relu" if stage.activation == "relu" else stage.activation
            a, b = {"leaky_relu": (slope, 0.0), "elu": (1.0, 1.0)}.get(name, (0.0, 0.0))
            found.append(layers.Pointwise((len(found),), out, stage.name, name, a, b))
    ones = (1,) * stack.ndim
    head = layers.Convolution(
        (len(found),), Map(1, ()), "the last layer", stack.head[None], None, ones, (0,) * stack.ndim, ones
    )
    return Graph(Map(stack.channels, stack.size), (*found, head))


def plan_of_stack(stack: Stack, energy: Any, where: str, precision: str, why: str) -> GraphPlan:
    """A stack by this engine; `why` says why not by that of stacks."""
    example = example_input(stack)
    return GraphPlan(
        graph_of(stack), energy, lambda now: graph_of(reread(now, example)), where, precision=precision, why=why
    )


def plan_of(energy: Any, x: Tensor, where: str, precision: str = "auto", steps: int | None = None) -> GraphPlan | str:
    """The plan of an energy that is read from its own code, compared with autograd the first time that it is read in
    this form; or the reason, naming the module and the op, why there is none.

    precision: "fp32"; "bf16", where the CPU multiplies it; "auto": bf16 where that is faster and the net has
    convolutions that gain by it, else fp32, by AMX with large dense layers as sums of three products of bfloat16.
    steps: of the call; an energy that is another one at each call, as by a number of Python's, is left to autograd
    after a few readings where so few steps do not make up for one.
    """
    if not native.available():
        return f"the compiled module did not load: {native.load_error}"
    if precision == "fp16":
        return "this engine has no fp16"
    if precision == "bf16" and not has_bfloat():
        return f"bf16 needs AVX512_BF16 or AMX, and {native.isa()} is in use"
    key = kept.key_of(x, precision)
    watch = None if key is None else watch_of(energy)
    place = None if watch is None else (watch, key, own_tensors(energy))
    if place is not None and (reason := place[0].kept.get(_refused(place))):
        return reason
    unused = _unused_of(energy)
    if place is not None and (found := kept.find(*place)):
        chain, form, read, made_in = found
        unused.clear()
        return GraphPlan.of_chain(chain, form, energy, read, where, precision=made_in)
    if steps is not None and len(unused) >= _MOST_UNUSED and not unused[-1].pays(len(x), steps):
        return f"it is another energy at each call: {len(unused)} readings in turn served one call each"
    with as_before(energy):
        return _plan_of(energy, x, where, precision, place)


# The readings of an energy since one was used again.
_unused: MutableMapping[Any, list[Work]] = WeakIdKeyDictionary()
_MOST_UNUSED = 3


def _unused_of(energy: Any) -> list[Work]:
    try:
        return _unused.setdefault(identity_of(energy), [])
    except TypeError:  # no weak references to it
        return []


def _refused(place: tuple[Watch, Hashable, list[Tensor]]) -> Hashable:
    """What a refusal is kept by: the energy's own tensors may be of other kinds at the next call."""
    return "refused", place[1], tuple((t.dtype, t.shape, t.stride()) for t in place[2])


def _refuse(place: tuple[Watch, Hashable, list[Tensor]] | None, reason: str) -> str:
    """The reason, which is kept for the next call where it is of the code, whatever its weights are."""
    if place is not None and "its own code" not in reason:
        place[0].kept[_refused(place)] = reason
    return reason


def _plan_of(
    energy: Any, x: Tensor, where: str, precision: str, place: tuple[Watch, Hashable, list[Tensor]] | None
) -> GraphPlan | str:
    """Reads the energy; `place`: where the reading is kept."""
    shape, tapes = x.shape, list[Tape]()

    def read(now: Any, tapes: list[Tape] | None = None) -> Graph | str:
        return read_graph(now, torch.empty((), dtype=torch.float32, device="cpu").expand(shape), tapes)

    graph = read(energy, tapes)
    if isinstance(graph, str):
        return _refuse(place, graph)
    split = False
    if precision == "auto":
        precision = "bf16" if prefers_bfloat() and gains_by_bfloat(graph) else "fp32"
        split = precision == "fp32" and native.isa() == "amx"
    try:
        plan = GraphPlan(graph, energy, read, where, precision=precision, split=split)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except DivergenceError as error:  # of the weights that there are
        return str(error)
    except Exception as error:
        return _refuse(place, str(error))
    reason, shown = _why_not_trusted(energy, graph, plan, x, tapes[-1])
    if reason:
        return _refuse(None if tapes[-1].hidden else place, f"its reading is not trusted: {reason}")
    if place is not None and shown and place[0].holds(energy):
        kept.keep(*place, graph, (plan.chain, plan.form, read, precision), tapes[-1])
    _unused_of(energy).append(work_of(graph))
    return plan


# What was compared: by module, or by the code of a function -> {digest of a form: why it is not trusted, "" where it
# is}, the latest ones: code whose numbers are others at each call has a form for each.
_of_modules: MutableMapping[Any, dict[bytes, str]] = weakref.WeakKeyDictionary()
_of_code: collections.OrderedDict[Hashable, dict[bytes, str]] = collections.OrderedDict()
_MOST_CODE, _MOST_FORMS = 256, 256
_lock = threading.Lock()


def _why_not_trusted(energy: Any, graph: Graph, plan: GraphPlan, x: Tensor, tape: Tape) -> tuple[str, bool]:
    """Why a reading is not trusted, "" where it is; and whether that was ever shown by a gradient."""
    key = hashlib.blake2b(repr((*plan.form, x.shape[0], plan.precision, plan.chain.split)).encode()).digest()
    with _lock:
        if tape.hidden:  # what its code took from tensors may be another at each call
            known = {}
        elif isinstance(energy, torch.nn.Module):
            known = _of_modules.setdefault(energy, {})
        elif (code := getattr(energy, "__code__", None)) is not None:
            known = _of_code.setdefault(code, {})
            while len(_of_code) > _MOST_CODE:
                _of_code.popitem(last=False)
        else:
            known = {}
    if key in known:
        return known[key], True
    # In bfloat16 a wrong reading could hide in the rounding: the same graph is compared in float32 first.
    chains: dict[str, GraphChain | GraphPlan] = {} if plan.precision == "fp32" else {"fp32": GraphChain(graph)}
    chains[plan.precision] = plan
    # All of x, since code may go another way by their number; as many as autograd surely has memory for.
    each = 8 * sum(layer.out.channels * layer.out.pixels for layer in graph.layers)
    few, some = (len(x), len(x)) if tape.of_all else (_SAMPLES, max(_SAMPLES, _MOST_BYTES // each))
    for probe in (noise_like(few, x, 0), x[:some]):
        for precision, chain in chains.items():
            reason, shown = _compared(energy, graph, chain, probe, BOUNDS[precision])
            if reason:
                _note(known, key, reason)
                return reason, True
    if shown:
        _note(known, key, "")
    return "", shown


def _note(known: dict[bytes, str], key: bytes, reason: str) -> None:
    known[key] = reason
    with _lock:
        while len(known) > _MOST_FORMS:
            del known[next(iter(known))]


def _compared(
    energy: Any, graph: Graph, chain: GraphChain | GraphPlan, probe: Tensor, bounds: tuple[float, float]
) -> tuple[str, bool]:
    """Why the reading is another function than the energy, on samples other than those it was read on; and whether the
    gradient is large enough to show that it is not."""
    try:
        with frozen_parameters(energy), uncompiled():
            own = AutogradPlan(energy, "plan").gradient(probe)
            before = plain_values(energy)
            again = AutogradPlan(energy, "plan").gradient(probe)
            after = plain_values(energy)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        return f"its own code raises {type(error).__name__}: {' '.join(str(error).split())}", True
    if not torch.equal(own.nan_to_num(), again.nan_to_num()):
        return "its own code gives other gradients when it is asked again", True
    if before != after:
        kind = next((a[0] for a, b in zip(before, after) if a != b), "object")
        return f"its own code moves a number of Python's at every call, as a counter does, in a {kind}", True
    got = chain.gradient(probe)
    finite = torch.isfinite(own)
    if not torch.equal(finite, torch.isfinite(got)):
        return "its gradient is finite at other places than autograd's", True
    if not finite.any():
        return "", False
    difference, size = (own - got)[finite], float(own[finite].norm())
    apart, typical = float(difference.norm()), float(difference.abs().median())
    most, typically = bounds
    if apart <= most * size and typical <= typically * size / difference.numel() ** 0.5:
        return "", size > 0
    if apart <= 1e-6 * float(probe.norm()):
        return "", False
    far = f"{apart / max(size, 1e-30):.2g} away from autograd's, more than {most}"
    if apart <= most * size:
        far = f"off by {typical * difference.numel() ** 0.5 / size:.2g} in half of its elements, more than {typically}"
    return f"its gradient is {far}{_where(graph, probe, own, apart)}", True


def _where(graph: Graph, probe: Tensor, own: Tensor, apart: float) -> str:
    """Whether the layers themselves, in torch, disagree: then it is the reading, else the engine."""
    by_layers = float((gradient_reference(graph, probe).float() - own).norm())
    return " (by its layers, in float64, too)" if by_layers > apart / 2 else " (in the engine)"
