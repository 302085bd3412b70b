"""The plan of GPUs over its Triton kernels: interpreted here, compiled where there is a GPU."""

import sys

import pytest
import torch

from mgebm_fast.gradient.cuda import FusedPlan
from mgebm_fast.gradient.stack import read
from mgebm_fast.nets import multigrid_net
from mgebm_fast.ops import counters
from mgebm_fast.ops.edge_step import NO_BAD_STEP
from mgebm_fast.ops.update import update

NUMBERS = update(step_size=0.3, reference_std=50.0, clamp=(0.0, 255.0))


@pytest.fixture
def plans(kernels, device, monkeypatch):
    """(energy, x) -> the plan over kernels in their interpreted or compiled form, and the plan over the references."""
    for name in ("bias_act", "batch_norm_act", "edge_step", "dense_chain"):
        monkeypatch.setitem(sys.modules, f"mgebm_fast.kernels.{name}", getattr(kernels, name))

    def make(energy, x):
        stack = read(energy, x)
        return [FusedPlan(stack, energy, "fp16", backend) for backend in ("triton", "reference")]

    return make


def case(norm, activation, size, device, n=3):
    net = multigrid_net(size, norm=norm, activation=activation, variant="compact", width=0.25).to(device)
    x = 255 * torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))
    return net, x.to(device)


@pytest.mark.parametrize("activation", ["leaky_relu", "silu"])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_gradient(plans, device, norm, activation):
    net, x = case(norm, activation, 8, device)
    got, expected = (plan.gradient(x) for plan in plans(net, x))
    # float16 is rounded after other sums: a few last digits, and the signs that they turn.
    assert float((got - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    "norm, size, masked",
    [("batch", 8, True), ("none", 8, False), ("none", 4, True)],
)
def test_chain(plans, device, norm, size, masked):
    net, x = case(norm, "leaky_relu", size, device)
    mask = None
    if masked:
        mask = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.6).to(device)
    step = torch.tensor(2**32 - 2, device=device)
    place = counters.check("t", 3, x[0].numel(), x.device, seed=2**64 - 3, first_sample=3, step=step, stream=7)
    states, split = [], x.clone()
    fast, slow = plans(net, x)
    for plan in (fast, slow):
        states.append(x.clone())
        plan.advance_(states[-1], place, 2, NUMBERS, mask)
        assert int(plan.bad_step) == NO_BAD_STEP
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=5e-3)
    for here in place.steps(0, 2):
        fast.advance_(split, here, 1, NUMBERS, mask)
    assert torch.equal(split, states[0])
    if mask is not None:
        assert torch.equal(states[0][~mask], x[~mask])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_overflow_is_noted(plans, device):
    net, x = case("batch", "leaky_relu", 8, device)
    with torch.no_grad():
        net.layers[0].weight.mul_(1e5)
    place = counters.check("t", 3, x[0].numel(), x.device, seed=1, first_sample=0, step=12, stream=0)
    for plan in plans(net, x):
        plan.advance_(x.clone(), place, 2, NUMBERS, None)
        assert int(plan.bad_step) == 12
