"""docs/gpu.md: the kernels of a Langevin step on a GPU with bytes, FLOP and predicted time, beside measured ones.

    python scripts/gpu_model.py                  writes the page's tables; needs Triton and nvcc, no GPU; two minutes
    python scripts/gpu_model.py compact:8:132    prints those of one chain

Kernels are those that the package launches: chains run on fake CUDA tensors (tests/helpers/fake_cuda.py), and what a
captured step launches is counted. What the resident chain does is read off the tables that its kernel is given; what
the compiler made of it, off nvcc. A prediction is the largest of a few times, as the page says; none is a measurement.
Measured ones come from bench/results/<device>/, where a GPU has been: a step's from chains.csv (`mgebm bench chains
--csv`), a kernel's from kernels.csv (scripts/gpu_profile.py).
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import shutil
import subprocess
import sys
import tempfile
import unittest.mock
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

import torch  # noqa: E402
from gpu_placements import placement_section, statistics_section  # noqa: E402
from gpu_predictions import (  # noqa: E402
    BACKWARD,
    BARRIER,
    COMPACT,
    EXCHANGE,
    FORWARD,
    GAP,
    GPUS,
    GRID_BARRIER,
    H100,
    H200,
    L2_TRIP,
    LEAST,
    NARROW,
    NORMALS,
    PRODUCT,
    PUBLISHED,
    RESIDUAL,
    SHARED,
    STREAM,
    WARP_PRODUCT,
    Chain,
    Gpu,
    phases,
    resident_step,
    stack_of,
)  # fmt: skip
from helpers import fake_cuda  # noqa: E402

from mgebm_fast.benchmarks.cases import cases  # noqa: E402
from mgebm_fast.gradient import dense  # noqa: E402
from mgebm_fast.gradient.stack import Stack  # noqa: E402
from mgebm_fast.ops.conv_chain import resident  # noqa: E402
from mgebm_fast.ops.conv_chain.resident_layout import Layout  # noqa: E402
from mgebm_fast.sampling import Langevin  # noqa: E402
from mgebm_fast.tables import markdown  # noqa: E402

PAGE, RESULTS = ROOT / "docs/gpu.md", ROOT / "bench/results"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a launch moves and computes, and which share of each rate it is expected to reach."""

    name: str
    moved: float  # bytes of memory
    flop: float = 0.0
    rate: float = 1.0  # share of the matrix rate
    l2: float = 0.0  # bytes of L2
    clocks: float = 0.0  # of a resident or dense kernel

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Microseconds, by what they are spent on."""
        return {
            "memory": self.moved / (STREAM * gpu.copy) * 1e6,
            "L2": self.l2 / gpu.l2 * 1e6,
            "products": self.flop / (self.rate * gpu.matrix) * 1e6,
            "clocks": gpu.microseconds(self.clocks),
            "launch": LEAST,
        }

    def predicted(self, gpu: Gpu) -> float:
        return max(self.times(gpu).values()) + GAP

    def bound(self, gpu: Gpu) -> str:
        times = self.times(gpu)
        return max(times, key=lambda name: times[name])


# What each Triton kernel reads and writes of its tensors; one that is changed in place is moved twice.
_MOVED = {
    "edge_step": ("x", "x", "upstream"),
    "batch_norm_act": ("z", "out"),
    "batch_norm_act_apply": ("z", "out"),
    "batch_norm_act_sums": ("grad", "z", "out"),
    "batch_norm_act_backward": ("grad", "z", "out"),
    "bias_act": ("z", "out", "mask"),
    "bias_act_backward": ("grad", "kept", "out"),
    "dense_chain": ("x", "x"),
}


def captured_step(chain: Chain, *, one_kernel: bool = True) -> list[fake_cuda.Event]:
    """The launches of one step in a captured chain of several; with batch statistics also without `dense_chain`."""
    found, least = [], dense.LEAST_COUPLED_SPLIT if one_kernel else sys.maxsize
    with fake_cuda.world(), unittest.mock.patch.object(dense, "LEAST_COUPLED_SPLIT", least):
        for steps in (chain.steps, chain.steps + 1):
            with torch._subclasses.fake_tensor.unset_fake_temporarily():
                net = chain.net()
            found.append(_captured(fake_cuda.to_cuda(net), chain, steps))
    short, long = ([(event.name, event.detail) for event in events] for events in found)
    length = len(long) - len(short)
    if not length:
        return [event for event in found[1] if event.name == "dense_chain"]
    start = next(i for i in range(len(long)) if long[i : i + length] == long[i + length : i + 2 * length])
    return found[1][start : start + length]


def _captured(net: Any, chain: Chain, steps: int) -> list[fake_cuda.Event]:
    x = torch.rand(chain.batch, 3, chain.size, chain.size, device="cuda")
    law = Langevin(steps, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))
    logged = _log()
    for _ in range(2):
        logged.take()
        law(net, x, seed=1, precision="fp16")
    return [event for event in logged.take() if event.captured and event.launches]


def _log() -> fake_cuda.World:
    return torch.cuda.current_stream().world  # type: ignore[attr-defined]


def kernel_of(event: fake_cuda.Event) -> Kernel:
    """What a launch moves and computes. KeyError for a Triton kernel that is not known here."""
    sizes = event.tensors
    if event.kind == "triton":
        absent = {"mask": event.name == "bias_act" and not event.constants["MASKED"],
                  "grad": bool(event.constants.get("HEAD")),
                  "out": event.constants.get("APPLY") is False}  # fmt: skip
        moved = sum(sizes[role][1] for role in _MOVED[event.name] if not absent.get(role))
        if event.name == "edge_step":
            return _edge(event, moved)
        if event.name == "dense_chain":
            return _dense(event, moved)
        return _single(event, moved) if event.constants.get("APPLY") else Kernel(event.name, moved)
    name = event.name.removeprefix("aten.").rpartition(".")[0]
    moved = sum(size for _, size in sizes.values())
    if name not in ("convolution", "convolution_backward"):
        return Kernel(f"{name} {_shape(sizes['0'][0])}", moved)
    # Forward: map, weight, result; backward: dE/d(result), map that gives the shape alone, weight, dE/d(map).
    backward = name == "convolution_backward"
    weight = sizes["2" if backward else "1"][0]
    top = sizes["0" if backward else "2"][0]
    if backward:
        moved -= sizes["1"][1]
    rate = BACKWARD if backward else NARROW if weight[1] <= 8 else FORWARD
    arrow = f"{weight[0]} → {weight[1]}" if backward else f"{weight[1]} → {weight[0]}"
    label = f"{'data gradient' if backward else 'convolution'} {arrow}, {_shape(weight[2:])}, {_shape(top[2:])} pixels"
    return Kernel(label, moved, 2.0 * top[0] * math.prod(top[2:]) * math.prod(weight), rate)


def _single(event: fake_cuda.Event, moved: float) -> Kernel:
    """Statistics or sums and what is made of them, by a program for some channels, which reads its part twice."""
    numbers = event.constants
    reads = 1 if event.name == "batch_norm_act" or numbers["HEAD"] else 2
    share = numbers["COLUMNS"] / numbers["channels"] * event.tensors["z"][1]
    return Kernel(event.name, moved, clocks=(2 * reads + 1) * share / (H200.l2 / H200.processors / H200.clock))


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes))


def _edge(event: fake_cuda.Event, moved: float) -> Kernel:
    """The data gradient of the first convolution, in tiles padded to COLUMNS, and the update."""
    numbers = event.constants
    taps = numbers["TAPS_H"] * numbers["TAPS_W"]
    rows = math.prod(numbers[name] for name in ("TILE_N", "TILE_H", "TILE_W"))
    programs = math.prod(int(n) for n in re.findall(r"\d+", event.detail))
    flop = 2.0 * programs * rows * taps * numbers["OUT_CHANNELS"] * numbers["COLUMNS"]
    return Kernel("edge_step", moved, flop, WARP_PRODUCT, l2=taps * event.tensors["upstream"][1])


def _dense(event: fake_cuda.Event, moved: float) -> Kernel:
    """A step of the dense chain: each layer up and down is a phase that blocks of a tile exchange through L2."""
    numbers = event.constants
    weights = [numbers[f"P{layer}"] * numbers[f"P{layer + 1}"] for layer in range(numbers["LAYERS"])]
    flop = 2 * 2.0 * numbers["samples"] * sum(weights)
    tiles = -(-numbers["samples"] // numbers["ROWS"])
    l2 = 2 * 2.0 * tiles * sum(weights)
    clocks = 2 * numbers["LAYERS"] * EXCHANGE + NORMALS
    if coupled := sum(numbers[f"SITES{layer}"] > 0 for layer in range(1, 5)):
        # Up and down all programs wait for each other, with nothing to do in between, and then read what the layer
        # holds and the numbers of all tiles, some at a time.
        trips = 1 + -(-tiles // numbers["TILES"])
        clocks += (2 * coupled * GRID_BARRIER * 1e-6 + l2 / H200.l2) * H200.clock + 2 * coupled * trips * L2_TRIP
    return Kernel("dense_chain", moved / numbers["steps"], flop, WARP_PRODUCT, l2, clocks)


# nvcc: what it says of conv_chain_kernel; shared memory of a block
ARCHITECTURES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}


def compiled(architecture: str) -> tuple[str, str, str]:
    """(registers, bytes of stack, bytes spilled) of the resident kernel."""
    flags = re.search(r'NVCC_FLAGS = "([^"]*)"', (ROOT / "setup.py").read_text())[1].split()  # type: ignore[index]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    source = ROOT / "csrc/ops/conv_chain/conv_chain_cuda.cu"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [nvcc, *flags, "-cubin", f"-arch={architecture}", "-Xptxas", "-v", f"-I{ROOT / 'csrc/include'}",
             f"-I{ROOT / 'csrc'}", source, "-o", f"{folder}/code.cubin"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    said = done.stdout + done.stderr
    stack, stored = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said).groups()  # type: ignore[union-attr]
    return re.search(r"Used (\d+) registers", said)[1], stack, stored  # type: ignore[index]


# The page


def rows_of(chain: Chain, results: Path, file: str) -> list[tuple[str, dict[str, str]]]:
    """(GPU, row) of the cases of `mgebm bench` that are this chain."""
    known = {case.name: (case.variant, case.sizes) for case in cases(("chains",), device="cuda", full=True)}
    found = []
    for path in sorted(results.glob(f"*/{file}")):
        with open(path, encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                same = known.get(row["case"]) == (chain.variant, (chain.size,))
                if same and (row["norm"], row["batch"]) == (chain.norm, str(chain.batch)):
                    found += [(gpu.name, row) for gpu in GPUS if gpu.name in row["device"]]
    return found


def measured(chain: Chain, results: Path = RESULTS, *, resident_plan: bool = False) -> dict[str, float]:
    """GPU -> microseconds of a step that was measured on it, of the resident chain or of another plan."""
    return {
        gpu: 1e3 * float(row["ms"])
        for gpu, row in rows_of(chain, results, "chains.csv")
        if row["contender"] == "mgebm_auto"
        and row["status"] == "ok"
        and resident_plan == ("gradient: resident" in row["explain"])
    }


def measured_kernels(chain: Chain, kernels: Sequence[Kernel], results: Path = RESULTS) -> dict[str, list[float]]:
    """GPU -> microseconds of each of these kernels, where its launches can be told apart."""
    launches: dict[str, list[tuple[str, float]]] = {}
    for gpu, row in rows_of(chain, results, "kernels.csv"):
        launches.setdefault(gpu, []).append((row["kernel"], float(row["us"])))
    found = {gpu: attributed([kernel.name for kernel in kernels], rows) for gpu, rows in launches.items()}
    return {gpu: times for gpu, times in found.items() if times}


def attributed(kernels: Sequence[str], launches: Sequence[tuple[str, float]]) -> list[float]:
    """Microseconds of each kernel of a step, by the launches on a GPU; [] where they do not match.

    The package's own are found by name. Between two of them is a convolution of the library, which may be several
    launches, and other operators of PyTorch, one launch each.
    """
    times: list[float] = []
    waiting: list[str] = []  # of the library, since the last own kernel
    at = 0
    for name in kernels:
        if name not in _MOVED:
            waiting.append(name)
            continue
        here = next((i for i in range(at, len(launches)) if launches[i][0] == f"{name}_kernel"), None)
        if here is None:
            return []
        between = [time for _, time in launches[at:here]]
        several = [i for i, other in enumerate(waiting) if other.startswith(("convolution ", "data gradient "))]
        extra = len(between) - len(waiting)
        if extra < 0 or len(several) > 1 or (extra and not several):
            return []
        for i in range(len(waiting)):
            count = 1 + extra if i in several else 1
            times.append(sum(between[:count]))
            between = between[count:]
        times.append(launches[here][1])
        waiting, at = [], here + 1
    return [] if waiting or at < len(launches) else times


def measured_cell(chain: Chain, results: Path, *, resident_plan: bool = False) -> str:
    found = measured(chain, results, resident_plan=resident_plan)
    return "; ".join(f"{name} {time:.1f}" for name, time in found.items()) or "not measured"


@dataclasses.dataclass(frozen=True)
class Section:
    """The table of a chain's kernels, and its line of the first table."""

    text: str
    row: list[str]


