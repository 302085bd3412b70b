"""Tests that read energies do not know of each other."""

import pytest

from mgebm_fast.gradient.graph import plan


@pytest.fixture(autouse=True)
def no_readings_before() -> None:
    """Functions that one place in a test makes are one energy, of which few readings in turn may go unused."""
    plan._unused.clear()
