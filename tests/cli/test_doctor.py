"""What `mgebm doctor` says of packages that are not there."""

from __future__ import annotations

import importlib.util

import pytest

from mgebm_fast import doctor


@pytest.mark.parametrize("there", [False, True])
def test_triton_has_one_cure_and_no_version_that_is_none(monkeypatch, there):
    real, spec = importlib.util.find_spec, object()
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: (spec if there else None) if name == "triton" else real(name, *a)
    )
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    if there:  # of another distribution, so without a version, and without a GPU
        from mgebm_fast.ops import backend

        monkeypatch.setattr(backend, "why_no_triton", lambda: "no CUDA device")
    lines = doctor.render(doctor.examine()).splitlines()
    line = lines[lines.index("Triton") + 1]
    if there:
        assert line == "  - triton: no CUDA device → a GPU that torch can use, as above"
    else:
        assert line == '  - triton: not installed → pip install "mgebm_fast[triton]"'
    assert not [line for line in lines if "None" in line]