def section(chain: Chain, results: Path = RESULTS, *, one_kernel: bool = True) -> Section:
    """The plan of a chain, kernel by kernel."""
    kernels = [kernel_of(event) for event in captured_step(chain, one_kernel=one_kernel)]
    known = measured_kernels(chain, kernels, results)
    rows = [
        [
            kernel.name, f"{kernel.moved / 1e6:.2f}", f"{kernel.flop / 1e9:.2f}",
            *(f"{kernel.predicted(gpu):.1f}" for gpu in GPUS), kernel.bound(H200),
            *(f"{times[i]:.1f}" for times in known.values()),
        ]
        for i, kernel in enumerate(kernels)
    ]  # fmt: skip
    totals = [sum(kernel.predicted(gpu) for kernel in kernels) for gpu in GPUS]
    shares = [chain.flop() / (total * 1e-6) / gpu.matrix for total, gpu in zip(totals, GPUS, strict=True)]
    figures = [f"{total:.0f}" for total in totals]
    moved, flop = sum(kernel.moved for kernel in kernels), sum(kernel.flop for kernel in kernels)
    rows.append(
        [
            "all",
            f"{moved / 1e6:.2f}",
            f"{flop / 1e9:.2f}",
            *figures,
            "",
            *(f"{sum(times):.0f}" for times in known.values()),
        ]
    )
    heads = ["kernel", "MB", "GFLOP", *(f"{gpu.name}, µs" for gpu in GPUS), "bound by",
             *(f"measured on {gpu}, µs" for gpu in known)]  # fmt: skip
    text = f"### {chain.title}\n\n{markdown(heads, rows)}\n"
    percent = [f"{100 * share:.0f} %" for share in shares]
    row = [chain.title, str(len(kernels)), *figures, " / ".join(percent), measured_cell(chain, results)]
    return Section(text, row)


