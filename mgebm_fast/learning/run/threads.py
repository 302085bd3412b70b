"""How many CPU threads a training run takes by default."""

from __future__ import annotations

import math
import os

import torch
from torch import nn

from ...nets import ScoreNet

# Multiply-accumulates of a forward pass that a thread of its own pays for: one to two milliseconds of a core's work.
WORK_PER_THREAD = 100e6


def threads_for(model: nn.Module, batch_size: int) -> int:
    """torch's threads, or fewer for nets that are too small for them: one for each 10⁸ multiply-accumulates that the
    largest net's forward pass takes on a batch.

    torch's threads wait for each other by spinning after every operator. A small net gains little by a second one
    (digits, two idle cores: 26 ms an update for 30), and loses all where another process takes a core: 300 ms and more,
    where one thread takes 50 to 66. OMP_NUM_THREADS, if set, stands. The number depends on the model, the batch and
    the machine alone, so that a resumed run gets the same one.
    """
    present = torch.get_num_threads()
    work = [net.macs() * batch_size for net in model.modules() if isinstance(net, ScoreNet)]
    if not work or "OMP_NUM_THREADS" in os.environ:
        return present
    return min(present, max(1, math.ceil(max(work) / WORK_PER_THREAD)))
