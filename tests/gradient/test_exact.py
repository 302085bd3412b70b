"""cuDNN's switches while plans run: no GPU is needed, they are the process's own."""

import threading

import pytest
import torch

from mgebm_fast.gradient.exact import exact_cudnn, float32_as

CUDA = torch.device("cuda")
cudnn = torch.backends.cudnn


def switches():
    return cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.deterministic


@pytest.fixture(autouse=True)
def _as_they_were():
    before = switches()
    yield
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, cudnn.deterministic = before


@pytest.mark.parametrize("conv, rnn", [("tf32", "tf32"), ("ieee", "tf32"), ("none", "none")])
def test_inside_convolutions_are_exact_and_afterwards_all_is_as_it_was(conv, rnn):
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = conv, rnn
    before = switches()
    with pytest.raises(KeyError), exact_cudnn(CUDA):
        assert cudnn.conv.fp32_precision == "ieee" and cudnn.deterministic
        raise KeyError
    assert switches() == before


def test_the_older_switch_can_be_read_inside():
    assert cudnn.allow_tf32 is True
    with exact_cudnn(CUDA):
        assert cudnn.allow_tf32 is False
    assert cudnn.allow_tf32 is True


def test_chains_of_two_threads_leave_nothing_behind():
    """The first in is the first out: what it found must not come back while the other is inside, nor be lost."""
    before, first_in, second_in, first_out, seen = switches(), *(threading.Event() for _ in range(3)), []

    def first():
        with exact_cudnn(CUDA):
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second():
        first_in.wait(10)
        with exact_cudnn(CUDA):
            second_in.set()
            first_out.wait(10)
            seen.append((cudnn.conv.fp32_precision, cudnn.deterministic))

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert seen == [("ieee", True)] and switches() == before


def test_elsewhere_they_are_left_alone():
    before = switches()
    with exact_cudnn(torch.device("cpu")):
        assert switches() == before


@pytest.mark.parametrize("products", ["highest", "high", "medium"])
def test_products_are_float32_or_tf32_inside_and_as_they_were_afterwards(products):
    matmul, onednn = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

    def state():
        return torch.get_float32_matmul_precision(), matmul.fp32_precision, onednn.fp32_precision, *switches()

    first = state()
    torch.set_float32_matmul_precision(products)
    before = state()
    try:
        with float32_as("tf32", CUDA):
            assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic) == (True, True, False)
            with float32_as("ieee", CUDA):
                assert (matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic) == (False, False, True)
                with float32_as("tf32", CUDA):  # another thread's learning does not round an exact chain
                    assert not matmul.allow_tf32 and cudnn.conv.fp32_precision == "ieee"
            assert matmul.allow_tf32 and cudnn.conv.fp32_precision == "tf32"
        assert state() == before
    finally:
        torch.set_float32_matmul_precision(first[0])
        matmul.fp32_precision, onednn.fp32_precision = first[1:3]
