"""Gradient plans run on poisoned memory: see helpers.poison."""

from __future__ import annotations

import pytest
from helpers.poison import poison


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    poison(monkeypatch)
