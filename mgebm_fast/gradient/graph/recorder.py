"""An energy read as a graph of layers, by running its own code once on a few samples and watching torch's ops.

What does not depend on x, as a weight divided by its spectral norm, is taken as the tensor that the code computed: a
reading holds for the weights and the Python values of the moment, and a plan reads again when it is refreshed. Code
whose path depends on x, that is random, or that writes into its own tensors is not read.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ...ops.graph_chain.graph import Graph
from ...ops.state import why_not_plain
from ..builder import Unreadable
from ..holding import frozen_parameters
from ..reach import modules_of
from ..trust import GLOBAL_HOOKS, HOOKS
from .cost import why_slow
from .flat import as_features
from .rewrites import Rewrites
from .rules import RULES, read
from .rules.choices import TRUTHS
from .tape import Tape, Taping, key_of, tensors_in
from .values import ChannelsLast, GraphBuilder, Value

_SAMPLES = 3
# Ops whose first result alone is the layer's.
_SEVERAL = ("native_", "_native_", "cudnn_batch_norm", "_batch_norm", "max_pool", "log_sigmoid_forward")


def read_graph(energy: Callable[[Tensor], Tensor], x: Tensor, tapes: list[Tape] | None = None) -> Graph | str:
    """The graph of `energy` for tensors like x (N, ...) float32 on the CPU; or the reason, with the module and the op,
    why it cannot be read as one. Only x's shape is used. `tapes` takes how its constants were computed.

    It is read on three samples; on N where it holds constants with a row a sample (labels, targets), which then stand
    in the graph, or where its code runs with no other number of samples.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() < 2 or x.shape[1:].numel() == 0:
        return f"a graph is read for float32 x (N, …) on the CPU, got {x.dtype} {tuple(x.shape)} on {x.device.type}"
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return "it is traced or transformed"
    if torch.is_autocast_enabled("cpu"):
        return "torch.autocast is on"
    if reason := _hooked(energy):
        return reason
    recorder = _Recorder(energy, noise_like(_SAMPLES, x, 1))
    found, of_all = _read(energy, recorder)
    if of_all and len(x) not in (0, _SAMPLES):
        recorder = _Recorder(energy, noise_like(len(x), x, 1))
        found, _ = _read(energy, recorder)
    recorder.tape.of_all = of_all
    if tapes is not None:
        tapes.append(recorder.tape)
    return found


def _read(energy: Callable[[Tensor], Tensor], recorder: _Recorder) -> tuple[Graph | str, bool]:
    """The graph, or why not; and whether it is to be read on as many samples as x has."""
    rewrites = Rewrites(recorder.depends, recorder.refuse)
    try:
        with (
            _without_warnings(), uncompiled(), torch.inference_mode(False), frozen_parameters(energy),
            torch.enable_grad(), recorder, rewrites,
        ):  # fmt: skip
            out = energy(recorder.probe)
        recorder.tape.hidden = rewrites.hidden
        return recorder.finish(out), recorder.by_sample
    except Unreadable as reason:
        return str(reason), recorder.by_sample
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if recorder.reason:
            return recorder.reason, False
        said = " ".join(str(error).split())[:200]
        return f"its own code raises {type(error).__name__} on {len(recorder.probe)} samples: {said}", True


_warnings = threading.Lock()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """As of a target with other rows than the few samples. Filters of warnings are of all threads: one changes them."""
    if not _warnings.acquire(blocking=False):
        yield
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _warnings.release()


def uncompiled() -> Any:
    """A context in which what torch.compile wrapped runs as it was written: its compiler would take up the reading's
    code too."""
    if "torch._dynamo" not in sys.modules:  # whose import takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def noise_like(samples: int, x: Tensor, seed: int) -> Tensor:  # -> (samples, ...) float32, on the CPU
    """Normal draws of x's sample shape, whatever torch's default dtype and device are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *x.shape[1:], generator=generator, dtype=torch.float32, device="cpu")


def _hooked(energy: Any) -> str:
    """Why modules run code of the user's around their own, which a chain of native steps would not run."""
    if any(getattr(nn.modules.module, name, None) for name in GLOBAL_HOOKS):
        return "hooks are registered for all modules"
    for module in modules_of(energy):
        for name in HOOKS:
            for hook in (getattr(module, name, None) or {}).values():
                # The weight and spectral norms of torch.nn.utils compute weights in a hook.
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    return f"{type(module).__name__} has hooks"
    return ""


