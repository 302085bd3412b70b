"""First contact with a GPU: every op, plan and graph path against float64 or the CPU, one line a check.

    python scripts/gpu_smoke.py                 all groups, each in a process of its own, side by side
    python scripts/gpu_smoke.py ops graphs      these groups, here
    DEVICE=cpu python scripts/gpu_smoke.py      the same over references and C++ loops: that the script itself runs
    SMALL=1 python scripts/gpu_smoke.py edge    with few samples, for the memory checker

A group is a process because an error of CUDA stays with its process, and because most of the time is Triton compiling.
What fails is printed with its shapes and the rest goes on; lines are also appended to $OUT/results.jsonl. Exit status:
0 where every check held.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mgebm_fast import ops
from mgebm_fast.gradient import plan
from mgebm_fast.models import MultiGrid
from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import Langevin

DEVICE = os.environ.get("DEVICE", "cuda")
GPU = DEVICE == "cuda"
MOST = 9 if os.environ.get("SMALL") else 2000  # samples
FAST = "triton" if GPU else "reference"
LIMIT = float(os.environ.get("LIMIT", "60"))  # seconds for a group
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
PRESETS = ("digits", "cifar10", "multigrid-released") if GPU else ("digits",)
DYNAMICS = Langevin(4, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))
# A check yields (what, its error, the largest error allowed); it ends where one is too large. `NOTED` allows any: the
# number is written down.
NOTED = math.inf
Check = Callable[[], Iterator[tuple[str, float, float]]]
GROUPS: dict[str, list[Check]] = {}


def check(group: str) -> Callable[[Check], Check]:
    return lambda function: GROUPS.setdefault(group, []).append(function) or function


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, last: bool = False) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def images(n: int, size: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255).to(DEVICE)


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    return float((got - want).norm() / want.norm().clamp_min(1e-300))


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double().cpu() - b.detach().double().cpu()).abs().max())


def differs(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(not torch.equal(a.cpu(), b.cpu()))


def same_chain(
    what: str, got: torch.Tensor, want: torch.Tensor, own: bool = False
) -> Iterator[tuple[str, float, float]]:
    """A chain by two paths: bit for bit where all its kernels are the package's `own`. Convolutions are the library's,
    which may take another algorithm in a capture; chains of other noise are 0.7 and more apart."""
    if own or not GPU:
        yield what, differs(got, want), 0
    else:
        yield f"{what}: mean difference", float((got - want).abs().mean()), 0.05
        yield f"{what}: pixels of other bits", float((got != want).float().mean()), NOTED


def float64_gradient(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    leaf = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(copy.deepcopy(net).double()(leaf).sum(), leaf)
    return gradient


@check("ops")
def native() -> Iterator[tuple[str, float, float]]:
    """CUDA C++ against the C++ loops of the CPU, bit for bit."""
    for shape in ((5, 3, 64, 64), (3, 3, 5, 7), (1000, 4)):
        for kind in ("normal", "uniform", "bits"):
            drawn = [ops.noise(shape, seed=2**63 + 5, step=7, first_sample=9, distribution=kind, device=device,
                               backend="native") for device in (DEVICE, "cpu")]  # fmt: skip
            yield f"noise {kind} {shape}", differs(*drawn), 0
    for dtype in DTYPES:
        for last in (False, True):
            x, grad = seeded(6, 3, 9, 8, last=last), seeded(6, 3, 9, 8, seed=1, dtype=dtype)
            rest = {"step_size": 0.3, "reference_std": 2.0, "grad_clamp": 0.8, "seed": 5, "backend": "native"}
            stepped = [ops.langevin_step_(a, g, **rest) for a, g in ((x.clone(), grad), (x.cpu(), grad.cpu()))]
            yield f"langevin_step {dtype} channels-last={last}", apart(*stepped), 0
    x = images(7, 64)
    for size, here, there in zip((16, 4, 1), *(ops.pyramid(t, (16, 4, 1)) for t in (x, x.cpu())), strict=True):
        yield f"pyramid to {size}", differs(here, there), 0
    yield "upsample", differs(ops.upsample(x, 4), ops.upsample(x.cpu(), 4)), 0


@check("ops")
def noise_and_step() -> Iterator[tuple[str, float, float]]:
    shape = (5, 3, 64, 64)
    want = ops.noise(shape, seed=1, step=7)
    for backend in (FAST, "reference"):
        yield f"noise {backend}", apart(ops.noise(shape, seed=1, step=7, device=DEVICE, backend=backend), want), 2e-6
    for last in (False, True):
        x, grad = seeded(6, 3, 16, 16, last=last), seeded(6, 3, 16, 16, seed=1, dtype=torch.float16, last=True)
        rest = {"step_size": 0.3, "reference_std": 2.0, "clamp": (-1.0, 1.0), "seed": 5, "step": 3}
        got = ops.langevin_step_(x.clone(), grad, backend=FAST, **rest)
        yield f"langevin_step channels-last={last}", apart(got, ops.langevin_step_(x.cpu(), grad.cpu(), **rest)), 3e-6


@check("activations")
def bias_act() -> Iterator[tuple[str, float, float]]:
    bounds = dict(zip(DTYPES, (1e-3, 6e-3, 1e-5), strict=True))
    for dtype in DTYPES:
        for shape, last in (((128, 64, 32, 32), True), ((5, 96, 3, 5), True), ((3, 7, 5, 5), False)):
            for kind in ("leaky_relu", "silu"):
                z, b = seeded(*shape, dtype=dtype, last=last), seeded(shape[1], seed=3)
                grad = seeded(*shape, seed=4, dtype=dtype, last=last)
                options = {"activation": kind, "slope": 0.2, "backend": FAST}
                out = torch.full_like(z, math.nan)  # entries that are not written show
                y, kept = ops.bias_act(z, b, out=out, **options)
                down = ops.bias_act_backward(grad, kept, b, out=torch.full_like(z, math.nan), **options)
                leaf = (z.double() + b.double().reshape(-1, 1, 1)).cpu().requires_grad_()
                act = torch.nn.functional.silu(leaf) if kind == "silu" else torch.nn.functional.leaky_relu(leaf, 0.2)
                (want,) = torch.autograd.grad(act, leaf, grad.double().cpu())
                yield f"{kind} {dtype} {shape}", off(y, act), bounds[dtype]
                yield f"{kind} backward {dtype} {shape}", off(down, want), bounds[dtype]


@check("norms")
def batch_norm_act() -> Iterator[tuple[str, float, float]]:
    bounds = dict(zip(DTYPES, (2e-3, 1e-2, 1e-4), strict=True))
    for dtype in DTYPES:
        for shape, last in (
            ((128, 64, 32, 32), True),
            ((128, 96, 2, 2), True),
            ((128, 512, 4, 4), True),
            ((9, 24, 6, 5), False),
        ):
            shape = (min(shape[0], MOST), *shape[1:])
            z = seeded(*shape, dtype=dtype, last=last) * 3 + 40  # sums of squares would lose a mean so far from 0
            w, b = seeded(shape[1], seed=3), seeded(shape[1], seed=5)
            grad = seeded(*shape, seed=4, dtype=dtype, last=last)
            options = {"activation": "leaky_relu", "slope": 0.2, "backend": FAST}
            y, statistics = ops.batch_norm_act(z, w, b, out=torch.full_like(z, math.nan), **options)
            down = ops.batch_norm_act_backward(grad, z, statistics, w, b, out=torch.full_like(z, math.nan), **options)
            leaf = z.double().cpu().requires_grad_()
            normal = torch.nn.functional.batch_norm(leaf, None, None, w.double().cpu(), b.double().cpu(), True)
            act = torch.nn.functional.leaky_relu(normal, 0.2)
            (want,) = torch.autograd.grad(act, leaf, grad.double().cpu())
            yield f"{dtype} {shape}", off(y, act), bounds[dtype]
            yield f"backward {dtype} {shape}", off(down, want), 2 * bounds[dtype]
            yield f"twice {dtype} {shape}", differs(ops.batch_norm_act(z, w, b, **options)[0], y), 0


@check("edge")
def edge_step() -> Iterator[tuple[str, float, float]]:
    cases = [
        ((128, 3, 64, 64), 64, 5, 2),
        ((37, 3, 16, 16), 96, 5, 2),
        ((50, 1, 8, 8), 32, 3, 1),
        ((9, 3, 7, 5), 24, 3, 2),
    ]
    for (n, *shape), outputs, kernel, stride in cases:
        shape = [min(n, MOST), *shape]
        for dtype in DTYPES:
            weight = seeded(outputs, shape[1], kernel, kernel, seed=6, dtype=dtype) / 30
            sizes = [(n + 2 * (kernel // 2) - kernel) // stride + 1 for n in shape[2:]]
            upstream = seeded(shape[0], outputs, *sizes, seed=7, dtype=dtype, last=True)
            packed = ops.edge_weights(weight, stride=stride, padding=kernel // 2)
            double = [t.double().cpu() for t in (weight, upstream)]
            grad = torch.nn.grad.conv2d_input(list(shape), *double, stride, kernel // 2)
            rest = {"step_size": 0.5, "reference_std": 3.0, "clamp": (-2.0, 2.0), "seed": 5, "first_sample": 11}
            for last in (False, True):
                x = seeded(*shape, last=last)
                got = ops.edge_step_(x.clone(), upstream, packed, backend=FAST, **rest)
                want = ops.langevin_step_(x.cpu(), grad.float(), **rest)
                yield f"{dtype} {shape} kernel {kernel} stride {stride} channels-last={last}", apart(got, want), 3e-4


@check("dense")
def dense_chain() -> Iterator[tuple[str, float, float]]:
    sizes, bounds = (48, 384, 512, 1024), dict(zip(DTYPES, (3e-3, 3e-2, 1e-4), strict=True))
    gains = [1 + 0.2 * seeded(size // 4, seed=3) for size in sizes[1:]]
    for dtype, gained in itertools.product(DTYPES, (False, True)):
        weights = [seeded(b, a, seed=b) / a**0.5 for a, b in zip(sizes, sizes[1:], strict=False)]
        biases = [seeded(b, seed=1) for b in sizes[1:]]
        norms = [(gain, 1e-5) for gain in gains] if gained else None
        net = ops.dense_net(weights, biases, seeded(1024, seed=2), activations=["leaky_relu"] * 3, slopes=[0.2] * 3,
                            norms=norms, dtype=dtype)  # fmt: skip
        rest = {"step_size": 0.3, "reference_std": 50.0, "clamp": (0.0, 255.0), "seed": 1}
        x = seeded(min(100, MOST), 48).mul(60).add(128).clamp(0, 255)
        got = ops.dense_chain_(x.clone(), net, steps=3, backend=FAST, **rest)
        want = ops.dense_chain_(x.clone(), net, steps=3, backend="reference", **rest)
        title = f"{dtype}{' with batch statistics' if gained else ''}"
        yield f"{title} mean of 3 steps", float((got - want).abs().mean()), bounds[dtype]
        for samples, split in ((100, 2), (100, 4), (100, 8), (128, 16), (528, 4)) if GPU else ():
            # Programs that wait for each other, through many barriers; the last two fill an H100's 132 processors.
            x = seeded(min(samples, MOST), 48).mul(60).add(128).clamp(0, 255)
            alone, *again = (ops.dense_chain_(x.clone(), net, steps=90, split=n, **rest) for n in (1, *[split] * 3))
            what = f"{title} {len(x)} samples, split {split}"
            yield what, max(differs(alone, one) for one in again), 0
            yield f"{what}, replayed", differs(alone, replayed(x, net, split, rest)), 0


def replayed(x: torch.Tensor, net: ops.DenseNet, split: int, rest: dict[str, Any]) -> torch.Tensor:
    """The chain from a captured graph, replayed twice from the same start."""
    state, graph = x.clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        ops.dense_chain_(state, net, steps=90, split=split, **rest)
    for _ in range(2):
        state.copy_(x)
        graph.replay()
    return state


def _plans(size: int, norm: str, variant: str) -> Check:
    def run() -> Iterator[tuple[str, float, float]]:
        net = multigrid_net(size, norm=norm, variant=variant, seed=size).to(DEVICE)
        x = images(12 if size == 64 else 33, size, seed=1)
        want = float64_gradient(net, x)
        for precision, bound in (("fp32", 1e-2), ("bf16", 0.15), ("fp16", 0.05)):
            if precision == "fp16" and not GPU:
                continue
            yield f"gradient {precision}", off(plan(net, x, precision).gradient(x), want), bound
            probe = Langevin(1, drift=2.0**20, noise_std=0.0)  # the gradient as the chain's own step uses it
            step = (x.double() - probe(net, x, precision=precision, graph=False).double()) / 2.0**20
            yield f"step {precision}", off(step, want), bound

    run.__name__ = f"plan_{size}_{norm}_{variant}"
    return run


for _case in ((64, "batch", "B"), (16, "batch", "B"), (4, "batch", "B"), (16, "none", "B"), (4, "none", "B"),
              (8, "none", "compact"), (2, "none", "compact")):  # fmt: skip
    check(f"plans{_case[0]}{_case[1]}")(_plans(*_case))


@check("resident")
def resident_chain() -> Iterator[tuple[str, float, float]]:
    """conv_chain in CUDA C++: each compact size against float64, any grouping of samples alike, K steps as K calls."""
    from mgebm_fast.gradient.stack import read
    from mgebm_fast.ops import conv_chain
    from mgebm_fast.ops.conv_chain import gradient_reference, resident

    rest = {"drift": 20.0, "noise_std": 0.5, "clamp": (0.0, 255.0), "seed": 1}
    for size in (2, 4, 8, 16):
        net = multigrid_net(size, norm="none", variant="compact", seed=size).to(DEVICE)
        x = images(min(300, MOST) if GPU else 5, size, seed=2)
        stack = read(net, x)
        backend = "native" if GPU or size < 16 else "reference"
        got = conv_chain(stack.stages, stack.head, x, steps=3, backend=backend, **rest)
        want = conv_chain(stack.stages, stack.head, x, steps=3, backend="reference", **rest)
        yield f"{size}: mean of 3 steps", float((got - want).abs().mean()), 0.05
        again = x
        for step in range(3):
            again = conv_chain(stack.stages, stack.head, again, steps=1, first_step=step, backend=backend, **rest)
        yield f"{size}: step by step", differs(again, got), 0
        if not GPU:
            continue
        gradients = []
        for samples in (1, 2, 3):
            chain = resident.ResidentChain(stack.stages, samples=samples, device=x.device)
            if chain.layout.shared_bytes > resident.limits_of(x.device).shared_bytes:
                continue
            chain.load(stack.stages, stack.head)
            gradients.append(torch.empty_like(x))
            resident.launch_gradient(chain, x, gradients[-1], torch.zeros((), dtype=torch.int64, device=x.device))
        yield f"{size}: gradient", off(gradients[0], gradient_reference(stack.stages, stack.head, x)), 0.05
        for other in gradients[1:]:
            yield f"{size}: another grouping", differs(gradients[0], other), 0
    for size in (2, 8) if GPU else ():
        net, x = multigrid_net(size, variant="residual", seed=size).to(DEVICE), images(min(300, MOST), size, seed=2)
        found = plan(net, x)
        yield f"residual {size}: {found.explain()}", float(found.explain().plan != "resident"), 0
        yield f"residual {size}: gradient", off(found.gradient(x), float64_gradient(net, x)), 0.05


@check("graphs")
def replays() -> Iterator[tuple[str, float, float]]:
    """Chains from graphs are those without, while batches, counters and weights change."""
    for size, norm, variant in ((16, "batch", "B"), (4, "none", "B"), (8, "none", "compact")):
        net = multigrid_net(size, norm=norm, variant=variant).to(DEVICE)
        for call in range(4):
            x = images(24, size, seed=call)
            place = {"seed": 2**64 - 1 - call, "first_sample": 9 * call, "first_step": 5 * call}
            runs = [DYNAMICS(net, x, graph=graph, **place) for graph in (None, False)]
            yield from same_chain(f"{size} {norm} call {call}", *runs, own=norm == "none")
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1.05)
        explained = str(DYNAMICS.explain(net, x))
        yield f"{size} {norm} captured: {explained}", float(GPU and "replayed" not in explained), 0


@check("cascades")
def cascades() -> Iterator[tuple[str, float, float]]:
    for norm in ("none", "batch"):
        model = MultiGrid((1, 2, 4, 8), channels=3, norm=norm, variant="compact", batch_size=16, langevin=DYNAMICS)
        model = model.to(DEVICE)
        model.set_colours(torch.rand(40, 3) * 255)
        want = model.sample(48, seed=1, graph=False)
        for run in range(3):
            yield from same_chain(f"{norm} sample {run}", model.sample(48, seed=1), want, own=norm == "none")
            if GPU:
                piped = model.sample(48, seed=1, pipeline=True)
                yield from same_chain(f"{norm} pipeline {run}", piped, want, own=norm == "none")
        known, mask = images(16, 8), torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5
        mask = mask.to(DEVICE)
        for run in range(3):
            filled = model.sample(16, seed=2, known=known, mask=mask)
            yield f"{norm} in-painting {run}: known pixels", differs(filled[~mask.expand_as(known)],
                                                                     known[~mask.expand_as(known)]), 0  # fmt: skip


def trainer_of(preset: str, *changes: str) -> tuple:
    """A trainer of small batches and short chains, and the batch of an update."""
    from mgebm_fast.data import ImageData
    from mgebm_fast.learning import MultiGridTrainer, apply_overrides, load_preset

    config = apply_overrides(load_preset(preset), ["batch_size=16", "langevin.steps=4", *changes])
    shape = (64, config.channels, config.sizes[-1], config.sizes[-1])
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageData(pixels.numpy(), name="random")
    trainer = MultiGridTrainer(None, data, config, device=DEVICE, quiet=True)
    return trainer, lambda update: data.batch(slice(16 * (update % 4), 16 * (update % 4) + 16))


@check("training")
def updates() -> Iterator[tuple[str, float, float]]:
    for preset in PRESETS:
        trainer, batch = trainer_of(preset)
        for update in range(4):
            metrics = trainer.step(batch(update))
            bad = [name for name, value in metrics.items() if not math.isfinite(value)]
            yield f"{preset} update {update} {bad or ''}", float(bool(bad)), 0


@check("captured")
def captured_updates() -> Iterator[tuple[str, float, float]]:
    """Training by CUDA graphs is training without: where five updates lead to, the last with measures of samples.

    The two may differ in last bits (docs/configuration.md). Relative to the way that the weights have gone, factors of
    1 ± 0.01 on all gradients led 0.03 to 0.07 away, and the counters and rates of one update for all 0.2 to 0.3.
    """
    for preset in PRESETS:
        states = []
        for graph in ("auto", "false"):
            trainer, batch = trainer_of(preset, f"graph={graph}", "log_every=5")
            start = trainer.rule.snapshot()
            for update in range(5):
                trainer.rule.launch(batch(update), update, detail=update == 4)
                found, made = trainer.rule.collect(update + 1, wait=update == 4)
                yield f"{preset} update {update}: applied", float(made != update + 1), 0
            used = "a CUDA graph each" in trainer.explain()
            yield f"{preset} graph={graph}: {trainer.explain()}", float(used != (GPU and graph == "auto")), 0
            bad = [name for name, value in found[-1][1].items() if not math.isfinite(value)]
            yield f"{preset} graph={graph}: {bad or ''}", float(bool(bad)), 0
            states.append(trainer.rule.snapshot())
        for part in ("model", "average") if start["average"] else ("model",):
            weights = [name for name, t in start[part].items() if t.is_floating_point() and "running_" not in name]
            began, ours, theirs = (
                torch.cat([state[part][name].double().flatten().cpu() for name in weights])
                for state in (start, *states)
            )
            away = float((ours - theirs).norm() / (theirs - began).norm().clamp_min(1e-300))
            yield f"{preset} {part}: share of the way that is between them", away, 0.1
            yield f"{preset} {part}: numbers of other bits", float((ours != theirs).double().mean()), NOTED


def write(line: dict) -> None:
    if folder := os.environ.get("OUT"):
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "results.jsonl"), "a") as file:
            file.write(json.dumps({"part": "smoke", **line}) + "\n")


def run(group: str) -> int:
    """The checks of a group; how many failed."""
    failures = 0
    for function in GROUPS[group]:
        begin, done, worst, said, noted = time.perf_counter(), 0, 0.0, "", []
        try:
            for what, error, bound in function():
                done += 1
                if bound == NOTED:
                    noted.append(f"{what}: {error:.3g}")
                elif bound:
                    worst = max(worst, error / bound)
                if not error <= bound:  # NaN too
                    raise AssertionError(f"{what}: off by {error:.3g}, at most {bound:g} is right")
            if GPU:
                torch.cuda.synchronize()
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            failures += 1
        seconds = round(time.perf_counter() - begin, 2)
        print(f"{'FAIL' if said else 'ok  '} {group}/{function.__name__}: {done} cases, {seconds} s {said}", flush=True)
        for words in noted:
            print(f"     {words}", flush=True)
        line = {"group": group, "check": function.__name__, "ok": not said, "cases": done, "seconds": seconds}
        line |= {"share_of_bound": round(worst, 3), "said": said, "noted": "; ".join(noted)}
        write(line)
        if said and "CUDA error" in said:
            print(f"     the CUDA context is lost; the rest of {group} is left out", flush=True)
            break
    return failures


def main() -> int:
    if sys.argv[1:]:
        return min(1, sum(run(group) for group in sys.argv[1:]))
    workers = [subprocess.Popen([sys.executable, __file__, group]) for group in GROUPS] if GPU else []
    end, status = time.monotonic() + LIMIT, 0
    if not GPU:
        return min(1, sum(run(group) for group in GROUPS))
    for group, worker in zip(GROUPS, workers, strict=True):
        try:
            status |= worker.wait(max(0.1, end - time.monotonic())) != 0
        except subprocess.TimeoutExpired:
            worker.kill()
            print(f"FAIL {group}: cut after {LIMIT:.0f} s", flush=True)
            write({"group": group, "check": "all", "ok": False, "said": f"cut after {LIMIT:.0f} s"})
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
