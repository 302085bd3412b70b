import pytest
import torch
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mgebm_fast import ops
from mgebm_fast.gradient import native
from mgebm_fast.sampling import chain, graphs, memory

PLACES = [("cpu", "reference"), ("cpu", "native"), ("cpu", "triton")]
PLACES += [("cuda", "reference"), ("cuda", "native"), ("cuda", "triton")]


# Triton's interpreter takes seconds for what a kernel does in microseconds.
FEW, MANY = (2, 3, 8, 8), (256, 3, 8, 8)


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


@pytest.fixture
def traced(monkeypatch):
    """Traces stand for CUDA graphs; the list grows by one with every capture.

    A trace of a chain's body holds what ran, operator by operator, on the buffers that it ran on, and, as a CUDA graph
    does, nothing of Python and no look at a number.
    """
    captures = []

    def record(self, body, device):
        body()

        def outputs():
            body()
            return torch.zeros(())

        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            # Metadata of every tensor, which no run of a trace reads, take longer than the operators.
            patch.setattr(proxy_tensor, "extract_val", lambda *_, **__: None)
            trace = make_fx(outputs)()
        captures.append(trace)
        return trace

    def launcher(x, mask, backend):
        def launch(grad, numbers, placed):
            tensors = numbers.table, numbers.means
            torch.ops.mgebm_fast.langevin_step_(x, grad, mask, *numbers.arguments, *tensors, *placed.arguments, backend)

        return launch

    monkeypatch.setattr(graphs, "DEVICES", ("cpu",))
    monkeypatch.setattr(graphs.Lane, "record", record)
    # What a trace holds: operators of torch's and of ours, not calls past the dispatcher.
    monkeypatch.setattr(chain, "launcher", launcher)
    monkeypatch.setattr(native, "why_not", lambda *_: "graphs are tested")
    return captures


@pytest.fixture
def no_eager_run(monkeypatch):
    """After a call of this, only graphs may make steps."""

    def forbid(*_):
        raise AssertionError("a chain ran outside its graph")

    return lambda: monkeypatch.setattr(memory, "advance_", forbid)
