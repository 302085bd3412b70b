import pytest
import torch

from mgebm_fast import ops

PLACES = [("cpu", "reference"), ("cpu", "native"), ("cpu", "triton")]
PLACES += [("cuda", "reference"), ("cuda", "native"), ("cuda", "triton")]


# Triton's interpreter takes seconds for what a kernel does in microseconds.
FEW, MANY = (3, 3, 8, 8), (256, 3, 8, 8)


@pytest.fixture(params=PLACES, ids=lambda place: "-".join(place))
def place(request):
    """(device, backend) of every update kernel, those unusable on this machine skipped with their reason."""
    device, backend = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = ops.unavailable("langevin_step", backend, torch.device(device))
    if reason:
        pytest.skip(reason)
    return device, backend


@pytest.fixture
def shape(place):
    """(N, C, H, W) of a statistical test at `place`."""
    return FEW if place == ("cpu", "triton") else MANY
