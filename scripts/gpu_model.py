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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from helpers import fake_cuda  # noqa: E402

from mgebm_fast.benchmarks.cases import cases  # noqa: E402
from mgebm_fast.benchmarks.work import macs_inside  # noqa: E402
from mgebm_fast.gradient.stack import Stack, read  # noqa: E402
from mgebm_fast.nets import multigrid_net  # noqa: E402
from mgebm_fast.ops.conv_chain import resident  # noqa: E402
from mgebm_fast.ops.conv_chain.resident_layout import WARPS, Layout  # noqa: E402
from mgebm_fast.sampling import Langevin  # noqa: E402
from mgebm_fast.tables import markdown  # noqa: E402

PAGE, RESULTS = ROOT / "docs/gpu.md", ROOT / "bench/results"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as the predictions take it. Rates of the data sheet, but for the shares named on the page."""

    name: str
    copy: float  # bytes a second
    matrix: float = 790e12  # FLOP a second, 16 bits, dense
    l2: float = 5.5e12  # bytes a second
    processors: int = 132
    clock: float = 989e12 / (132 * 4096)  # Hz; a processor's matrix units make 4,096 FLOP a clock

    def microseconds(self, clocks: float) -> float:
        return clocks / self.clock * 1e6


H100, H200 = Gpu("H100", 0.9 * 3.35e12), Gpu("H200", 0.9 * 4.8e12)
GPUS = (H100, H200)
GAP, LEAST = 1.2, 2.0  # microseconds: between two nodes of a graph; of the shortest kernel
STREAM, FORWARD, BACKWARD, NARROW, WARP_PRODUCT = 0.8, 0.7, 0.6, 0.35, 0.629  # shares of a rate
BARRIER, PRODUCT, NORMALS, SHARED, L2_TRIP = 135, 24, 240, 128, 263  # clocks, but SHARED: bytes a clock


@dataclasses.dataclass(frozen=True)
class Chain:
    """A chain of a net, at a batch."""

    variant: str
    size: int
    batch: int
    steps = 3

    @property
    def norm(self) -> str:
        return "batch" if self.variant == "B" else "none"

    @property
    def title(self) -> str:
        kind = "published" if self.variant == "B" else self.variant
        return f"{kind} {self.size}×{self.size}, batch {self.batch}"

    def net(self) -> Any:
        return multigrid_net(self.size, 3, norm=self.norm, variant=self.variant)

    def flop(self) -> int:
        """Of a step: the forward pass and the data gradient, without products with the zeros around maps."""
        return 2 * 2 * self.batch * macs_inside(self.net())


PUBLISHED = [Chain("B", size, batch) for batch in (128, 1056) for size in (64, 16, 4)]
COMPACT = [Chain("compact", size, 132) for size in (2, 4, 8, 16, 32)]
RESIDUAL = [Chain("residual", size, 132) for size in (2, 4, 8, 16)]


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


def captured_step(chain: Chain) -> list[fake_cuda.Event]:
    """The launches of one step in a captured chain of several."""
    found = []
    with fake_cuda.world():
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
    phases = 2 * numbers["LAYERS"]
    clocks = phases * (3 * L2_TRIP + BARRIER) + NORMALS
    return Kernel("dense_chain", moved / numbers["steps"], flop, WARP_PRODUCT, l2, clocks)


# The resident chain


@dataclasses.dataclass(frozen=True)
class Phase:
    """What a block does between two barriers."""

    name: str
    products: int = 0  # of matrices of 16 × 16 and 16 × 8
    loaded: int = 0  # bytes of operands, from shared memory
    busiest: float = 0.0  # clocks of the warp that has most to do

    @property
    def clocks(self) -> float:
        return max(self.products / WARP_PRODUCT, self.loaded / SHARED, self.busiest) + BARRIER


def phases(layout: Layout) -> list[Phase]:
    """Those of a step, from the tables that the kernel is given."""
    layers = range(len(layout.stages))
    quads = -(-math.prod(layout.shape) // 4) * layout.samples
    rounds = -(-quads // (32 * WARPS))  # of all threads; a quarter of the warps shares a scheduler
    update = Phase("update", busiest=NORMALS * min(WARPS // 4, -(-quads // 128)) * rounds)
    return [
        *(_phase(layout, f"forward {i + 1}", i, False) for i in layers),
        *(_phase(layout, f"backward {i + 1}" if i else "edge", i, True) for i in reversed(layers)),
        update,
    ]


def _phase(layout: Layout, name: str, index: int, backward: bool) -> Phase:
    words, part, edge = dict(layout.tables), layout.parts[index], name == "edge"
    _, tile_rows, first_tap, _, first_output = layout.stages[index][backward][:5]
    depth = part.out_chunks if backward else part.in_chunks
    columns = -(-layout.shape[0] // 8) if edge else part.in_chunks if backward else part.out_chunks
    pairs = 1 if edge else 2
    taps, outputs = words[first_tap], words[first_output]
    products = loaded = unit = 0
    busy = [0.0] * WARPS
    for one in range(len(taps) - 1):
        count, rows = taps[one + 1] - taps[one], (outputs[one + 1] - outputs[one]) * layout.samples
        deep = -(-count // 2) if depth == 1 else count * depth // 2
        for first in range(0, rows, tile_rows):
            tiles = 2 if tile_rows > 16 and rows - first > 16 else 1
            for _ in range(-(-columns // (2 * pairs))):
                products += deep * tiles * 2 * pairs
                loaded += deep * (tiles + pairs) * 512
                # A sum waits for the one before; four schedulers share the matrix units.
                busy[unit % WARPS] += deep * max(PRODUCT, tiles * 2 * pairs * 4 / WARP_PRODUCT)
                unit += 1
    return Phase(name, products, loaded, max(busy))


def stack_of(chain: Chain) -> Stack:
    found = read(chain.net(), torch.zeros(2, 3, chain.size, chain.size), blocks=True)
    assert isinstance(found, Stack), found
    return found


def resident_step(stack: Stack, batch: int, gpu: Gpu = H100) -> tuple[Layout, float]:
    """The layout that the plan chooses, and the microseconds of a step of all samples."""
    layout = Layout(stack.stages, resident.best_samples(stack.stages, batch))
    waves = math.ceil(math.ceil(batch / layout.samples) / gpu.processors)
    return layout, waves * gpu.microseconds(sum(phase.clocks for phase in phases(layout)))


# What a block cannot hold: where the weights of the largest stages could lie instead

CLUSTER_TRIP, LARGE = 180, 64 << 10  # clocks of a load from another block's shared memory; bytes of a large stage


@dataclasses.dataclass(frozen=True)
class Placement:
    """One way to place a net whose weights and maps exceed a block's shared memory; of a sample's step."""

    name: str
    shared: float  # bytes of a block
    over: float  # bytes that a block receives from L2 or from others' shared memory
    clocks: float
    at_once: int  # samples

    def row(self, batch: int, gpu: Gpu = H100) -> list[str]:
        fits = self.shared <= resident.H100.shared_bytes
        time = math.ceil(batch / self.at_once) * gpu.microseconds(self.clocks)
        return [self.name, f"{self.shared / 1024:.0f}{'' if fits else ', too much'}", f"{self.over / 1024:.0f}",
                str(self.at_once), f"{time:.0f}" if fits else "–"]  # fmt: skip


def placements(stack: Stack, gpu: Gpu = H100) -> list[Placement]:
    """In a cluster, whose blocks share a sample: small stages by pixels, with all their weights; large ones by output
    channels, whose blocks need the whole map below and add up what each has of its gradient. By a block alone: the
    weights of large stages from L2, by tiles of 32 rows."""
    layout, rate = Layout(stack.stages, 1), gpu.l2 / gpu.processors / gpu.clock
    weights = [16.0 * len(part.swizzle) for part in layout.parts]
    maps = [16.0 * part.out_chunks * math.prod(stage.out_size) for part, stage in zip(layout.parts, stack.stages)]
    large = [i for i, size in enumerate(weights) if size > LARGE]
    rest = layout.shared_bytes - sum(weights) - sum(maps)
    steps, found = phases(layout), []
    for blocks in (4, 8):
        own = (blocks - 1) / blocks
        whole = {i - 1 for i in large}
        shared = rest / blocks + sum(w / blocks if i in large else w for i, w in enumerate(weights))
        shared += sum(m if i in whole else m / blocks for i, m in enumerate(maps))
        shared += 2 * max(maps[i] for i in whole) / blocks  # where one block's share of such sums arrives
        # Up: the map below; down: partial sums of its gradient in float32, and that gradient where all need it.
        over = own * sum(maps[i] + 2 * maps[i] + (maps[i] if i in large else 0) for i in whole)
        products = sum((phase.clocks - BARRIER) / blocks for phase in steps)
        clocks = products + over / rate + (len(steps) + len(large)) * (BARRIER + 2 * CLUSTER_TRIP)
        found.append(Placement(f"a cluster of {blocks}", shared, over, clocks, gpu.processors // blocks))
    shared = layout.shared_bytes - sum(weights[i] for i in large)
    of_large = [phase for phase in steps if any(phase.name.endswith(f"ward {i + 1}") for i in large)]
    tiles = [
        (-(-math.prod(stack.stages[i].out_size) // 32), -(-math.prod(stack.stages[i].in_size) // 32)) for i in large
    ]
    for name, over in (
        ("weights from L2, once a phase", sum(2 * weights[i] for i in large)),
        ("weights from L2, once a tile", sum(sum(both) * weights[i] for both, i in zip(tiles, large))),
    ):
        others = sum(phase.clocks for phase in steps if phase not in of_large)
        clocks = others + max(over / rate, sum(phase.clocks for phase in of_large))
        found.append(Placement(name, shared, over, clocks, gpu.processors))
    return found


def placement_section(chain: Chain) -> str:
    heads = ["", "shared memory of a block, KiB", "received by a block, KiB a step of a sample", "samples at a time",
             "predicted µs a step"]  # fmt: skip
    return f"{markdown(heads, [one.row(chain.batch) for one in placements(stack_of(chain))])}\n"


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


def section(chain: Chain, results: Path = RESULTS) -> Section:
    """The layer-wise plan of a chain, kernel by kernel."""
    kernels = [kernel_of(event) for event in captured_step(chain)]
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
    ("noise and update", f"{NORMALS} instructions for four pixels", "counted in compiled code"),
    ("a kernel", f"{LEAST} µs at least, {GAP} µs to the next node of a graph", "assumed"),
    ("processors", f"{H100.processors} at {H100.clock / 1e9:.2f} GHz", "the clock of the data sheet's matrix rate"),
]
HEADS = ["constant", "taken as", "from"]


def summary(sections: Sequence[Section]) -> str:
    heads = ["chain", "kernels a step", *(f"{gpu.name}, µs a step" for gpu in GPUS), "of the matrix rate, H100 / H200",
             "measured µs a step"]  # fmt: skip
    return markdown(heads, [one.row for one in sections])


def page(text: str) -> str:
    """The page with its tables made again: what stands between `<!-- name -->` and `<!-- end -->`."""
    sections = [section(chain) for chain in [*PUBLISHED, *COMPACT]]
    kernels = [one.text for chain, one in zip([*PUBLISHED, *COMPACT], sections, strict=True) if chain.batch <= 132]
    tables = {
        "constants": markdown(HEADS, CONSTANTS), "chains": summary(sections),
        "resident": resident_section([*COMPACT, *RESIDUAL]), "placements": placement_section(COMPACT[-1]),
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
