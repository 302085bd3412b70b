"""What needs a GPU is marked `gpu`, and comes in an order in which the first failure says most."""

import pytest
import torch

# Kernels by themselves before plans, plans before chains, chains before models.
ORDER = ("tests/ops", "tests/kernels", "tests/gradient", "tests/sampling")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Samplers without a seed draw one from torch's generator: in a test always the same."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        reasons = [mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")]
        parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
        on_cuda = any(isinstance(part, str) and part == "cuda" for part in parts)
        if on_cuda or "no CUDA device" in reasons:
            item.add_marker("gpu")
    if any(item.get_closest_marker("gpu") for item in items):
        ranks = {item: next((i for i, folder in enumerate(ORDER) if folder in item.path.as_posix()), len(ORDER))
                 for item in items}  # fmt: skip
        gpu = sorted((item for item in items if item.get_closest_marker("gpu")), key=lambda item: ranks[item])
        items[:] = gpu + [item for item in items if not item.get_closest_marker("gpu")]
