"""Builds mgebm_fast._C: torch-free C++ (one object an instruction set) and, where a toolkit is found, CUDA.

Environment: MGEBM_CUDA=auto|0|1, MGEBM_CUDA_ARCHS="80;90+PTX", MGEBM_MAX_JOBS, CXX, CUDA_HOME.
Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
DEFAULT_ARCHS = "80;90+PTX"
LOOPS = sorted((CSRC / "ops").rglob("*_cpu.cpp"))

# No contraction and no flush to zero: host and device must round alike. errno and traps would stop vectorisation.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fopenmp -ffp-contract=off -fno-math-errno -fno-trapping-math"
NVCC_FLAGS = "-std=c++17 -O3 -lineinfo -fmad=false -Xcompiler -fPIC,-fvisibility=hidden,-ffp-contract=off"
AVX512 = "-mavx2 -mfma -mf16c -mavx512f -mavx512dq -mavx512bw -mavx512vl -mprefer-vector-width=512"
ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512,
}
# Sets that multiply bfloat16: the chains and the learning step alone have use for them.
BFLOAT_FLAGS = {"avx512bf16": f"{AVX512} -mavx512bf16", "amx": f"{AVX512} -mavx512bf16 -mamx-tile -mamx-bf16"}


def load_stamp():
    """mgebm_fast/stamp.py alone: the package itself needs torch."""
    spec = importlib.util.spec_from_file_location("stamp", ROOT / "mgebm_fast/stamp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ninja_path(path: str | Path) -> str:
    """A path in a build line."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def command(*words: str | Path) -> str:
    """Words in a command or a variable, quoted for the shell."""
    return shlex.join(map(str, words)).replace("$", "$$")


