#!/usr/bin/env python3
"""Break the engine on purpose, one fault at a time, and see that the tests notice each.

A test of a sampler's law is worth something only if a wrong sampler fails it. This script copies the sources to a
temporary folder, checks that the chosen tests pass there, then applies each mutation, runs its tests, and undoes it.
Your working tree is never touched. The faults are those that real samplers have had: the 1/2 of the drift dropped,
the step size for its square, a noise counter used twice, padding shifted by one, one draw shared by a batch; and those
of learning: a sign, a bank that is not stored, a generator taught what it made itself.

  python scripts/mutations.py                      every mutation that can run here, a few minutes on two cores
  python scripts/mutations.py --list               what there is, and which tests have to notice it
  python scripts/mutations.py --layer python       only those in Python (needs no compiler)
  python scripts/mutations.py --only noise-shared  only those whose name holds this text; may be given again
  python scripts/mutations.py --keep               leave the temporary copy behind, and say where

Layers: python; native (C++, rebuilt with setup.py for each mutation: needs a compiler); triton (the interpreter, on the
CPU: needs triton). Exit status: 0 every mutation was noticed, 1 one survived, 2 the check itself could not run.
To add one, write a Mutation: the code it replaces must stand in the file exactly once. Comments and docstrings are not
searched, and white space matches any white space, so that rewording or another line break changes nothing.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("mgebm_fast", "kernels", "csrc", "tests", "docs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
TIMEOUT = 900  # seconds, of one run of tests

LAW = ("tests/sampling/test_law.py",)
NETS = ("tests/nets/test_energy_net.py",)
GRADIENTS = ("tests/gradient/test_conv.py",)
CASCADE = ("tests/sampling/test_cascade.py",)
UPDATE = ("tests/learning/test_update.py",)
SPLITS = ("tests/sampling/test_reproducibility.py",)
INTERPRETED = ("tests/sampling/test_law_interpreted.py",)
EXACT = ("tests/sampling/test_mcmc.py", "tests/sampling/test_mcmc_laws.py")
LATENT = ("tests/models/test_latent.py",)
BASELINES = ("tests/learning/methods/test_baselines.py",)
CONVNET = ("tests/learning/methods/test_convnet.py",)
FRAME = ("tests/learning/methods/test_frame.py",)
COOPERATIVE = ("tests/learning/methods/test_cooperative.py",)
ABP = ("tests/learning/methods/test_abp.py",)
TEMPORAL = ("tests/learning/methods/test_spatial_temporal.py",)
OPTIM = ("tests/learning/methods/test_optim.py",)
GROWING = ("tests/learning/test_growing.py",)
BANK_OF_GRIDS = ("tests/learning/methods/test_multigrid_bank.py",)
FEED = ("tests/learning/run/test_feed.py",)
ROLLBACK = ("tests/learning/run/test_rollback.py",)
FACTORS = ("tests/learning/run/test_factors.py",)
COMPARISON = ("tests/evaluation/comparison/test_comparison.py",)
INPAINTING = ("tests/evaluation/test_inpainting.py",)


@dataclasses.dataclass(frozen=True)
class Mutation:
    name: str
    layer: str  # python | native | triton
    file: str
    old: str  # stands in the code of `file` exactly once
    new: str
    tests: tuple[str, ...]


STEP = "mgebm_fast/ops/update.py"
CHAIN = "mgebm_fast/sampling/running.py"
COUNTERS = "mgebm_fast/ops/counters.py"
METROPOLIS = "mgebm_fast/sampling/metropolis.py"
CORRECTED = "mgebm_fast/sampling/corrected.py"
POSTERIOR = "mgebm_fast/models/latent.py"
STARTS = "mgebm_fast/learning/methods/baselines.py"
BANKS = "mgebm_fast/learning/methods/banks.py"
LAYERS = "mgebm_fast/nets/layers.py"
CONTRAST = "mgebm_fast/learning/methods/contrast.py"
CONVNET_RULE = "mgebm_fast/learning/methods/convnet.py"
FRAME_RULE = "mgebm_fast/learning/methods/frame.py"
COOPERATIVE_RULE = "mgebm_fast/learning/methods/cooperative.py"
ABP_RULE = "mgebm_fast/learning/methods/abp.py"
FILLING = "mgebm_fast/evaluation/inpainting.py"
STEP_KERNEL = "mgebm_fast/kernels/langevin_step.py"
COUNTERS_HEADER = "csrc/include/mgebm/counters.h"
CONVOLVE = "convolve(x, self.effective_weight(), self.bias, self.stride, self.padding)"
SHIFTED = (
    "convolve(torch.constant_pad_nd(x, [self.padding - 1, self.padding + 1] * (x.dim() - 2)), "
    "self.effective_weight(), self.bias, self.stride, 0)"
)

MUTATIONS = (
    Mutation("half-dropped", "python", STEP, "step_size**2 / 2", "step_size**2", LAW),
    Mutation("delta-for-delta-squared", "python", STEP, "step_size**2 / 2", "step_size / 2", LAW),
    Mutation("noise-delta-squared", "python", STEP, "noise_scale * step_size", "noise_scale * step_size**2", LAW),
    Mutation("noise-scale-in-drift", "python", STEP, "step_size**2 / 2,", "noise_scale * step_size**2 / 2,", LAW),
    Mutation(
        "variance-for-precision", "python", STEP, "1.0 / reference_std**2", "1.0 / reference_std", LAW
    ),  # sigma for sigma squared
    Mutation("step-counter-reused", "python", COUNTERS, "self.step + k, None", "self.step, None", LAW),
    Mutation(
        "first-step-ignored", "python", COUNTERS, "self.step + k, None", "k, None", SPLITS
    ),  # 10 + 20 steps would repeat the noise of the first 10
    Mutation(
        "stream-shared-by-grids", "python", "mgebm_fast/sampling/cascade.py",
        "stream = noise.stream(purpose, first_grid + grid)", "stream = noise.stream(purpose, 1)", CASCADE,
    ),
    Mutation(
        "step-counter-reused-in-cycles", "python", "mgebm_fast/models/multigrid.py",
        "step + turn * chain.steps for step", "step for step", ("tests/models/test_cycles.py",),
    ),
    Mutation(
        "step-counter-reused-in-training", "python", "mgebm_fast/learning/methods/multigrid.py",
        "first_step=[iteration * chain.steps", "first_step=[0 * chain.steps", UPDATE,
    ),
    Mutation("padding-shifted", "python", LAYERS, CONVOLVE, SHIFTED, NETS),
    Mutation(
        "padding-shifted-in-the-conv-plan", "python", "mgebm_fast/gradient/conv.py", "h = x.contiguous()",
        "h = torch.roll(x.contiguous(), 1, -1)", GRADIENTS,
    ),
    Mutation(
        "noise-shared", "python", CHAIN, "first_sample=first_sample, step=first_step,\n",
        "first_sample=torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), step=first_step,\n", LAW,
    ),
    Mutation(
        "noise-shared-reference", "python", "mgebm_fast/noise.py",
        "sample = torch.arange(n, device=device, dtype=torch.int64) + first_sample",
        "sample = torch.zeros(n, device=device, dtype=torch.int64) + first_sample", LAW,
    ),
    Mutation(
        "first-sample-ignored", "python", CHAIN, "first_sample=first_sample, step", "first_sample=0, step", SPLITS
    ),
    # MALA and HMC
    Mutation(
        "metropolis-sign", "python", METROPOLIS, "log_ratio = (-change)", "log_ratio = change", EXACT
    ),  # the unlikely is accepted
    Mutation(
        "metropolis-accepts-all", "python", METROPOLIS, ".log() <= proposal.log_ratio",
        ".log() <= 0 * proposal.log_ratio", EXACT,
    ),
    Mutation(
        "kinetic-energy-left-out", "python", METROPOLIS, " + (squares(end) - squares(momentum)) / 2", "", EXACT
    ),
    Mutation(
        "kinetic-half-dropped", "python", METROPOLIS, "(squares(end) - squares(momentum)) / 2",
        "(squares(end) - squares(momentum))", EXACT,
    ),
    Mutation(
        "leapfrog-half-dropped", "python", METROPOLIS, "momentum - step_size / 2 * at_x", "momentum - step_size * at_x",
        EXACT,
    ),
    Mutation(
        "temperature-left-out", "python", METROPOLIS, "(potential - state.potential) / target.temperature",
        "(potential - state.potential)", EXACT,
    ),
    Mutation(
        "potential-of-the-refused", "python", METROPOLIS, "torch.where(accepted, new.potential, state.potential)",
        "new.potential", EXACT,
    ),
    Mutation(
        "reference-left-out-of-the-target", "python", METROPOLIS, "return self.energies(x) + self.reference(x)",
        "return self.energies(x)", EXACT,
    ),
    Mutation(
        "jitter-tied-to-the-decision", "python", CORRECTED, "2.0 * uniform[:, 1] - 1.0", "2.0 * uniform[:, 0] - 1.0",
        EXACT,
    ),
    # inference of latent variables
    Mutation("posterior-half-dropped", "python", POSTERIOR, "0.5 / std**2", "1.0 / std**2", LATENT),
    Mutation("posterior-std-for-variance", "python", POSTERIOR, "0.5 / std**2", "0.5 / std", LATENT),
    Mutation(
        "prior-left-out", "python", POSTERIOR, "noise_scale=self.noise_scale, reference_std=1.0)",
        "noise_scale=self.noise_scale)", LATENT,
    ),
    Mutation("hidden-pixels-infer", "python", POSTERIOR, "rest = rest * self.seen", "rest = rest * 1.0", LATENT),
    # where chains of training start
    Mutation("learning-sign", "python", CONTRAST, "share[n:] = -1 / m", "share.neg_()[n:] = 1 / m", BASELINES),
    Mutation("bank-not-stored", "python", STARTS, "self.model.bank[made.ids] = made.images[0]", "return", BASELINES),
    Mutation("restart-ignored", "python", BANKS, "draw[:, 0] <= self.restart", "draw[:, 0] <= 0", BASELINES),
    Mutation("restart-inverted", "python", BANKS, "draw[:, 0] <= self.restart", "draw[:, 0] > self.restart", BASELINES),
    Mutation("restart-from-the-first-noise", "python", STARTS, "iteration + 1, ids, ", "0, ids, ", BASELINES),
    Mutation(
        "slots-of-the-first-batch", "python", BANKS, " + iteration * self.batch_size)", " + 0 * self.batch_size)",
        BASELINES,
    ),
    Mutation(
        "short-run-starts-alike", "python", STARTS, "self.noise(len(observed[0]), iteration, first_sample",
        "self.noise(len(observed[0]), 0, first_sample", BASELINES,
    ),
    Mutation("cd-from-the-means", "python", STARTS, "sample, observed[1]", "sample, 0 * observed[1]", BASELINES),
    Mutation(
        "single-grid-from-the-data", "python", STARTS, "ops.upsample(observed[0], self.model.sizes[-1])", "observed[1]",
        BASELINES,
    ),
    Mutation(
        "single-grid-with-the-steps-of-one", "python", STARTS, "total = sum(steps) if", "total = steps[-1] if",
        BASELINES,
    ),
    Mutation(
        "step-counter-reused-on-one-net", "python", STARTS, "first_step=iteration * chain.steps",
        "first_step=iteration", BASELINES,
    ),
    # generative ConvNet, FRAME, spatial-temporal
    Mutation(
        "chains-begin-at-noise", "python", STARTS, "return self.model.zeros(n)",
        "return torch.rand_like(self.model.zeros(n))", CONVNET,
    ),
    Mutation(
        "layers-join-late", "python", CONVNET_RULE, "min(layers, 1 + int(",
        "min(layers, int(1 + 0.7 * ", CONVNET,
    ),
    Mutation(
        "lambda-sign", "python", FRAME_RULE, "tied = whole.view(", "tied = -whole.view(", FRAME
    ),
    Mutation(
        "filter-threshold-sign", "python", FRAME_RULE, "copy_(-torch.tensor(options.thresholds",
        "copy_(torch.tensor(options.thresholds", FRAME,
    ),
    Mutation(
        "hamiltonian-steps-repeat", "python", STARTS, "first_step=iteration * chain.steps", "first_step=0", FRAME,
    ),
    Mutation(
        "hamiltonian-noise-of-samples", "python", "mgebm_fast/models/single.py", "_TRAINING_GRID = 2",
        "_TRAINING_GRID = 1", FRAME,
    ),
    Mutation(
        "one-clip-chains-forget", "python", STARTS, "self.model.bank[made.ids] = made.images[0]", "return", TEMPORAL
    ),
    # with a generator
    Mutation(
        "taught-what-it-made", "python", COOPERATIVE_RULE, "(x,), z = whole.images, whole.latents",
        "x, z = generator(whole.latents).detach(), whole.latents", COOPERATIVE,
    ),
    Mutation(
        "draws-repeat", "python", COOPERATIVE_RULE, "step=iteration, first_sample",
        "step=0, first_sample", COOPERATIVE,
    ),
    Mutation(
        "teaching-noise-repeats", "python", COOPERATIVE_RULE,
        "first_step=iteration * options.infer_steps", "first_step=0", COOPERATIVE,
    ),
    Mutation(
        "latents-not-kept", "python", ABP_RULE, "self.model.latents[ids] = z", "pass", ABP
    ),
    Mutation(
        "latents-of-before", "python", ABP_RULE, "loss = residual(z).mean()",
        "loss = residual(self.model.latents[ids]).mean()", ABP,
    ),
    Mutation("expansion-transposed", "python", ABP_RULE, "dokl,de->eokl", "dokl,ed->eokl", ABP),
    Mutation(
        "inference-noise-repeats", "python", ABP_RULE, "first_step=iteration * inference.steps",
        "first_step=0", ABP,
    ),
    # in-painting
    Mutation(
        "known-and-hidden-exchanged", "python", FILLING, "mask=mask.to(device), known",
        "mask=~mask.to(device), known", INPAINTING,
    ),
    Mutation(
        "error-over-all-pixels", "python", FILLING, "hidden.sum((1, 2, 3)) * x.shape[1]",
        "hidden[0].numel() * x.shape[1]", INPAINTING,
    ),
    Mutation(
        "half-dropped-native", "native", "csrc/ops/langevin_step.h", "fused(-k.drift, force, x)",
        "fused(-2.0f * k.drift, force, x)", LAW,
    ),
    Mutation(
        "noise-shared-native", "native", COUNTERS_HEADER, "sample = counters.first_sample + index;",
        "sample = counters.first_sample;", LAW,
    ),
    Mutation(
        "step-counter-reused-native", "native", COUNTERS_HEADER,
        "counters.step_at ? *counters.step_at : counters.step;", "counters.step_at ? *counters.step_at : 0;", LAW,
    ),
    Mutation(
        "half-dropped-triton", "triton", STEP_KERNEL, "tl.fma(-drift, force, old)",
        "tl.fma(-2.0 * drift, force, old)", INTERPRETED,
    ),
    Mutation(
        "noise-shared-triton", "triton", STEP_KERNEL, "counter_words(first_sample, step, n,",
        "counter_words(first_sample, step, n * 0,", INTERPRETED,
    ),
    Mutation("noise-anneals-to-the-end", "python", "mgebm_fast/learning/config/train_config.py",
             "until = pick(self.stabilise.noise_anneal_share, index) * (self.steps - first - 1)",
             "until = 1.0 * (self.steps - 1)", UPDATE),
    Mutation("a-late-net-anneals-from-the-start", "python", "mgebm_fast/learning/config/train_config.py",
             "max(0, iteration - first) / max(1.0, until)", "iteration / max(1.0, until)", GROWING),
    Mutation("a-late-net-learns-at-once", "python", "mgebm_fast/learning/methods/contrastive.py",
             "return sum(first <= iteration for first in self.first_updates)", "return len(self.first_updates)",
             GROWING),
    Mutation("a-late-net-averages-from-the-start", "python", "mgebm_fast/learning/methods/ema.py",
             "own = [iteration - first for first in self.firsts]", "own = [iteration for _ in self.firsts]",
             GROWING),
    Mutation("coarse-grids-store-chains", "python", "mgebm_fast/learning/methods/multigrid.py",
             "return grid >= self.first_stored", "return True", BANK_OF_GRIDS),
    Mutation("new-chains-begin-at-new-ones", "python", "mgebm_fast/learning/methods/multigrid.py",
             "results[-1].roll(-self._anew(grid - 1, len(ids)), 0)", "results[-1]", BANK_OF_GRIDS),
    Mutation("muon-without-nesterov", "python", "mgebm_fast/learning/methods/optim.py",
             "(factor * momentum + gradient).flatten(1)", "momentum.flatten(1)", OPTIM),
    Mutation("spoilt-momentum-stays", "python", "mgebm_fast/learning/methods/optim.py",
             "torch.where(spoilt == 1, tensor, now)",
             "torch.where(spoilt == 1, weight, now) if tensor is weight else now", UPDATE),
    Mutation("shifts-go-one-way", "python", "mgebm_fast/learning/run/feed.py",
             ".ceil().long() - 1 - self.shifts", ".ceil().long() - 1", FEED),
    Mutation("linear-starts-lose-their-means", "python", "mgebm_fast/sampling/cascade.py",
             "return smooth.add_(ops.upsample(x - means, factor))", "return smooth", CASCADE),
    Mutation("rollback-keeps-the-data-noise", "python", "mgebm_fast/learning/run/divergence/rollback.py",
             "data_noise = math.prod(entry.data_noise for entry in own)", "data_noise = 1.0", ROLLBACK),
    Mutation("rollback-keeps-the-rate", "python", "mgebm_fast/learning/run/divergence/rollback.py",
             "return Factors(math.prod(entry.factor for entry in own)", "return Factors(1.0", ROLLBACK),
    Mutation("rollback-of-all-nets-at-once", "python", "mgebm_fast/learning/run/divergence/rollback.py",
             "net = part if part in rule.slowed_alone else", "net = part if not part else", ROLLBACK),
    Mutation("rollback-of-one-net-the-first-time-only", "python", "mgebm_fast/learning/run/divergence/rollback.py",
             "part in rule.slowed_alone else", "part in rule.slowed_alone and not made else", ROLLBACK),
    Mutation("a-longer-run-is-watched-by-its-past", "python", "mgebm_fast/learning/run/divergence/rollback.py",
             "self.restore_seen(stored if same else {**stored, \"watch\": {}})", "self.restore_seen(stored)", GROWING),
    Mutation("growth-never-goes-back", "python", "mgebm_fast/learning/run/divergence/factors.py",
             "elif stiffness < _CALM * bound and factor > 1.0:", "elif stiffness < 0:", FACTORS),
    Mutation("growth-forgotten-at-a-resumption", "python", "mgebm_fast/learning/run/divergence/rollback.py",
             "\"growth\": dict(self.growth.factors)", "\"growth\": {}", FACTORS),
    Mutation("growth-of-each-rank", "python", "mgebm_fast/learning/run/divergence/factors.py",
             "found = json.loads(ranks.tell(json.dumps(found)))", "pass", FACTORS),
    Mutation("growth-a-block-late", "python", "mgebm_fast/learning/methods/captured.py",
             "if made_of == (iteration, self._rule.factors) else", "if made_of and made_of[0] == iteration else",
             ("tests/learning/run/test_captured.py",)),
    Mutation("curvature-of-the-largest-magnitude", "python", "mgebm_fast/learning/methods/synthesis.py",
             "bent + (0.5 * shift)", "bent + (0.0 * shift)", FACTORS),
    Mutation("rollback-to-the-same-state-again", "python", "mgebm_fast/learning/run/divergence/states.py",
             "return len(steps) - 2 if again and len(steps) > 1 else len(steps) - 1",
             "return len(steps) - 1", ROLLBACK),
    Mutation("length-picked-by-the-worst", "python", FILLING,
             "best = min(errors, key=lambda length: float(errors[length].mean()))",
             "best = max(errors, key=lambda length: float(errors[length].mean()))", INPAINTING),
    Mutation("length-picked-without-doubt", "python", FILLING,
             "doubt = 2 * float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf",
             "doubt = 0.0", INPAINTING),
    Mutation("best-by-one-spread", "python", "mgebm_fast/evaluation/comparison/table.py",
             "math.hypot(spread, own[1])", "own[1]", COMPARISON),
)  # fmt: skip


class CannotRun(Exception):
    """The check itself cannot be made; exit status 2."""


def copy_sources(target: Path) -> None:
    """The sources in `target`, with the Triton kernels where an installation would put them."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", ".pytest_cache", "build")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=skip)
        elif source.is_file():
            shutil.copy2(source, target / name)
    if not (target / "mgebm_fast/kernels").exists():
        shutil.copytree(target / "kernels", target / "mgebm_fast/kernels")


