"""What the tests of MALA and HMC share: the chains, draws and the test of a law."""

import numpy as np
import torch
from scipy import stats

import mgebm_fast as mg

CHAINS = {
    "mala": mg.MALA(steps=25, step_size=0.9),
    "hmc": mg.HMC(steps=12, leapfrog_steps=5, step_size=0.7),
    "hmc-jitter": mg.HMC(steps=12, leapfrog_steps=5, step_size=0.6, jitter=0.5),
}
P_VALUE = 1e-4


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agrees(values, law):
    """Kolmogorov–Smirnov of independent values against a cumulative distribution function."""
    return stats.kstest(np.asarray(values, dtype=np.float64).ravel(), law).pvalue