def resident_section(chains: Sequence[Chain], results: Path = RESULTS) -> str:
    """Steps of the resident chain, and the phases that they are made of."""
    rows, tables = [], []
    for chain in chains:
        stack = stack_of(chain)
        if reason := resident.why_not(stack.stages):
            rows.append([chain.title, *["–"] * 5, reason])
            continue
        layout, time = resident_step(stack, chain.batch)
        share = chain.flop() / (time * 1e-6) / H100.matrix
        rows.append(
            [chain.title, str(layout.samples), f"{layout.image_bytes / 1024:.0f}", f"{layout.shared_bytes / 1024:.0f}",
             f"{time:.1f}", f"{100 * share:.0f} %", measured_cell(chain, results, resident_plan=True)]
        )  # fmt: skip
        if not stack.has_shortcuts:
            tables += [[chain.title if not i else "", phase.name, str(phase.products), f"{phase.loaded / 1024:.0f}",
                        f"{phase.clocks:.0f}"] for i, phase in enumerate(phases(layout))]  # fmt: skip
    heads = ["chain", "samples a block", "weights and tables, KiB", "shared memory, KiB", "predicted µs a step",
             "of the matrix rate", "measured µs a step"]  # fmt: skip
    parts = ["chain", "phase", "products", "operands, KiB", "clocks"]
    between = "A step of the nets without shortcuts, phase by phase, of a block:"
    return f"{markdown(heads, rows)}\n\n{between}\n\n{markdown(parts, tables)}\n"


