"""What the compiler makes of the kernels, without a GPU: each launch is recorded and compiled for its own arguments."""

from __future__ import annotations

import re

import pytest
import torch
from helpers.compiling import Recorder, accesses, build, check_clean, record, specialisation


def noise_launch(compiled, shape, distribution="normal", **options) -> Recorder:
    out = torch.empty(shape, dtype=torch.int64 if distribution == "bits" else torch.float32)
    return record(compiled.noise, "noise", out, seed=1, step=2, distribution=distribution, **options)


def step_launch(compiled, shape, *, grad_type=torch.float32, x_last=False, grad_last=False, **options) -> Recorder:
    x, grad = torch.zeros(shape), torch.zeros(shape, dtype=grad_type)
    x = x.to(memory_format=torch.channels_last) if x_last else x
    grad = grad.to(memory_format=torch.channels_last) if grad_last else grad
    return record(compiled.langevin_step, "langevin_step_", x, grad, **{"drift": 0.1, "noise_std": 0.1, **options})


@pytest.mark.parametrize(("distribution", "architecture"), [("normal", 90), ("uniform", 80), ("bits", 90)])
def test_noise_stores_whole_vectors(compiled, distribution, architecture):
    kernel = build(noise_launch(compiled, (8, 3, 64, 64), distribution), architecture)
    check_clean(kernel)
    expected = {"st.global.v2.b64": 2} if distribution == "bits" else {"st.global.v4.b32": 1}
    assert accesses(kernel.ptx) == expected


def test_noise_is_lean(compiled):
    """One quad a thread: Philox is 20 wide products; every fma is one that the source asks for; 250 instructions."""
    kernel = build(noise_launch(compiled, (8, 3, 64, 64)), 90)
    assert 20 <= kernel.ptx.count("mul.wide.u32") <= 22  # an address or two
    assert len(re.findall(r"sqrt\.rn(\.ftz)?\.f32", kernel.ptx)) == 2
    assert kernel.ptx.count("fma.rn.f32") == 4 + 2 * 11 + 2 * 8  # uniforms, logarithms, sines and cosines
    assert kernel.shared == 0
    assert len(kernel.sass) < 320
    assert kernel.registers <= 32


@pytest.mark.parametrize(
    ("shape", "grad_type", "architecture"),
    [
        ((8, 3, 64, 64), torch.float16, 90),
        ((8, 3, 64, 64), torch.float32, 80),
        ((8, 3, 6, 6), torch.bfloat16, 90),
        ((8, 3, 6, 6), torch.float32, 90),
        ((8, 3, 4, 4), torch.float16, 80),
        ((8, 4, 1, 1), torch.bfloat16, 80),
        ((8, 4, 1, 1), torch.float32, 90),
    ],
)
def test_langevin_step_moves_whole_vectors(compiled, shape, grad_type, architecture):
    """Wherever 4 divides C * S, also where 16 does not."""
    launch = step_launch(compiled, shape, grad_type=grad_type, grad_clamp=1.0, clamp_lo=0.0, clamp_hi=1.0)
    kernel = build(launch, architecture)
    check_clean(kernel)
    if grad_type == torch.float32:
        assert accesses(kernel.ptx) == {"ld.global.v4.b32": 2, "st.global.v4.b32": 1}
    else:
        assert accesses(kernel.ptx) == {"ld.global.v4.b32": 1, "ld.global.v2.b32": 1, "st.global.v4.b32": 1}
    assert kernel.shared == 0


def test_a_mask_keeps_the_vectors(compiled):
    shape = (8, 3, 16, 16)
    mask = torch.ones(shape, dtype=torch.bool)
    kernel = build(step_launch(compiled, shape, mask=mask), 90)
    check_clean(kernel)
    assert accesses(kernel.ptx) == {"ld.global.v4.b32": 2, "ld.global.b32": 1, "st.global.v4.b32": 1}
    kernel = build(step_launch(compiled, shape, mask=mask[:1, :1], mask_strides=(0, 0, 1)), 90)
    check_clean(kernel)
    assert accesses(kernel.ptx) == {"ld.global.v4.b32": 2, "ld.global.b8": 4, "st.global.v4.b32": 1}


def test_counters_in_device_memory(compiled):
    tensors = {name: torch.zeros((), dtype=torch.int64) for name in ("seed", "step")}
    kernel = build(step_launch(compiled, (8, 3, 16, 16), first_sample=torch.arange(8), **tensors), 90)
    check_clean(kernel)
    assert accesses(kernel.ptx) == {"ld.global.v4.b32": 2, "ld.global.b64": 3, "st.global.v4.b32": 1}


@pytest.mark.parametrize(
    ("shape", "layouts"),
    [
        ((8, 3, 16, 16), (True, True)),
        ((8, 3, 16, 16), (False, True)),
        ((8, 3, 16, 16), (True, False)),
        ((8, 3, 5, 7), (False, False)),
        ((8, 3, 5, 7), (False, True)),
        ((8, 4, 3, 3), (True, True)),
    ],
)
def test_other_layouts_compile_clean(compiled, shape, layouts):
    launch = step_launch(compiled, shape, grad_type=torch.float16, x_last=layouts[0], grad_last=layouts[1])
    check_clean(build(launch, 90))


def test_no_noise_costs_nothing(compiled):
    kernel = build(step_launch(compiled, (8, 3, 16, 16), noise_std=0.0), 90)
    check_clean(kernel)
    assert "sqrt" not in kernel.ptx and "xor" not in kernel.ptx
    assert len(kernel.sass) < 120


def test_steps_and_shapes_share_one_kernel(compiled):
    """Nothing that changes along a chain or between batches may cost a compilation."""
    first = specialisation(step_launch(compiled, (8, 3, 16, 16)))
    counters = {"seed": 2**64 - 1, "first_sample": 2**32 - 16, "step": 2**32 - 1, "stream": 0xFFFFFFFF}
    assert specialisation(step_launch(compiled, (16, 1, 32, 32), drift=0.5, noise_std=2.0, **counters)) == first
    assert specialisation(step_launch(compiled, (1, 3, 16, 16), seed=16, step=1, first_sample=32)) == first


def test_grid_covers_every_quad(compiled):
    launch = noise_launch(compiled, (40000, 3, 32, 32))
    rows = launch.arguments["ROWS"]
    assert launch.grid == (6, rows, 2) and launch.arguments["QUADS"] * 6 == 768 and rows * 2 >= 40000
    launch = noise_launch(compiled, (5, 1, 1, 1))
    assert launch.grid == (1, 5, 1) and launch.arguments["num_warps"] == 1
