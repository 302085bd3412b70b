"""The machine code and PTX of the CUDA kernels: of the installed module, or compiled here where it was built without.

A module that does not fit its sources is refused on import, so what it holds is what the sources say.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from mgebm_fast import native

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {path.stem: path for path in sorted((ROOT / "csrc/ops").rglob("*_cuda.cu"))}


@dataclasses.dataclass
class Code:
    """What the compiler made of one source."""

    frames: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # architecture -> bytes, one a kernel
    ptx: str = ""


def _tool(name: str) -> str | None:
    triton = importlib.util.find_spec("triton")
    folders = [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    folders += [f"{folder}/backends/nvidia/bin" for folder in (triton and triton.submodule_search_locations) or ()]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(folders))


def compile_cuda(source: Path, output: Path) -> None:
    """As setup.py does, for sm_90 with its PTX. Warnings are errors."""
    flags = re.search(r'NVCC_FLAGS = "([^"]*)"', (ROOT / "setup.py").read_text())[1].split()
    flags += ["-fatbin", "-Werror=all-warnings", "-gencode", "arch=compute_90,code=[sm_90,compute_90]"]
    command = [_tool("nvcc"), *flags, f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc'}", source, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def code_of(stem: str) -> Code:
    """Of csrc/ops/**/<stem>.cu."""
    dump = _tool("cuobjdump")
    if dump is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with Triton")
    if native.available() and native.module().cuda_archs():
        return _read(dump, native.module().__file__).get(stem, Code())
    if _tool("nvcc") is None:
        pytest.skip("a module without CUDA, and no nvcc here")
    with tempfile.TemporaryDirectory() as folder:
        compile_cuda(SOURCES[stem], Path(folder, "code.fatbin"))
        found = _read(dump, f"{folder}/code.fatbin")
    assert list(found) == [stem]
    return found[stem]


@functools.cache
def _read(dump: str, file: str) -> dict[str, Code]:
    """Source -> its code; what holds no kernel is left out."""
    found: dict[str, Code] = {}
    for what in ("--dump-resource-usage", "--dump-ptx"):
        text = subprocess.run([dump, what, file], capture_output=True, text=True, check=True).stdout
        for section in re.split(r"^Fatbin ", text, flags=re.MULTILINE):
            source = re.search(r"^identifier = .*?(\w+)\.cu$", section, re.MULTILINE)
            if source is None:
                continue
            frames = [int(a) + int(b) for a, b in re.findall(r"STACK:(\d+) .*?LOCAL:(\d+)", section)]
            if frames:
                found.setdefault(source[1], Code()).frames[re.search(r"arch = (\w+)", section)[1]] = frames
            elif ".entry" in section:
                found.setdefault(source[1], Code()).ptx += section
    return found
