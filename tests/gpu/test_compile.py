"""Every launch that chains make, compiled for GPUs that need not be here: no spill, 128-bit accesses, matrix cores."""

import math

import pytest
import torch
from helpers import compiling
from helpers.fake_cuda import to_cuda, world

from mgebm_fast.nets import multigrid_net
from mgebm_fast.sampling import Langevin

FIRE = Langevin(2, step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))
CHAIN = Langevin(2, drift=1.0, noise_std=0.03, grad_clamp=0.3, clamp=(-1.0, 1.0))
# size, channels, norm, variant, batch, dynamics: the published nets, and those of the presets digits and cifar10
NETS = [
    (64, 3, "batch", "B", 128, FIRE),
    (16, 3, "batch", "B", 128, FIRE),
    (16, 3, "none", "B", 128, FIRE),
    (4, 3, "none", "B", 128, FIRE),
    (4, 3, "none", "B", 1056, FIRE),
    (8, 1, "none", "compact", 64, CHAIN),
    (4, 1, "none", "compact", 64, CHAIN),
    (16, 3, "none", "compact", 64, CHAIN),
    (2, 3, "none", "compact", 64, CHAIN),
]
SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory a program may have
MATRIX = {"edge_step_kernel", "dense_chain_kernel"}


def recorded(nets):
    """The launches of whole chains, captured (counters and scales on the device), in float16."""
    with world() as made:
        for size, channels, norm, variant, batch, dynamics in nets:
            net = to_cuda(multigrid_net(size, channels, norm=norm, variant=variant))
            x = torch.rand(batch, channels, size, size, device="cuda")
            for _ in range(2):
                dynamics(net, x, seed=1, precision="fp16")
        return list(made.launches.values())


def check(launch, architecture):
    built = compiling.build(launch, architecture)
    compiling.check_unspilled(built)
    assert built.registers <= 255 and built.shared <= SHARED[architecture], launch.name
    matrix = [line for line in built.sass if line.startswith(("HMMA", "HGMMA"))]
    assert bool(matrix) == (launch.name in MATRIX), launch.name
    if elements(launch) >= 4:
        wide = [line for line in built.sass if ".128" in line and line.startswith(("LDG", "STG", "LDGSTS"))]
        assert wide, f"{launch.name}: no 128-bit access"


def elements(launch):
    """Pixels that a thread of the edge kernel has; 4 for the others, that have more."""
    if launch.name != "edge_step_kernel":
        return 4
    names = ("TILE_N", "TILE_H", "TILE_W", "STRIDE_H", "STRIDE_W", "PADDED")
    return math.prod(launch.arguments[name] for name in names) // (32 * launch.arguments["num_warps"])


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def test_the_launches_of_the_digits_preset():
    """As captured, with counters on the device: those of the first, eager call are compiled by tests/kernels, the other
    presets' by the next test, in a run of `-m slow`."""
    launches = recorded([NETS[5], NETS[8]])
    assert {launch.name for launch in launches} >= {"edge_step_kernel", "dense_chain_kernel", "bias_act_kernel"}
    for launch in launches:
        if launch.arguments.get("SEED_ON_DEVICE", True):
            check(launch, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_all_launches(architecture):
    for launch in recorded(NETS):
        check(launch, architecture)
