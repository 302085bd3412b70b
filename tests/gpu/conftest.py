"""The paths of CUDA walked without a GPU (helpers/fake_cuda.py)."""

import pytest
from helpers.fake_cuda import world as pretended


@pytest.fixture
def world():
    pytest.importorskip("triton")
    with pretended() as made:
        yield made