def environment(copy: Path) -> dict[str, str]:
    # No bytecode: a mutation may keep a file's size and its time stamp's second, which is all that Python compares.
    return {
        **os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", "MGEBM_CUDA": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }  # fmt: skip


def run_tests(copy: Path, tests: Iterable[str]) -> tuple[bool, str]:
    """(whether all passed, the last lines of pytest's output)."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise CannotRun(f"{' '.join(tests)} took longer than {TIMEOUT} s") from None
    if done.returncode not in (0, 1):  # 1: tests failed; anything else: they did not run
        raise CannotRun(f"pytest ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, "\n".join(lines) or done.stdout[-2000:]


def build(copy: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    if done.returncode != 0:
        raise CannotRun(f"the C++ sources do not build:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def check_copy_is_used(copy: Path) -> None:
    command = [sys.executable, "-c", "import mgebm_fast; print(mgebm_fast.__path__[0])"]
    done = subprocess.run(command, cwd=copy, env=environment(copy), capture_output=True, text=True)
    if not done.stdout.startswith(str(copy)):
        raise CannotRun(f"the tests would import {done.stdout.strip() or done.stderr.strip()}, not the copy in {copy}")


def code_alone(text: str, file: str) -> str:
    """`text` with comments and docstrings blanked, every other character where it was."""
    if not file.endswith(".py"):
        spans = [found.span() for found in re.finditer(r"//[^\n]*|/\*.*?\*/", text, re.DOTALL)]
    else:
        lines = [0]
        for line in text.splitlines(keepends=True):
            lines.append(lines[-1] + len(line))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        spans = [
            (lines[token.start[0] - 1] + token.start[1], lines[token.end[0] - 1] + token.end[1])
            for token in tokens
            if token.type == tokenize.COMMENT
        ]
        for node in ast.walk(ast.parse(text)):
            words = node.value if isinstance(node, ast.Expr) else None
            if isinstance(words, ast.Constant) and isinstance(words.value, str):
                spans.append((lines[words.lineno - 1], lines[words.end_lineno or words.lineno] - 1))
    for start, end in spans:
        text = text[:start] + " " * (end - start) + text[end:]
    return text


def mutated(text: str, mutation: Mutation) -> str:
    """`text` with the mutation's code exchanged; CannotRun unless it stands there exactly once."""
    pattern = r"\s+".join(map(re.escape, mutation.old.split()))
    found = list(re.finditer(pattern, code_alone(text, mutation.file)))
    if len(found) != 1:
        raise CannotRun(f"{mutation.name}: {mutation.file} must hold {mutation.old!r} once, has {len(found)}")
    start, end = found[0].span()
    return text[:start] + mutation.new.strip("\n") + text[end:]


def apply(copy: Path, mutation: Mutation) -> str:
    """Mutate the copy; returns the file's text as it was."""
    path = copy / mutation.file
    text = path.read_text(encoding="utf-8")
    path.write_text(mutated(text, mutation), encoding="utf-8")
    return text


def unusable(layer: str) -> str:
    """Why a layer's mutations cannot run here; an empty string when they can."""
    if layer == "native":
        missing = [name for name in ("pybind11", "ninja", "setuptools") if importlib.util.find_spec(name) is None]
        compiler = os.environ.get("CXX", "c++")
        if missing or shutil.which(compiler) is None:
            return f"needs {', '.join(missing) or compiler}"
    if layer == "triton" and importlib.util.find_spec("triton") is None:
        return "needs triton"
    return ""


def check(chosen: list[Mutation], copy: Path) -> list[str]:
    """Run every chosen mutation in `copy`; returns the names of those that no test noticed."""
    copy_sources(copy)
    check_copy_is_used(copy)
    if any(mutation.layer == "native" for mutation in chosen):
        build(copy)
    tests = sorted({test for mutation in chosen for test in mutation.tests})
    passed, output = run_tests(copy, tests)
    if not passed:
        raise CannotRun(f"the tests must pass before anything is broken, but:\n{output}")
    print(f"unbroken: {len(tests)} test files pass", flush=True)

    survivors = []
    width = max(len(mutation.name) for mutation in chosen)
    for mutation in chosen:
        began = time.monotonic()
        text = apply(copy, mutation)
        try:
            if mutation.layer == "native":
                build(copy)
            passed, output = run_tests(copy, mutation.tests)
        finally:
            (copy / mutation.file).write_text(text, encoding="utf-8")
        if passed:
            survivors.append(mutation.name)
        by = "SURVIVED" if passed else f"noticed by {output.splitlines()[0].removeprefix('FAILED ').split(' - ')[0]}"
        print(f"{mutation.name:{width}}  {time.monotonic() - began:5.1f} s  {by}", flush=True)
        if mutation.layer == "native" and mutation is last_of(chosen, "native"):
            build(copy)  # what follows runs on the right C++ again
    return survivors


def last_of(chosen: list[Mutation], layer: str) -> Mutation:
    return [mutation for mutation in chosen if mutation.layer == layer][-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="names that hold TEXT; repeatable")
    parser.add_argument("--layer", choices=("python", "native", "triton"), help="one layer alone")
    parser.add_argument("--list", action="store_true", help="print the mutations and stop")
    parser.add_argument("--keep", action="store_true", help="keep the temporary copy")
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.only or any(text in m.name for text in options.only)]
    chosen = [m for m in chosen if options.layer in (None, m.layer)]
    if options.list:
        for m in chosen:
            new = (m.new.splitlines() or ["nothing"])[0]
            print(f"{m.name}  [{m.layer}]  {m.file}\n    {m.old.splitlines()[0]}\n  → {new}")
            print(f"    noticed by {' '.join(m.tests)}")
        return 0
    for layer in ("native", "triton"):
        reason = unusable(layer)
        if reason and any(m.layer == layer for m in chosen):
            print(f"{layer}: skipped, {reason}")
            chosen = [m for m in chosen if m.layer != layer]
    if not chosen:
        print("no mutation to run; --list shows them")
        return 2
    folder = Path(tempfile.mkdtemp(prefix="mgebm-mutations-")).resolve()
    try:
        survivors = check(chosen, folder)
    except CannotRun as error:
        print(f"cannot run: {error}", file=sys.stderr)
        return 2
    finally:
        if options.keep:
            print(f"the copy is in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"{len(chosen) - len(survivors)} of {len(chosen)} mutations noticed"
        + "".join(f"; {n} SURVIVED" for n in survivors)
    )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
