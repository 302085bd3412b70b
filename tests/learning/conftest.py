"""A run small enough to train in milliseconds: grey 4×4 images, three grids, nets of four channels."""

from __future__ import annotations

import pytest
import torch
from helpers.training import tiny_config, tiny_data

from mgebm_fast.learning import MultiGridTrainer


@pytest.fixture
def trainer():
    def make(out=None, data=None, console=None, **changes) -> MultiGridTrainer:
        data = tiny_data() if data is None else data
        quiet = console is None
        return MultiGridTrainer(None, data, tiny_config(**changes), out=out, device="cpu", console=console, quiet=quiet)

    return make


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small are slower on more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
