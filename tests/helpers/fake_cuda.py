"""CUDA without a GPU: fake tensors on "cuda:0", and a log of what the package asks of it.

`world()` makes torch believe in one device. Inside, tensors have shapes, strides and devices but no values
(FakeTensorMode: operators that would mix devices fail as on a GPU); every operator, launch, copy between host and
device and synchronisation becomes an `Event`, with whether a (pretended) capture was running and where the package
asked for it. Kernels are recorded, not run: `World.launches` has an entry for each set of arguments compiled apart.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

PACKAGE = str(Path(__file__).resolve().parents[2] / "mgebm_fast")
KERNELS = ("noise", "langevin_step", "bias_act", "batch_norm_act", "edge_step", "dense_chain")
HEALTHY_STEP = 2**63 - 1  # what an int64 read from the device is: no bad step
# Operators that make views or allocate: no kernel of a GPU runs for them.
VIEWS = {
    "view", "slice", "select", "unbind", "expand", "detach", "empty", "empty_like", "empty_strided", "new_empty",
    "alias", "t", "transpose", "permute", "split", "split_with_sizes", "as_strided", "squeeze", "unsqueeze", "reshape",
    "_unsafe_view", "diagonal", "unfold", "device",
}  # fmt: skip
_READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero")


@dataclasses.dataclass(frozen=True)
class Event:
    kind: str  # "operator", "triton", "native", "copy" (between host and device), "sync", "replay", "capture"
    name: str
    detail: str = ""
    captured: bool = False
    place: str = ""  # file:line of the package
    # Of a launch: its tensors as (shape, bytes), by parameter or "0", "1", …, and the numbers it is compiled with.
    tensors: dict[str, tuple[tuple[int, ...], int]] = dataclasses.field(default_factory=dict, compare=False)
    constants: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def launches(self) -> bool:
        """Whether a kernel runs on the device for it."""
        return self.kind in ("triton", "native") or (self.kind == "operator" and self.name.split(".")[1] not in VIEWS)


@dataclasses.dataclass
class Launch:
    """A launch of a Triton kernel: what `helpers.compiling.build` compiles."""

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__


class World:
    """The pretended device: its log, its launches, and whether it captures."""

    def __init__(self, processors: int = 132) -> None:
        self.processors = processors
        self.events: list[Event] = []
        self.launches: dict[tuple, Launch] = {}
        self.capturing = False
        self.streams = itertools.count(1)
        self.current = [Stream(self)]
        self.fail_captures = False
        self.archs = ""  # what the native module was built for

    def note(
        self, kind: str, name: str, detail: str = "", tensors: dict[str, Any] | None = None, **constants: Any
    ) -> None:
        place = _place() if kind in ("copy", "sync") else ""
        sizes = {role: (tuple(t.shape), t.numel() * t.itemsize) for role, t in (tensors or {}).items()}
        self.events.append(Event(kind, name, detail, self.capturing, place, sizes, constants))

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PACKAGE):
            return f"{frame.filename.removeprefix(PACKAGE + '/')}:{frame.lineno}"
    return "?"


def illegal(events: list[Event]) -> list[Event]:
    """What a real capture refuses: synchronisations and copies between host and device."""
    return [event for event in events if event.captured and event.kind in ("sync", "copy")]


def count(events: list[Event], kind: str) -> int:
    return sum(event.kind == kind for event in events)


class Stream:
    def __init__(self, world: World, device: Any = None) -> None:
        self.world, self.device = world, torch.device("cuda", 0)
        self.cuda_stream = next(world.streams)

    def wait_stream(self, other: Stream) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return object()

    def synchronize(self) -> None:
        self.world.note("sync", "Stream.synchronize")


class _Graph:
    def __init__(self, world: World) -> None:
        self.world, self.body = world, []

    def replay(self) -> None:
        self.world.note("replay", "graph", f"{sum(event.launches for event in self.body)} launches")


class _Capture:
    """torch.cuda.graph, with its habit of leaving its own stream current where the body fails."""

    def __init__(self, world: World, graph: _Graph, pool: Any = None, stream: Any = None, **options: Any) -> None:
        self.world, self.graph, self.stream = world, graph, stream

    def __enter__(self) -> None:
        self.world.note("sync", "torch.cuda.graph")
        self.start, self.world.capturing = len(self.world.events), True
        self.world.note("capture", "begin", "" if self.stream is None else f"stream {self.stream.cuda_stream}")
        self.before = self.world.current[-1]
        self.world.current[-1] = self.stream

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.world.capturing = False
        self.graph.body = self.world.events[self.start :]
        if kind is None and self.world.fail_captures:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if kind is None:
            self.world.current[-1] = self.before


class _Kernel:
    """Stands for a Triton kernel: checks a launch as the driver would, and records it."""

    def __init__(self, kernel: Any, world: World) -> None:
        self.kernel, self.world = kernel, world
        self.name = kernel.__name__

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            sizes = tuple(grid) if isinstance(grid, (tuple, list)) else (grid,)
            assert len(sizes) <= 3 and all(isinstance(n, int) and n > 0 for n in sizes), (self.name, sizes)
            assert sizes[0] < 2**31 and all(n < 2**16 for n in sizes[1:]), (self.name, sizes)
            key: list[Any] = [self.name]
            for parameter in self.kernel.params:
                value = arguments[parameter.name]
                if isinstance(value, torch.Tensor):
                    assert value.device.type == "cuda", f"{self.name}: {parameter.name} lies on {value.device}"
                    key.append((parameter.name, value.dtype))
                else:
                    key.append((parameter.name, value if parameter.is_constexpr else type(value)))
            options = {name: value for name, value in arguments.items() if name not in self.kernel.arg_names}
            tensors = {role: value for role, value in arguments.items() if isinstance(value, torch.Tensor)}
            constants = {role: value for role, value in arguments.items() if role not in tensors}
            self.world.note("triton", self.name.removesuffix("_kernel"), str(sizes), tensors, **constants)
            shape = tuple((*key, *sorted(options.items())))
            if shape not in self.world.launches:
                # Of a tensor a launch is compiled for its dtype alone; fake ones end with their world.
                with fake_tensor.unset_fake_temporarily():
                    kept = {
                        k: torch.empty(0, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
                        for k, v in arguments.items()
                    }
                self.world.launches[shape] = Launch(self.kernel, kept, sizes)

        return launch


class _Native:
    """The compiled module with its CUDA launchers recorded; the rest is as it is."""

    def __init__(self, module: Any, world: World) -> None:
        self._module, self._world = module, world

    def __getattr__(self, name: str) -> Any:
        if name == "cuda_archs":  # "": as in a build without CUDA
            return lambda: self._world.archs
        if name.endswith("_cuda"):
            return lambda *arguments: self._world.note("native", name.removesuffix("_cuda"))
        return getattr(self._module, name)


class _Log(TorchDispatchMode):
    """Every operator on the device, as events; reads of numbers give those of a healthy chain."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled in it, and the wrapper that says so costs more than most operators

    def __torch_dispatch__(self, operator: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = str(operator), kwargs or {}
        given = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name.startswith(_READS) and all(isinstance(tensor, FakeTensor) for tensor in given):
            if any(tensor.device.type == "cuda" for tensor in given):
                self.world.note("sync", name)
            dtype = given[0].dtype
            return True if dtype == torch.bool or "equal" in name else HEALTHY_STEP if dtype == torch.int64 else 1.0
        if name.startswith("aten._fused_"):  # in place; with rates as tensors they have no fake kernel
            self.world.note("operator", name)
            return None
        made = operator(*args, **kwargs)
        if name.startswith("aten.convolution") and given[0].is_contiguous(memory_format=torch.channels_last):
            # As cuDNN does. Fake tensors ask the libraries of this build, which may be one without CUDA.
            made = torch.utils._pytree.tree_map_only(torch.Tensor, _channels_last, made)
        results = [leaf for leaf in torch.utils._pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in (*given, *results)}
        if "cuda" in devices:
            kind = "operator"
            if "cpu" in devices and _moves(name, given, results):
                kind = "copy"
            distinct = {id(tensor): tensor for tensor in (*given, *results)}.values()
            tensors = {str(place): tensor for place, tensor in enumerate(distinct)}
            self.world.note(kind, name, ", ".join(f"{tuple(t.shape)}" for t in results[:2]), tensors)
        return made


def _channels_last(made: torch.Tensor) -> torch.Tensor:
    return made.contiguous(memory_format=torch.channels_last) if made.dim() == 4 else made


def _moves(name: str, given: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
    """Whether host memory is read or written for an operator; 0-dim CPU operands go as arguments of the launch."""
    copies = ("aten._to_copy", "aten.copy", "aten.lift_fresh", "aten._copy_from", "aten._pin_memory")
    if name.startswith(copies):
        return True
    return any(tensor.device.type == "cpu" and tensor.dim() > 0 for tensor in (*given, *results))


_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using Guard = c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>;
c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, new Guard());
}
"""


@functools.cache
def _guard_devices() -> None:
    """Give torch a guard of CUDA devices that does nothing; builds without CUDA have none, and cannot index or copy."""
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler: torch without CUDA needs a device guard built")
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        subprocess.run(
            [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{root / 'include'}", source, "-o", library,
             f"-L{root / 'lib'}", "-lc10"],
            check=True, timeout=120,
        )  # fmt: skip
        ctypes.CDLL(str(library))


@contextlib.contextmanager
def world(processors: int = 132) -> Iterator[World]:
    """Inside, "cuda" is a device whose tensors are fake and whose work is logged; put back afterwards."""
    from mgebm_fast import native

    pretended = World(processors)
    cuda = torch.cuda
    _guard_devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_tensor, "init_gpu_context", lambda *_: None, raising=False)
        for name, value in {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_properties": lambda *_: types.SimpleNamespace(
                multi_processor_count=processors, total_memory=1 << 37, shared_memory_per_block_optin=232448
            ),
            "Stream": lambda device=None, **_: Stream(pretended, device),
            "Event": lambda **_: object(),
            "stream": lambda stream: _on(pretended, stream),
            "set_stream": lambda stream: pretended.current.__setitem__(-1, stream),
            "current_stream": lambda *_: pretended.current[-1],
            "device": lambda *_: contextlib.nullcontext(),
            "graph": lambda graph, **options: _Capture(pretended, graph, **options),
            "CUDAGraph": lambda: _Graph(pretended),
            "graph_pool_handle": lambda: object(),
            "is_current_stream_capturing": lambda: pretended.capturing,
            "synchronize": lambda *_: pretended.note("sync", "torch.cuda.synchronize"),
            "empty_cache": lambda: None,
        }.items():
            patch.setattr(cuda, name, value)
        # Chains of a kernel a layer, whether or not the CUDA kernels were built.
        patch.setenv("MGEBM_RESIDENT", "0")
        patch.setattr(native, "_module", _Native(native._module, pretended))
        for name in KERNELS:
            module = importlib.import_module(f"mgebm_fast.kernels.{name}")
            for attribute in [attribute for attribute in vars(module) if attribute.endswith("_kernel")]:
                patch.setattr(module, attribute, _Kernel(getattr(module, attribute), pretended))
            operation = sys.modules[f"mgebm_fast.ops.{name}"]
            if hasattr(operation, "past_dispatcher"):  # a mode listens here, and launches are what is watched
                patch.setattr(operation, "past_dispatcher", lambda *_: True)
        for name in ("gradient.plan", "gradient.stack", "gradient.builder", "sampling.running", "sampling.corrected"):
            # Fake tensors, which the package refuses elsewhere, are the plain ones here.
            patch.setattr(importlib.import_module(f"mgebm_fast.{name}"), "why_not_plain", lambda tensor: "")
        # A stack is trusted once its gradient is the energy's own, of which fake tensors know nothing.
        patch.setattr(importlib.import_module("mgebm_fast.gradient.plan"), "why_not_trusted", lambda *_: "")
        _patch_tensors(patch, pretended)
        _forget()
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), _Log(pretended):
                yield pretended
        finally:
            _forget()


def _forget() -> None:
    """What the package remembers of devices: a fake tensor must not outlive its world."""
    from mgebm_fast.ops import backend, edge_step

    backend.why_no_triton.cache_clear()
    edge_step.places_on.cache_clear()


@contextlib.contextmanager
def _on(pretended: World, stream: Stream) -> Iterator[None]:
    pretended.current.append(stream)
    try:
        yield
    finally:
        pretended.current.pop()


def _patch_tensors(patch: pytest.MonkeyPatch, pretended: World) -> None:
    """What fake tensors refuse and real ones on a GPU can do: addresses, lists, numbers taken to the device."""
    address = torch.Tensor.data_ptr

    def data_ptr(self: torch.Tensor) -> int:
        if not isinstance(self, FakeTensor):
            return address(self)
        return (self.untyped_storage()._cdata & ~511) + self.storage_offset() * self.element_size()

    def tolist(self: FakeTensor) -> Any:
        if self.device.type == "cuda":
            pretended.note("sync", "Tensor.tolist")
        made: Any = 1.0
        for length in reversed(self.shape):
            made = [made] * length
        return made

    patch.setattr(torch.Tensor, "data_ptr", data_ptr)
    patch.setattr(FakeTensor, "tolist", tolist)
    patch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self)
    for name in ("as_tensor", "tensor"):
        patch.setattr(torch, name, _taken_over(getattr(torch, name), name, pretended))


def _taken_over(make: Any, name: str, pretended: World) -> Any:
    def taken(value: Any, *arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda" or isinstance(value, torch.Tensor):
            return make(value, *arguments, device=device, **options)
        host = make(value, *arguments, **options)
        pretended.note("copy", f"torch.{name}")
        return torch.empty(host.shape, dtype=host.dtype, device=device)

    return taken


def to_cuda(module: torch.nn.Module) -> torch.nn.Module:
    """A module with its parameters and buffers fake and on the device."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = torch.empty_like(parameter, device="cuda")
                part._parameters[name] = torch.nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device="cuda")
    return module


def tally(events: list[Event]) -> dict[str, int]:
    """How many kernels of each name run on the device for these events."""
    return dict(collections.Counter(event.name for event in events if event.launches))