# Ops whose result does not depend on what x holds.
LIKE = frozenset("empty_like zeros_like ones_like full_like new_empty new_zeros new_ones new_full".split())


class _Recorder(TorchDispatchMode):
    """Adds a layer for each op on a tensor that depends on x."""

    def __init__(self, energy: Any, x: Tensor) -> None:
        super().__init__()
        # As autograd's: code may ask whether its argument requires a gradient.
        self._energy, self.probe = energy, x.requires_grad_()
        self._builder = GraphBuilder(x, as_map=x.dim() > 2)
        # Values by where their tensor lies in memory: autograd may hand out another object for the same tensor.
        self._values: dict[tuple, Value | ChannelsLast | str] = {key_of(x): self._builder.x}
        self._kept: list[Any] = [x]  # so that no memory is given out twice
        self._made: set[int] = {x.untyped_storage()._cdata}  # storages of tensors that ops made meanwhile
        self._tracked: set[tuple] = {key_of(x)}  # keys of tensors that autograd follows
        self.reason = ""
        self.tape = Tape()

    @property
    def by_sample(self) -> bool:
        """Whether constants with a row a sample were met."""
        return self._builder.by_sample

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled while this listens, and torch would import its compiler to say so (seconds)."""
        return False

    def finish(self, out: Any) -> Graph:
        if self.reason:  # the energy's own code caught the refusal and went on another way
            raise Unreadable(self.reason)
        samples = self._builder.samples
        if not isinstance(out, Tensor) or tuple(out.shape) != (samples,) or out.dtype != torch.float32:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise Unreadable(f"it returns {got} for {samples} samples")
        self._check_followed(out, "what it returns")
        value = self._values.get(key_of(out))
        if not isinstance(value, Value):
            raise Unreadable(value if isinstance(value, str) else "what it returns does not depend on x by torch's ops")
        builder = self._builder
        builder.name = "the energy"
        value = builder.features(value)
        if value.held.channels != 1:
            raise Unreadable(f"it returns {value.held.channels} numbers a sample")
        if not builder.layers or value.index != len(builder.layers):
            builder.pointwise(value, "power", 1)
        with Taping(self.tape):
            graph = as_features(builder.graph())
            if reason := why_slow(graph, builder.matrices):
                raise Unreadable(reason)
            return graph.folded()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        try:
            self._refuse(func, args, kwargs)
            before = self._before(func, args, kwargs)
            out = func(*args, **kwargs)
            self._note(func, before, kwargs, out)
        except Unreadable as reason:
            self.refuse(str(reason))
        return out

    def refuse(self, reason: str) -> NoReturn:
        self.reason = self.reason or self._located(reason)
        raise Unreadable(self.reason) from None

    def depends(self, tensor: Any) -> bool:
        """Whether a tensor depends on x."""
        return isinstance(tensor, Tensor) and key_of(tensor) in self._values

    def _check_followed(self, tensor: Tensor, what: str) -> None:
        followed = tensor.requires_grad and (tensor is self.probe or not tensor.is_leaf)
        if not followed and key_of(tensor) in self._tracked:
            raise Unreadable(f"{what} is of a detached tensor: its gradient stops there")

    def _refuse(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Before an op runs: what would leave a trace outside of the reading, or hides from autograd."""
        name = func._schema.name.split("::")[1]
        tensors = tensors_in((args, kwargs))
        if torch.Tag.nondeterministic_seeded in func.tags and name not in ("dropout", "feature_dropout"):
            raise Unreadable(f"{name} is random")
        written = [
            value
            for argument, value in (*zip(func._schema.arguments, args, strict=False), *_named_arguments(func, kwargs))
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(t.untyped_storage()._cdata not in self._made for t in tensors_in(written)):
            raise Unreadable(f"{name} writes into a tensor that was there before")
        for tensor in tensors:
            self._check_followed(tensor, name)

    def _before(self, func: Any, args: tuple, kwargs: dict) -> tuple:
        """The arguments, with a copy of a constant that the op writes numbers of x into."""
        if not func._schema.is_mutable or not isinstance(args[0], Tensor) or key_of(args[0]) in self._values:
            return args
        if any(key_of(t) in self._values for t in tensors_in((args, kwargs))):
            with Taping(self.tape):
                return args[0].clone(), *args[1:]
        return args

    def _note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        name = func._schema.name.split("::")[1]
        tensors, made = tensors_in((args, kwargs)), tensors_in(out)
        found = [self._values.get(key_of(t)) for t in tensors]
        self._made |= {t.untyped_storage()._cdata for t in made} - {t.untyped_storage()._cdata for t in tensors}
        if all(value is None for value in found):
            self.tape.note(func, args, kwargs, out)
            return
        if not torch.is_grad_enabled():
            raise Unreadable(f"{name} runs without gradients (torch.no_grad, or a custom autograd.Function)")
        if reason := next((value for value in found if isinstance(value, str)), None):
            if name != "detach" and any(t.is_floating_point() for t in made):  # autograd detaches what it saves
                raise Unreadable(reason)
            self._values.update(
                dict.fromkeys(map(key_of, made), reason)
            )  # as the indices of a pool, which are reshaped
            self._kept.append(out)
            return
        inplace = func._schema.is_mutable
        plain = name.rstrip("_") if inplace and not name.startswith("_") else name
        same = plain == "eq" and len(found) == 2 and isinstance(found[0], Value) and found[0] == found[1]
        if plain in LIKE or same:  # of x's shape alone; or asks for NaN, as torch.distributions do
            self.tape.fresh(out)
            return
        kind = torch.bool if plain in TRUTHS else torch.float32
        if plain in RULES and made and made[0].dtype != kind:
            raise Unreadable(f"{name} gives {made[0].dtype}, and the engine computes in float32")
        if plain not in RULES:
            raise Unreadable(f"{name} is of no kind that the engine reads")
        builder = self._builder
        count = sum(layer.name.startswith(f"{plain} ") for layer in builder.layers)
        builder.name = f"{plain} {count + 1}"
        with Taping(self.tape), torch.device("cpu"):  # whatever torch's default device is
            rule_args, rule_kwargs = tree_map_only(Tensor, self._constant_or_value, (args, kwargs))
            first = out[0] if plain.startswith(_SEVERAL) else out
            try:
                results = read(builder, plain, first, rule_args, rule_kwargs)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
                raise Unreadable(f"{name} has arguments that the engine does not read") from error
        if inplace:
            self._forget_views(made[0])
        self._kept.append(out)
        values = results if isinstance(results, list) else [results]
        for place, tensor in enumerate(made):
            known = values[place] if place < len(values) else f"a second result of {name} is used"
            shape = tuple(tensor.shape)
            if isinstance(known, (Value, ChannelsLast)) and shape != known.tensor_shape(builder.samples):
                raise Unreadable(f"{builder.name} gives {shape} for {builder.samples} samples")
            self._values[key_of(tensor)] = known
            if tensor.is_floating_point() and any(t.requires_grad for t in tensors):
                self._tracked.add(key_of(tensor))

    def _constant_or_value(self, tensor: Tensor) -> Any:
        value = self._values.get(key_of(tensor))
        if value is not None:
            return value
        if tensor.dtype not in (torch.float32, torch.int64, torch.bool) or why_not_plain(tensor):
            raise Unreadable(f"{self._builder.name} has a constant that is {tensor.dtype}, {why_not_plain(tensor)}")
        return tensor.detach()

    def _forget_views(self, written: Tensor) -> None:
        """After an op in place other views of its memory hold what no layer gave."""
        storage, own = written.untyped_storage()._cdata, key_of(written)
        for key in self._values:
            if key[0] == storage and key != own:
                self._values[key] = "a view of a tensor that was changed in place is used"

    def _located(self, reason: str) -> str:
        """With the module in whose forward it happened."""
        names = {id(m): path for path, m in _named(self._energy)}
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in names:
                path = names[id(owner)]
                return (
                    f"{reason}, in {path} ({type(owner).__name__})" if path else f"{reason}, in the net's own forward"
                )
            frame = frame.f_back
        return reason


def _named(energy: Any) -> Iterable[tuple[str, nn.Module]]:
    if isinstance(energy, nn.Module):
        return energy.named_modules()
    return ((f"{type(module).__name__}", module) for module in modules_of(energy))


def _named_arguments(func: Any, kwargs: dict) -> list[tuple[Any, Any]]:
    return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]
