"""Uninitialised memory made visible: what torch.empty, empty_like and new_empty return holds NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrap the functions for one test. Tensors of torch's tracing, on meta or without memory are left alone."""

    def filled(function):
        def wrapped(*args, **kwargs):
            out = function(*args, **kwargs)
            if type(out) is Tensor and not out.is_meta and not torch.compiler.is_compiling():
                with torch.no_grad():
                    real = out.is_floating_point() or out.is_complex()
                    out.fill_(torch.nan if real else True if out.dtype == torch.bool else torch.iinfo(out.dtype).max)
            return out

        return wrapped

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