def most_samples(stack: Stack, shared_bytes: int) -> str:
    """How many chains the shared memory of a block takes, at most."""
    fitting = [n for n in range(1, resident.MAX_SAMPLES + 1) if Layout(stack.stages, n).shared_bytes <= shared_bytes]
    return str(max(fitting)) if fitting else "does not fit"


def compiler_section(chains: Sequence[Chain]) -> str:
    stacks = [stack_of(chain) for chain in chains]
    rows = [
        [architecture, *compiled(architecture), f"{shared >> 10}", *(most_samples(stack, shared) for stack in stacks)]
        for architecture, shared in ARCHITECTURES.items()
    ]
    sizes = [f"{chain.variant} {chain.size}×{chain.size}" for chain in chains]
    heads = ["architecture", "registers", "stack, bytes", "spilled, bytes", "shared memory of a block, KiB", *sizes]
    return f"{markdown(heads, rows)}\n"


CONSTANTS = [
    ("copy", f"{H100.copy / 1e12:.1f} TB/s on an H100, {H200.copy / 1e12:.1f} on an H200", "90 % of the data sheets"),
    ("kernels bound by memory", f"{STREAM:.0%} of copy", "assumed"),
    ("matrix rate", f"{H200.matrix / 1e12:.0f} TFLOP/s, 16 bits", "80 % of the data sheet, as large products reach"),
    ("convolutions of cuDNN", f"{FORWARD:.0%} of it; {NARROW:.0%} from 8 channels", "assumed"),
    ("its data gradients", f"{BACKWARD:.0%} of it", "assumed"),
    ("products by mma.sync", f"{WARP_PRODUCT:.1%} of it; {PRODUCT} clocks between two of a sum", "microbenchmarks"),
    ("L2", f"{H200.l2 / 1e12:.1f} TB/s; {L2_TRIP} clocks", "microbenchmarks"),
    ("shared memory", f"{SHARED} bytes a clock and processor", "the architecture"),
    ("barrier of a block", f"{BARRIER} clocks", "microbenchmarks: 120 to 150"),
    ("barrier of all blocks", f"{GRID_BARRIER} µs", "reported: 1 to 1.5"),
    ("noise and update", f"{NORMALS} instructions for four pixels", "counted in compiled code"),
    ("a kernel", f"{LEAST} µs at least, {GAP} µs to the next node of a graph", "assumed"),
    ("processors", f"{H100.processors} at {H100.clock / 1e9:.2f} GHz", "the clock of the data sheet's matrix rate"),
]
HEADS = ["constant", "taken as", "from"]
COUPLED = PUBLISHED[2]  # at 4×4
OWN_RATES = (0.3, 0.4, 0.5, 0.6)  # of the matrix rate


