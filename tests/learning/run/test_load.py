"""`mg.load`: the trained model of a run, with its averaged weights and where it came from; and what is no run."""

from __future__ import annotations

import pickle
import shutil

import pytest
import torch

import mgebm_fast as mg
from mgebm_fast.errors import BackendError, CheckpointError
from mgebm_fast.models import Model

TINY = {"steps": 2, "width": 0.1, "batch_size": 4, "checkpoint_every": 1, "langevin": {"steps": 1}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "digits"
    images = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = mg.data.load(images, size=8, channels=1)
    mg.learning.train(mg.learning.merge(mg.learning.load_config("digits"), TINY), out=out, data=data, quiet=True)
    return out


def test_a_run_a_checkpoint_and_a_file_are_the_same_model(trained, tmp_path):
    model = mg.load(trained, device="cpu")
    assert isinstance(model, mg.MultiGrid) and model.origin.config.steps == 2 and model.origin.metrics()
    x = model.sample(2, seed=1)
    file = shutil.copy(trained / "model.safetensors", tmp_path / "alone.safetensors")
    alone, last = mg.load(str(file)), mg.load(trained / "checkpoints" / "step_000002")
    assert alone.origin is None and last.origin.config == model.origin.config
    for other in (alone, last, mg.load(trained / "model.safetensors")):
        assert torch.equal(other.sample(2, seed=1), x)


def test_averaged_weights_are_taken_unless_they_are_not_wanted(trained):
    folder = trained / "checkpoints" / "step_000002"
    averaged, plain = mg.load(folder), mg.load(folder, ema=False)
    stored = Model.load(folder, ema=False)
    assert not torch.equal(averaged.nets[0].layers[0].weight, plain.nets[0].layers[0].weight)
    assert torch.equal(plain.nets[0].layers[0].weight, stored.nets[0].layers[0].weight)


def test_an_older_model_is_taken_with_a_warning(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "damaged")
    (run / "model.safetensors").unlink()
    (run / "checkpoints" / "step_000002" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="step_000002 is damaged .*; the model is that of step_000001"):
        assert mg.load(run).origin.config.steps == 2


class Trap:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_what_is_no_run_is_refused_by_name_and_never_unpickled(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Trap()))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "state.pt")
    for name, words in {
        "empt": r"empt does not exist \(did you mean 'empty'\?\)",
        "empty": "empty, which holds no model",
        "model.pt": "model.pt: truncated, or no safetensors file at all",
        "state.pt": "state.pt: truncated, or no safetensors file at all",
    }.items():
        with pytest.raises(CheckpointError, match=words):
            mg.load(tmp_path / name)
    assert "unpickled" not in capsys.readouterr().out
    with pytest.raises(TypeError, match="load: run must be a path, got int"):
        mg.load(3)
    with pytest.raises(ValueError, match="load: device must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        mg.load(trained, device="gpu")
    with pytest.raises(BackendError, match="device: cuda:99 is not here"):
        mg.load(trained, device="cuda:99")


def test_weights_that_are_not_finite_are_refused(trained, tmp_path):
    from safetensors.torch import load_file, safe_open, save_file

    path = trained / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["nets.0.head.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "bad.safetensors", metadata)
    with pytest.raises(CheckpointError, match="nets.0.head.weight must be finite"):
        mg.load(tmp_path / "bad.safetensors")
