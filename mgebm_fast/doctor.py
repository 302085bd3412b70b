"""What was built, what is usable on this machine, and why the rest is not and how to get it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import __version__

REBUILD = "pip install --force-reinstall --no-deps ."
LIBRARIES = ("torch", "numpy", "pillow", "safetensors", "scikit-learn", "scikit-image", "tensorboard")
# package: (what it is for, how to get it)
OPTIONAL = {
    "triton": ("Triton kernels on NVIDIA GPUs", 'pip install "mgebm_fast[triton]"'),
    "torchvision": ("torchvision's image sets, --data torchvision:NAME", 'pip install "mgebm_fast[vision]"'),
    "torch-fidelity": ("FID and KID in Inception features", 'pip install "mgebm_fast[inception]"'),
    "arviz": ("ESS and split R-hat of mgebm diagnose", 'pip install "mgebm_fast[diagnostics]"'),
    "matplotlib": ("plots of mgebm diagnose", 'pip install "mgebm_fast[diagnostics]"'),
    "pytest": ("the tests", 'pip install -e ".[test]"'),
}


def examine() -> dict[str, Any]:
    """The whole report, in plain JSON types. Nothing is changed on the machine, and no GPU memory is taken."""
    return {
        "package": {"version": __version__, "path": str(Path(__file__).resolve().parent)},
        "system": _system(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "native": _native(),
        "cuda": _cuda(),
        "triton": _triton(),
        "ops": _ops(),
        "optional": {
            name: {"version": _version(name), "purpose": purpose, "install": how}
            for name, (purpose, how) in OPTIONAL.items()
        },
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith("MGEBM_")},
        "cache": _cache(),
    }


def render(report: dict[str, Any]) -> str:
    """The report as text: one line a fact, `+` usable, `-` not."""
    system, native, cuda, triton = (report[key] for key in ("system", "native", "cuda", "triton"))
    package = report["package"]
    lines = [
        f"mgebm_fast {package['version']} in {package['path']}",
        f"Python {system['python']}, {system['platform']}, {system['cpu']}, {system['cores']} cores",
        "libraries: " + ", ".join(f"{name} {version or 'missing'}" for name, version in report["libraries"].items()),
        "",
        "native C++ (CPU)",
        _line(native["usable"], f"compiled module, {native['compiler']}", native["why_not"], native["how"]),
    ]
    for level in native["levels"]:
        mark = " (in use)" if level["name"] == native["level"] else ""
        lines.append(_line(level["usable"], f"{level['name']}{mark}", level["why_not"], ""))
    if native["usable"]:
        lines.append(_line(True, f"OpenMP, {system['threads']} threads (--threads, OMP_NUM_THREADS)", "", ""))
    lines += ["", "native CUDA"]
    built = f"kernels for {cuda['archs']}, toolkit {cuda['toolkit']}" if cuda["built"] else "kernels"
    lines.append(_line(cuda["built"], built, cuda["why_not_built"], cuda["how_to_build"]))
    for device in cuda["devices"]:
        name, capability = device["name"], device["capability"]
        lines.append(f"  + cuda:{device['index']} {name}, sm_{capability}, {device['memory_gib']} GiB")
    lines.append(_line(cuda["usable"], "usable on this machine", cuda["why_not"], cuda["how"]))
    name = f"triton {triton['version']}" if triton["version"] else "triton"
    lines += ["", "Triton", _line(triton["usable"], name, triton["why_not"], triton["how"])]
    lines += ["", "ops: backends that can be named here (auto takes the first)"]
    for name, devices in report["ops"].items():
        lines.append(
            f"  {name}: " + "; ".join(f"{device}: {', '.join(version)}" for device, version in devices.items())
        )
    lines += ["", "optional packages"]
    for name, entry in report["optional"].items():
        version = entry["version"]
        lines.append(_line(bool(version), f"{name} {version or '(missing)'}: {entry['purpose']}", "", entry["install"]))
    cache = report["cache"]
    lines += ["", f"cache of decoded images: {cache['path'] or 'off'}, {cache['mib']} MiB (MGEBM_CACHE)"]
    if report["environment"]:
        lines.append("environment: " + ", ".join(f"{name}={value}" for name, value in report["environment"].items()))
    return "\n".join(lines)


def _line(usable: bool, what: str, why_not: str, how: str) -> str:
    if usable:
        return f"  + {what}"
    return f"  - {what}" + (f": {why_not}" if why_not else "") + (f" → {how}" if how else "")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _system() -> dict[str, Any]:
    import torch

    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown CPU"


def _native() -> dict[str, Any]:
    from . import native

    why_not = native.why_not()
    if why_not:
        how = "" if native.stale else REBUILD + " (needs g++ or clang++)"
        return {"usable": False, "why_not": why_not, "how": how, "compiler": "", "level": None, "levels": []}
    module = native.module()
    return {
        "usable": True, "why_not": "", "how": "", "compiler": module.compiler(), "level": native.isa(),
        "levels": _levels(module),
    }  # fmt: skip


def _levels(module: Any) -> list[dict[str, Any]]:
    """Which instruction sets were built, and which of them this CPU has."""
    chosen = module.isa()
    levels = []
    for name in module.isas():
        usable = bool(module.set_isa(name))
        why_not = "" if usable else "built, but this CPU does not have it"
        levels.append({"name": name, "usable": usable, "why_not": why_not})
    module.set_isa(chosen)
    return levels


def _cuda() -> dict[str, Any]:
    import torch

    from . import native

    built = not native.why_not() and bool(native.module().cuda_archs())
    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    how = how_to_build = ""
    if not built:
        how_to_build = f"install the CUDA toolkit (nvcc), then MGEBM_CUDA=1 {REBUILD}"
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists()
        if torch.version.cuda is None:
            how = "install a CUDA build of torch, as pytorch.org's selector shows" + (
                "" if driver else ", on a machine with an NVIDIA GPU and its driver"
            )
        else:
            how = "an NVIDIA GPU that is visible (CUDA_VISIBLE_DEVICES) and " + (
                "a driver that is new enough for this torch" if driver else "its driver"
            )
    why_not_built = ""
    if not built:
        why_not_built = native.why_not() or native.module().cuda_note()
    archs = native.module().cuda_archs() if built else ""
    why_not = native.why_no_cuda()
    missing = [device["capability"] for device in devices if built and not covers(archs, device["capability"])]
    if missing and not why_not:
        why_not = f"built for {archs}, which does not cover sm_{missing[0]}"
        how = f'MGEBM_CUDA_ARCHS="{archs};{missing[0]}" {REBUILD}'
    return {
        "built": built,
        "archs": archs,
        "toolkit": native.module().cuda_version() if built else "",
        "why_not_built": why_not_built,
        "how_to_build": how_to_build,
        "torch_cuda": torch.version.cuda,
        "devices": devices,
        "usable": not why_not,
        "why_not": why_not,
        "how": how or how_to_build,
    }


def covers(archs: str, capability: str) -> bool:
    """Whether kernels built for `archs` ("80;90+PTX") run on a GPU of compute capability `capability` ("86").

    Code for sm_XY runs on X.Y and later minors of the same major; PTX on everything from its architecture on.
    """
    for arch in archs.replace(",", ";").replace(".", "").split(";"):
        number = int("".join(filter(str.isdigit, arch)) or 0)
        later = int(capability) >= number
        if later and (arch.strip().endswith("+PTX") or number // 10 == int(capability) // 10):
            return True
    return False


def _triton() -> dict[str, Any]:
    from .ops.backend import why_no_triton

    why_not, found = why_no_triton(), _version("triton")
    how = "a GPU that torch can use, as above" if why_not else ""
    if importlib.util.find_spec("triton") is None:  # not `found is None`: other distributions may hold it too
        why_not, how = "not installed", OPTIONAL["triton"][1]
    return {"version": found, "usable": not why_not, "why_not": why_not, "how": how}


def _ops() -> dict[str, dict[str, list[str]]]:
    """Backends of every op that can be named on this machine's devices, the one that `auto` takes first."""
    import torch

    from . import native
    from .ops import backend

    if native.stale:  # `auto` is an error then
        return {}
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    usable: dict[str, dict[str, list[str]]] = {}
    for op in backend.TABLE:
        usable[op] = {}
        for device in devices:
            order = ("native", "triton", "reference")
            usable[op][device] = [name for name in order if not backend.unavailable(op, name, torch.device(device))]
    return usable


def _cache() -> dict[str, Any]:
    from .data.store import cache_folder

    folder = cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder and folder.is_dir() else 0
    return {"path": str(folder) if folder else None, "mib": round(size / 2**20, 1)}