def summary(sections: Sequence[Section]) -> str:
    heads = ["chain", "kernels a step", *(f"{gpu.name}, µs a step" for gpu in GPUS), "of the matrix rate, H100 / H200",
             "measured µs a step"]  # fmt: skip
    return markdown(heads, [one.row for one in sections])


def with_statistics_inside(kernels: Sequence[Kernel], rate: float) -> list[Kernel]:
    """The kernels of a step with batch statistics, were its convolutions ours: at `rate` of the matrix rate each would
    normalise what it reads and leave the sums of what it writes. Going back it would read two maps more, for a' and the
    normalised values of the layer above and of its own. Sums at the top stay a pass of their own."""
    maps = [one.moved / 2 if one.clocks else one.moved for one in kernels if one.name == "batch_norm_act"]
    made, above = [], len(maps) - 1
    for one in kernels:
        if one.name.startswith("convolution"):
            made.append(dataclasses.replace(one, rate=rate))
        elif one.name.startswith("data gradient"):
            more = maps[above] + maps[above - 1]
            made.append(dataclasses.replace(one, rate=rate, moved=one.moved + more))
            above -= 1
        elif one.name == "edge_step":
            made.append(dataclasses.replace(one, moved=one.moved + maps[0]))
        elif not one.name.startswith("batch_norm_act"):
            made.append(one)
    return [*made, Kernel("sums at the top", maps[-1])]


