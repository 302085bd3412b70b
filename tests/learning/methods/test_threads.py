"""The threads of a run that names none."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast.learning import build_model, load_preset
from mgebm_fast.learning.methods.work import WORK_PER_THREAD, threads_for
from mgebm_fast.nets import multigrid_net


@pytest.fixture(autouse=True)
def eight_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)


def test_small_nets_get_few_threads_and_large_ones_all():
    digits = load_preset("digits")
    assert threads_for(build_model(digits), digits.batch_size) == 1
    net = multigrid_net(16, norm="none")
    for threads in range(1, 9):
        assert threads_for(net, int(threads * WORK_PER_THREAD / net.macs())) == threads
    assert threads_for(multigrid_net(64, norm="none"), 32) == 8


def test_what_the_user_set_stands(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert threads_for(multigrid_net(4, norm="none"), 1) == 8


def test_models_of_other_nets_are_left_alone():
    assert threads_for(torch.nn.Linear(3, 1), 64) == 8
