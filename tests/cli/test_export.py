"""`mgebm export`: what it writes, what it says, and what it does not replace."""

from __future__ import annotations

import torch
from helpers.console import one_line

import mgebm_fast as mg


def test_a_run_is_exported(mgebm, trained, tmp_path):
    result = mgebm("export", trained, tmp_path / "new" / "x.pt", "--to", "torchscript")
    assert result.exit_code == 0, result.output
    assert "images: float32 (N, 1, 8, 8) from -1 to 1" in result.stderr
    model = mg.load(trained)
    x = torch.rand(3, 1, 8, 8)
    expected = torch.stack(list(model.energies(x).values()), 1)
    torch.testing.assert_close(torch.jit.load(tmp_path / "new" / "x.pt")(x), expected, rtol=1e-4, atol=1e-5)
    result = mgebm("export", trained, tmp_path / "x.py", "--to", "sampler")
    assert result.exit_code == 0 and f"next: python {tmp_path / 'x.py'}" in result.stderr
    result = mgebm("export", trained, tmp_path / "card", "--to", "pretrained")
    assert result.exit_code == 0 and "| data | digits, 1437 images |" in (tmp_path / "card" / "README.md").read_text()


def test_files_are_replaced_only_where_it_is_asked_for(mgebm, trained, tmp_path):
    for ending, to in ((".py", "sampler"), (".safetensors", "sampler"), (".safetensors", "state-dict")):
        path = tmp_path / f"{to[:2]}{ending}"
        path.write_text("mine")
        out = path.with_suffix(".py") if to == "sampler" else path
        words = one_line(mgebm("export", trained, out, "--to", to))
        assert "which exists (--overwrite replaces it)" in words and path.read_text() == "mine"
    assert mgebm("export", trained, tmp_path / "st.safetensors", "--to", "state-dict", "--overwrite").exit_code == 0
    shared = tmp_path / "a folder"
    shared.mkdir()
    (shared / ".gitattributes").write_text("mine")  # nothing that would be replaced
    assert mgebm("export", trained, shared, "--to", "pretrained").exit_code == 0
    words = one_line(mgebm("export", trained, shared, "--to", "pretrained"))
    assert "config.json, which exists" in words and (shared / ".gitattributes").read_text() == "mine"
    result = mgebm("export", trained, shared / "x.py", "--to", "sampler")
    assert f"next: python '{shared / 'x.py'}' --num 16 --out samples.png" in result.stderr


def test_what_is_wrong_is_named(mgebm, trained, tmp_path):
    assert "--to: must be one of state-dict, torchscript" in one_line(
        mgebm("export", trained, tmp_path / "x.py", "--to", "samplr")
    )
    assert "OUT: must end in .onnx for onnx" in one_line(mgebm("export", trained, tmp_path / "x.pt", "--to", "onnx"))
    assert "does not exist" in one_line(mgebm("export", tmp_path / "none", tmp_path / "x.pt", "--to", "torchscript"))
    assert not list(tmp_path.iterdir())
