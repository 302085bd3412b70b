import pytest
import torch

from mgebm_fast import ops

PLACES = [("cpu", "reference"), ("cpu", "native"), ("cpu", "triton")]
PLACES += [("cuda", "reference"), ("cuda", "native"), ("cuda", "triton")]


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
