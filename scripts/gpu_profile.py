"""How long each kernel of a Langevin step takes on a GPU: one row a kernel, for docs/gpu.md and gpu_tables.py.

    python scripts/gpu_profile.py FILE              the chains of `mgebm bench --list` that are of one net
    python scripts/gpu_profile.py FILE 16-128 4     these

A chain is captured, and one replay of it is recorded. Its steps are told apart by their last kernel, `edge_step`; a
kernel's time is the median over them. Where one launch makes all steps its time is divided by their number.
"""

from __future__ import annotations

import csv
import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from mgebm_fast.benchmarks.cases import Case, cases
from mgebm_fast.benchmarks.timing import device_name
from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import Langevin

COLUMNS = ("case", "batch", "norm", "device", "place", "kernel", "us")
STEPS = 12
WHOLE = ("conv_chain_kernel", "dense_chain_kernel")  # make all steps of a chain


def short(name: str) -> str:
    """A kernel's name without its type, template arguments and parameters."""
    return re.split(r"[<(]", name.replace("(anonymous namespace)::", "").removeprefix("void "))[0][-80:]


def of_a_step(launches: Sequence[tuple[str, float]], steps: int) -> list[tuple[str, float]]:
    """(kernel, microseconds) of a step, from those of a whole call in their order. ValueError where none is found."""
    for name, time in launches:
        if name.endswith(WHOLE):
            return [(name, time / steps)]
    ends = [i for i, (name, _) in enumerate(launches) if name == "edge_step_kernel"]
    found = [launches[a + 1 : b + 1] for a, b in zip(ends, ends[1:], strict=False)]
    if not found:
        raise ValueError(f"no two launches of edge_step among {len(launches)}")
    (names, _), *_ = Counter(tuple(name for name, _ in step) for step in found).most_common(1)
    alike = [step for step in found if tuple(name for name, _ in step) == names]
    return [(name, statistics.median(step[i][1] for step in alike)) for i, name in enumerate(names)]


def launches_of(case: Case) -> list[tuple[str, float]]:
    """Every kernel and copy of one call, by the time at which it began."""
    (size,) = case.sizes
    net = multigrid_net(size, norm=case.norm, variant=case.variant, seed=size).cuda()
    x = torch.rand(case.batch, 3, size, size, device="cuda") * 255
    law = Langevin(STEPS, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))
    for _ in range(3):
        law(net, x, seed=1)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        law(net, x, seed=1)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(short(event.name), event.time_range.elapsed_us()) for event in events]


def main(path: Path, names: Sequence[str]) -> None:
    chosen = cases(("chains",), device="cuda", only=names, full=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for case in (case for case in chosen if len(case.sizes) == 1):
            try:
                found = of_a_step(launches_of(case), STEPS)
            except Exception as error:  # the others are still worth having
                print(f"{case.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
                continue
            place = (case.name, case.batch, case.norm, device_name("cuda"))
            writer.writerows((*place, i, kernel, f"{time:.3f}") for i, (kernel, time) in enumerate(found))
            file.flush()
            print(f"{case.name}: {len(found)} kernels, {sum(time for _, time in found):.1f} us a step", flush=True)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
