"""What needs a GPU is marked `gpu`: without one it is left out; with one it comes first, in an order in which the first
failure says most. `pytest` without arguments takes two processes where pytest-xdist is there: CONTRIBUTING.md."""

import functools
import gc
import os
import sys

WORKER = "PYTEST_XDIST_WORKER" in os.environ
if WORKER:  # beside another one: before torch is imported, and for the processes that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = False  # dozens of processes: none compiles the package and its tests again
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest  # noqa: E402
import torch  # noqa: E402
import typer.testing  # noqa: E402
from helpers.poison import poison  # noqa: E402

# Kernels by themselves before plans, plans before chains, chains before models.
ORDER = ("tests/ops", "tests/kernels", "tests/gradient", "tests/sampling")
POISONED = (*ORDER, "tests/nets", "tests/models")
LEFT_OUT = pytest.StashKey[int]()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite in two processes, a file in one of them; -n0 or -p no:xdist: in one."""
    if WORKER or hasattr(config, "workerinput"):  # which would start two of its own, and so on
        return
    option = config.option
    whole = config.args_source is config.ArgsSource.TESTPATHS and not (option.collectonly or option.usepdb)
    two = (os.cpu_count() or 1) > 1 and not torch.cuda.is_available()
    if whole and two and getattr(option, "numprocesses", 0) is None:
        option.numprocesses, option.dist = 2, "loadfile"
        option.benchmark_disable = True  # as the plugin does itself, with a warning


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Samplers without a seed draw one from torch's generator: in a test always the same."""
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # where torch.manual_seed keeps a stack trace for the day CUDA starts
        torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an op, a plan, a chain or a model never writes does not pass as 0: helpers.poison."""
    if any(folder in request.path.as_posix() for folder in POISONED):
        poison(monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def _no_wait_for_the_disk():
    """Files are written and renamed as ever; that they outlive a loss of power is not waited for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # as strict about its argument
        yield


@pytest.fixture(autouse=True, scope="session")
def _commands_are_built_once():
    """typer's runner reads the signatures of all commands again in each call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.testing, "_get_command", functools.cache(typer.main.get_command))
        yield


def _needs_cuda(item: pytest.Item) -> bool:
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    reasons = [mark.kwargs.get("reason", "") for mark in item.iter_markers("skipif")]
    return any(isinstance(part, str) and part == "cuda" for part in parts) or "no CUDA device" in reasons


def pytest_collection_finish() -> None:
    """What was imported and collected stays to the end: no garbage collection during a test walks it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if _needs_cuda(item)]
    rest = [item for item in items if not _needs_cuda(item)]
    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=gpu)
        config.stash[LEFT_OUT] = len(gpu)
        if hasattr(config, "workeroutput"):
            config.workeroutput["left out"] = len(gpu)
        items[:] = rest
        return
    for item in gpu:
        item.add_marker("gpu")
    ranks = {item: next((i for i, folder in enumerate(ORDER) if folder in item.path.as_posix()), len(ORDER))
             for item in gpu}  # fmt: skip
    items[:] = sorted(gpu, key=lambda item: ranks[item]) + rest


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Every process collects every test."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        terminalreporter.write_line(f"no CUDA device: {count} cases that need one are left out")
