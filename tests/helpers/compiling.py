"""Compile a recorded launch of a Triton kernel for a GPU that need not be here, and read PTX, SASS and resources."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import subprocess

import pytest
import torch

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
}


class Recorder:
    """Stands where the launcher expects its kernel and keeps the arguments of the launch."""

    def __init__(self, kernel):
        self.kernel, self.arguments, self.grid = kernel, None, None

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *args, **kwargs):
        self.arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs


def record(module, launcher, *args, kernel: str | None = None, **kwargs) -> Recorder:
    """The launch that `launcher` makes of `kernel`, named after it unless told; nothing is run."""
    names = [name for name in vars(module) if name.endswith("_kernel")]
    recorders = {name: Recorder(getattr(module, name)) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, recorder in recorders.items():
            patch.setattr(module, name, recorder)
        getattr(module, launcher)(*args, **kwargs)
    return recorders[kernel or f"{launcher.removesuffix('_')}_kernel"]


def specialisation(launch: Recorder) -> tuple[dict, dict, dict, dict]:
    """(signature, constants, attributes, options): what Triton compiles a kernel for, with 16-byte aligned tensors."""
    signature, constants, attributes, options = {}, {}, {}, dict(launch.arguments)
    for i, parameter in enumerate(launch.kernel.params):
        value = options.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], attributes[i,] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            assert parameter.do_not_specialize, f"{parameter.name} would compile anew for 1 and for multiples of 16"
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return signature, constants, attributes, options


@dataclasses.dataclass(frozen=True)
class Built:
    """What the compiler made of a launch."""

    ptx: str
    cubin: pathlib.Path
    tools: pathlib.Path
    shared: int  # bytes, as the others
    registers: int
    stack: int

    @functools.cached_property
    def sass(self) -> list[str]:
        """The instructions, without operands and NOPs. The disassembler takes longer than the compiler."""
        text = _run(self.tools / "nvdisasm", "-c", self.cubin)
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
        return [line for line in lines if not line.startswith("NOP")]


def _run(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def build(launch: Recorder, architecture: int) -> Built:
    """PTX, SASS and resource usage of a recorded launch."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    if not (tools / "cuobjdump").is_file() or not (tools / "nvdisasm").is_file():
        pytest.skip(f"this triton brings no cuobjdump and nvdisasm in {tools}")
    signature, constants, attributes, options = specialisation(launch)
    with knobs.runtime.scope():
        knobs.runtime.interpret = False
        source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = pathlib.Path(knobs.cache.dir) / f"{kernel.hash}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    usage = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", _run(tools / "cuobjdump", "--dump-resource-usage", cubin))
    return Built(
        ptx=kernel.asm["ptx"],
        cubin=cubin,
        tools=tools,
        shared=kernel.metadata.shared,
        registers=int(next(value for name, value in usage if name == "REG")),
        stack=sum(int(value) for name, value in usage if name in ("STACK", "LOCAL")),
    )


def accesses(ptx: str) -> dict[str, int]:
    found = re.findall(r"\b((?:ld|st)\.global)(?:\.\w+::\w+)*((?:\.v\d)?\.[a-z]\d+)", ptx)
    names = [f"{kind}{width}" for kind, width in found]
    return {name: names.count(name) for name in names}


def check_unspilled(kernel: Built) -> None:
    """What spills has a place to spill to."""
    assert kernel.stack == 0


def check_clean(kernel: Built) -> None:
    """No approximate or flushing arithmetic, nothing spilled, registers for full occupancy's half at least."""
    # Triton 3.5 writes its rounded square root as flushing: of 0 or at least 2**-23 that is the same.
    inexact = re.findall(r"\S*\.(?:approx|ftz)\S*", kernel.ptx)
    assert set(inexact) <= {"sqrt.rn.ftz.f32"}
    check_unspilled(kernel)
    assert kernel.registers <= 64