def inside_section(gpu: Gpu = H100) -> str:
    rows = []
    for chain in PUBLISHED:
        if chain.size == COUPLED.size:
            continue
        kernels = [kernel_of(event) for event in captured_step(chain)]
        ways = [kernels, *(with_statistics_inside(kernels, rate) for rate in OWN_RATES)]
        rows.append([chain.title, *(f"{sum(one.predicted(gpu) for one in way):.0f}" for way in ways)])
    heads = ["chain", "library convolutions and passes between them, µs a step",
             *(f"our convolutions at {rate:.0%}" for rate in OWN_RATES)]  # fmt: skip
    return f"{markdown(heads, rows)}\n"


def coupled_section() -> str:
    layerwise, written = (float(section(COUPLED, one_kernel=one).row[2]) for one in (False, True))
    return statistics_section(COUPLED, layerwise, written)


def page(text: str) -> str:
    """The page with its tables made again: what stands between `<!-- name -->` and `<!-- end -->`."""
    sections = [section(chain) for chain in [*PUBLISHED, *COMPACT]]
    kernels = [one.text for chain, one in zip([*PUBLISHED, *COMPACT], sections, strict=True) if chain.batch <= 132]
    tables = {
        "constants": markdown(HEADS, CONSTANTS), "chains": summary(sections),
        "resident": resident_section([*COMPACT, *RESIDUAL]), "placements": placement_section(COMPACT[-1]),
        "statistics": coupled_section(), "inside": inside_section(),
        "compiler": compiler_section([*COMPACT[:-1], *RESIDUAL[:-1]]), "kernels": "\n".join(kernels),
    }  # fmt: skip
    for name, table in tables.items():
        between = re.compile(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        assert between.search(text), f"the page has no place for {name}"
        text = between.sub(lambda _, table=table: f"\n{table.strip()}\n\n", text, count=1)  # type: ignore[misc]
    return text


def main(names: Sequence[str]) -> None:
    if not names:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        print(PAGE.relative_to(ROOT))
    for name in names:
        variant, size, batch = name.split(":")
        chain = Chain(variant, int(size), int(batch))
        if chain.variant != "residual":
            print(section(chain).text)
        if chain.norm == "none":
            print(resident_section([chain]))


if __name__ == "__main__":
    main(sys.argv[1:])
