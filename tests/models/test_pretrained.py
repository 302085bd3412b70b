"""Folders in the way of the Hugging Face hub: what is in them, what is kept, and what is refused; no network."""

from __future__ import annotations

import json
import socket

import pytest
import torch

import mgebm_fast as mg
from mgebm_fast.errors import CheckpointError
from mgebm_fast.models import Model, SingleGrid, SpatialTemporal
from mgebm_fast.nets import ConvSpec

CHAIN = mg.Langevin(2, drift=0.5, noise_std=0.1)
FILES = ["README.md", "config.json", "model.json", "model.safetensors", "samples.png"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))


def model():
    made = SingleGrid(4, channels=1, langevin=CHAIN, norm="none", variant="compact", width=0.1, value_range=(-1.0, 1.0))
    made.set_colours(torch.zeros(1, 1))
    return made


def test_a_folder_gives_the_model_back(tmp_path):
    written = model().save_pretrained(tmp_path / "deep" / "mine", figures={"kid": 0.0123456789, "notes": ["x"]})
    assert sorted(path.name for path in written) == FILES
    again = Model.from_pretrained(tmp_path / "deep" / "mine")
    assert type(again) is SingleGrid and torch.equal(again.sample(3), model().sample(3))
    assert torch.equal(mg.load(tmp_path / "deep" / "mine").sample(3), model().sample(3))
    text = (tmp_path / "deep" / "mine" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: mgebm_fast\n") and "| kid | 0.0123457 |" in text and "notes" not in text
    assert "![Samples" in text and 'mg.load("mine")' in text and "Not recorded" in text


def test_a_card_tells_how_a_run_was_trained_without_this_machines_paths(tmp_path):
    images = tmp_path / "my | photos.npy"
    import numpy as np

    np.save(images, np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    config = mg.learning.merge(
        mg.learning.load_config("digits"),
        {"steps": 1, "width": 0.1, "batch_size": 4, "seed": 7, "data": str(images), "langevin": {"steps": 1}},
    )
    mg.learning.train(config, out=tmp_path / "run", quiet=True)
    mg.load(tmp_path / "run").save_pretrained(tmp_path / "card", samples=4)
    text = (tmp_path / "card" / "README.md").read_text()
    for words in (
        "| data | my \\| photos.npy, 18 images |",
        "| seed | 7 |",
        "| updates | 1, batches of 4 |",
        "size_8/gap",
    ):
        assert words in text, text
    assert "mgebm train config.toml --data 'my | photos.npy' --out runs/digits" in text
    for name in ("README.md", "config.toml", "config.json"):
        assert str(tmp_path) not in (tmp_path / "card" / name).read_text()
    assert mg.load(tmp_path / "card").origin.config.seed == 7


def test_a_card_names_the_update_of_its_model_and_a_collapse(tmp_path):
    changes = {"steps": 3, "width": 0.1, "batch_size": 4, "checkpoint_every": 1, "langevin": {"steps": 1}}
    config = mg.learning.merge(mg.learning.load_config("digits"), changes)
    mg.learning.train(config, out=tmp_path / "run", quiet=True)

    def card(path):
        mg.load(path).save_pretrained(tmp_path / "card", samples=0)
        text = (tmp_path / "card" / "README.md").read_text()
        (tmp_path / "card" / "README.md").unlink()
        return text

    assert "| updates | 3, batches of 4 |" in (text := card(tmp_path / "run")) and "collapse" not in text
    assert "| updates | 2 of 3, batches of 4 |" in card(tmp_path / "run/checkpoints/step_000002")
    record = {"update": 3, "model": 1, "why": "the gap of size 8 grew"}
    (tmp_path / "run/collapse.json").write_text(json.dumps(record))
    text = card(tmp_path / "run")
    assert "| updates | 1 of 3, batches of 4 |" in text and "| collapse | the run collapsed at update 3; its" in text


def test_what_was_written_by_hand_is_kept(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text("by hand")
    (folder / "notes.txt").write_text("mine")
    model().save_pretrained(folder, samples=0)
    assert (folder / "README.md").read_text() == "by hand" and (folder / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"] and not (folder / "samples.png").exists()


def test_untrained_models_and_recordings_have_cards(tmp_path):
    untrained = mg.MultiGrid((1, 4), channels=1, langevin=CHAIN, norm="none", variant="compact", width=0.1)
    untrained.save_pretrained(tmp_path / "untrained")
    assert "samples.png" not in (tmp_path / "untrained" / "README.md").read_text()
    video = SpatialTemporal((4, 6, 6), [ConvSpec(3, 3)], channels=1, langevin=CHAIN)
    video.bank = torch.rand(1, 1, 4, 6, 6)
    video.save_pretrained(tmp_path / "video", samples=1)
    assert (
        "4 × 6 × 6" in (tmp_path / "video" / "README.md").read_text() and (tmp_path / "video" / "samples.png").exists()
    )


def test_what_no_card_can_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained: samples must be an int >= 0, got -1"):
        model().save_pretrained(tmp_path / "x", samples=-1)
    with pytest.raises(TypeError, match="save_pretrained: figures must be a dict, got list"):
        model().save_pretrained(tmp_path / "x", figures=[0.5])
    assert not list(tmp_path.iterdir())


def test_what_is_no_such_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be a local folder, got user/model.*nothing is downloaded"):
        Model.from_pretrained("user/model")
    model().save_pretrained(tmp_path / "mine", samples=0)
    with pytest.raises(CheckpointError, match="no MultiGrid model but a SingleGrid|holds no SpatialTemporal"):
        SpatialTemporal.from_pretrained(tmp_path / "mine")
    path = tmp_path / "mine" / "config.json"
    changed = json.loads(path.read_text())
    path.write_text(json.dumps({**changed, "batch_size": 3}))
    with pytest.raises(CheckpointError, match="config.json: must describe the model in model.safetensors"):
        Model.from_pretrained(tmp_path / "mine")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="config.json: must be the configuration of a model as JSON"):
        Model.from_pretrained(tmp_path / "mine")
    path.unlink()
    with pytest.raises(CheckpointError, match="must be a folder with config.json and model.safetensors"):
        Model.from_pretrained(tmp_path / "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="must be a folder or new, got the file"):
        model().save_pretrained(tmp_path / "file")