def find_nvcc() -> tuple[str | None, str]:
    """(path of a working nvcc or None, why there is none)."""
    wanted = os.environ.get("MGEBM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"MGEBM_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None, "MGEBM_CUDA=0 was set"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [f"{home}/bin/nvcc" for home in homes if home] + [shutil.which("nvcc")]
    nvcc = next((path for path in candidates if path and os.access(path, os.X_OK)), None)
    reason = "no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda)"
    if nvcc:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cu")
            # Parameters of more than 4 KiB, which nvcc takes from 12.1 on.
            probe.write_text("struct P { char at[9999]; };\n__global__ void probe(const __grid_constant__ P) {}\n")
            words = [nvcc, *NVCC_FLAGS.split(), *target_flags(), "-c", str(probe), "-o", f"{folder}/probe.o"]
            result = subprocess.run(words, capture_output=True, text=True)
        if result.returncode == 0:
            return nvcc, ""
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        reason = f"{nvcc} does not compile a kernel of two lines (12.1 or newer does): {lines[0]}"
    if wanted == "1":
        sys.exit(f"MGEBM_CUDA=1, but {reason}")
    return None, reason


def target_flags() -> list[str]:
    """Host compiler and `-gencode` flags: MGEBM_CUDA_ARCHS=80;90+PTX is code for 80 and 90, and PTX of 90 for later."""
    # nvcc has its own idea of a host compiler; where one was named, it is that one.
    flags = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
    for arch in os.environ.get("MGEBM_CUDA_ARCHS", DEFAULT_ARCHS).replace(",", ";").split(";"):
        match = re.fullmatch(r"(\d+)\.?(\d)?([af]?)(\+PTX)?", arch.strip())
        if not match or int(match[1] + (match[2] or "")) < 80:
            sys.exit(f"MGEBM_CUDA_ARCHS must be a list such as 80;90+PTX, of 80 and newer, got {arch!r}")
        number = (match[1] + match[2] if match[2] else match[1]) + match[3]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[4]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def cuda_library_folder(nvcc: str) -> Path:
    home = Path(nvcc).resolve().parent.parent
    if not any(home.glob("**/libcudart_static.a")):  # a wrapper script stands elsewhere than its toolkit
        home = Path("/usr/local/cuda").resolve()
    found = sorted(home.glob("**/libcudart_static.a"))
    if not found:
        sys.exit(f"CUDA: libcudart_static.a is not below {home}; set CUDA_HOME, or MGEBM_CUDA=0 to build without")
    return found[0].parent


def nvcc_version(nvcc: str) -> str:
    match = re.search(r"release (\S+),", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    return match[1] if match else "unknown"


def bfloat_ops() -> list[str]:
    """The ops of op_table.h that are compiled for the sets that multiply bfloat16 as well."""
    (lines,) = re.findall(r"#define MGEBM_BFLOAT_OPS\(X\) ((?:.*\\\n)*.*)", (CSRC / "op_table.h").read_text())
    return re.findall(r"X\((\w+),", lines)


class NinjaBuild(build_ext):
    """Writes one build.ninja and runs it: each source is compiled once for each instruction set that it serves."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # Kept for editable installs, so that the next one compiles what has changed.
        kept = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        folder = kept if self.editable_mode else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it may be a copy of another checkout's, newer than all objects
        (folder / "build.ninja").write_text(self.ninja_file(target))
        # Two cores a job at most keeps memory in bounds where nvcc runs many at once.
        jobs = os.environ.get("MGEBM_MAX_JOBS") or str(max(1, min(8, os.cpu_count() or 1)))
        if not jobs.isdigit() or int(jobs) < 1:
            sys.exit(f"MGEBM_MAX_JOBS must be a positive integer, got {jobs!r}")
        subprocess.check_call([os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-j", jobs])

    def ninja_file(self, target: Path) -> str:
        nvcc, why_no_cuda = find_nvcc()
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
        if not cxx:
            sys.exit("mgebm_fast needs a C++17 compiler: install g++ or clang++, or set CXX")
        archs = os.environ.get("MGEBM_CUDA_ARCHS", DEFAULT_ARCHS) if nvcc else ""
        defines = ["-DMGEBM_X86"] if x86 else []
        bfloat = x86 and compiles(cxx, BFLOAT_FLAGS["amx"], "#include <immintrin.h>\nint main() {}\n")
        if bfloat:
            defines.append("-DMGEBM_BFLOAT")
        if nvcc:
            defines.append("-DMGEBM_CUDA")
        include_flags = command(f"-I{CSRC / 'include'}", f"-I{CSRC}")
        python_flags = command(f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}")
        facts = {
            "MGEBM_SOURCES": load_stamp().of_sources(CSRC),
            "MGEBM_COMPILER": compiler_name(cxx),
            "MGEBM_CUDA_ARCHS": archs,
            "MGEBM_CUDA_VERSION": nvcc_version(nvcc) if nvcc else "",
            "MGEBM_CUDA_NOTE": why_no_cuda.replace("\\", "/").replace('"', "'"),
        }
        fact_flags = command(*(f'-D{name}="{value}"' for name, value in facts.items()))
        compiler = cxx.replace("$", "$$")  # may hold arguments, such as "ccache g++"

        # $in and $out are quoted by ninja.
        lines = [
            "rule cxx",
            f"  command = {compiler} -MMD -MF $out.d {CXX_FLAGS} {' '.join(defines)} {include_flags} $flags "
            "-c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared -fopenmp -o $out $in $libs",
        ]
        objects = []

        def compile_source(rule: str, source: Path, name: str, flags: str = "") -> None:
            lines.extend([f"build {name}.o: {rule} {ninja_path(source)}", f"  flags = {flags}"])
            objects.append(f"{name}.o")

        compile_source("cxx", CSRC / "bindings.cpp", "bindings", f"{python_flags} {fact_flags}")
        for source in sorted({CSRC / "dispatch.cpp", *(CSRC / "ops").rglob("*.cpp")} - set(LOOPS)):
            compile_source("cxx", source, source.stem)
        for source in LOOPS:
            sets = dict(ISA_FLAGS) if x86 else {"portable": ""}
            if bfloat and source.stem.removesuffix("_cpu") in bfloat_ops():
                sets.update(BFLOAT_FLAGS)
            for isa, flags in sets.items():
                name = f"{source.stem.removesuffix('_cpu')}_{isa}"
                compile_source("cxx", source, name, f"-DMGEBM_ISA={isa} {flags}")
        libs = ""
        if nvcc:
            flags = f"{NVCC_FLAGS} {command(*target_flags())} {include_flags}"
            nvcc_command = f"{command(nvcc)} -MD -MF $out.d {flags} -c $in -o $out"
            lines += ["rule nvcc", f"  command = {nvcc_command}", "  depfile = $out.d"]
            for source in sorted(CSRC.rglob("*.cu")):
                compile_source("nvcc", source, source.stem)
            # Static: the module then loads on machines with no CUDA runtime and no driver.
            libs = f"{command(f'-L{cuda_library_folder(nvcc)}')} -lcudart_static -ldl -lrt -lpthread"
        output = ninja_path(target)
        lines += [f"build {output}: link {' '.join(objects)}", f"  libs = {libs}", f"default {output}"]
        return "\n".join(lines) + "\n"


class RecordSources(build_py):
    """Puts the hash of csrc/ beside the Python files of an installed copy; a checkout has csrc/ itself."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            stamp = load_stamp()
            Path(self.build_lib, "mgebm_fast", stamp.RECORD).write_text(stamp.of_sources(CSRC) + "\n")


def compiles(cxx: str, flags: str, source: str) -> bool:
    """Whether the compiler takes these flags."""
    words = [*cxx.split(), *flags.split(), "-x", "c++", "-fsyntax-only", "-"]
    return subprocess.run(words, input=source, capture_output=True, text=True).returncode == 0


def compiler_name(cxx: str) -> str:
    version = subprocess.run([*cxx.split(), "--version"], capture_output=True, text=True).stdout.splitlines()
    return re.sub(r"[^\w .()+:-]", "", version[0]) if version else cxx


setup(
    ext_modules=[Extension("mgebm_fast._C", sources=[])], cmdclass={"build_ext": NinjaBuild, "build_py": RecordSources}
)
