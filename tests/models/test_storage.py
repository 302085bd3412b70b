import json
import os
import pickle
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mgebm_fast.errors import CheckpointError
from mgebm_fast.models import MultiGrid, storage
from mgebm_fast.sampling import Langevin

SHORT = Langevin(2, drift=0.5, noise_std=0.1, clamp=(-1.0, 1.0))


def model(sizes=(1, 2, 4), seed=0, norm="batch", **more):
    more = {"channels": 2, "variant": "compact", "width": 0.25, "value_range": (-1.0, 1.0), "langevin": SHORT, **more}
    m = MultiGrid(sizes, norm=norm, batch_size=4, seed=seed, **more)
    m.set_colours(torch.rand(6, m.channels, generator=torch.Generator().manual_seed(seed)))
    return m


def weights_of(m):
    return {name: value.clone() for name, value in m.state_dict().items()}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    model().save(path)
    return path


@pytest.mark.parametrize(
    ("norm", "more"),
    [
        ("batch", {}),
        ("none", {"spectral_norm": True}),
        (None, {"variant": "residual", "spectral_norm": True}),
        ("none", {"width": [0.2, 0.1]}),
    ],
)
def test_a_stored_model_samples_the_same(tmp_path, norm, more):
    m = model(norm=norm, langevin=[SHORT, Langevin(3, step_size=0.1)], **more)
    m.save(tmp_path / "m.safetensors")
    loaded = MultiGrid.load(tmp_path / "m.safetensors")
    assert loaded.config() == m.config() and same_weights(loaded.state_dict(), m.state_dict())
    assert [type(net) for net in loaded.nets] == [type(net) for net in m.nets]
    assert torch.equal(loaded.sample(5, seed=3), m.sample(5, seed=3))


def test_half_stores_rounded_weights_in_half_the_bytes(tmp_path):
    m = model()
    m.save(tmp_path / "half.safetensors", half=True)
    m.save(tmp_path / "full.safetensors")
    stored, loaded = load_file(tmp_path / "half.safetensors"), MultiGrid.load(tmp_path / "half.safetensors")
    for name, value in m.state_dict().items():
        rounded = value.half().float() if value.dtype == torch.float32 else value
        assert torch.equal(loaded.state_dict()[name], rounded) and loaded.state_dict()[name].dtype == value.dtype
        assert stored[name].dtype == (torch.float16 if value.dtype == torch.float32 else value.dtype)
    bytes_of = [
        sum(t.nbytes for t in load_file(tmp_path / f"{name}.safetensors").values()) for name in ("half", "full")
    ]
    assert bytes_of[0] < 0.52 * bytes_of[1]


def test_a_frozen_model_survives(tmp_path):
    m = model()
    for size, net in zip(m.sizes[1:], m.nets, strict=True):
        with net.observing():
            net(torch.randn(8, 2, size, size))
    frozen = m.freeze_norm()
    frozen.save(tmp_path / "m.safetensors")
    loaded = MultiGrid.load(tmp_path / "m.safetensors")
    assert loaded.norm == "frozen" and torch.equal(loaded.sample(3), frozen.sample(3))


def test_the_file_is_safetensors_with_json(file):
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    described = json.loads(metadata[storage.KEY])
    assert described["format"] == storage.FORMAT
    assert described["config"]["sizes"] == [1, 2, 4]
    assert load_file(file)["colours"].shape == (6, 2)


def test_a_run_folder_gives_its_final_model_else_its_newest_checkpoint(tmp_path):
    run = tmp_path / "run"
    for seed, step in ((1, "step_000500"), (2, "step_001000"), (3, "step_000900")):
        folder = run / "checkpoints" / step
        folder.mkdir(parents=True)
        model(seed=seed).save(folder / "model.safetensors")
    (run / "checkpoints" / "step_002000.tmp").mkdir()
    (run / "checkpoints" / "step_003000").mkdir()  # no model in it
    expected = weights_of(model(seed=2))
    assert same_weights(weights_of(MultiGrid.load(run / "checkpoints" / "step_001000")), expected)
    for path in (run, run / "checkpoints", str(run)):
        with pytest.warns(UserWarning, match="step_003000 holds no model; the model is that of step_001000"):
            assert same_weights(weights_of(MultiGrid.load(path)), expected)
    model(seed=4).save(run / "model.safetensors")
    assert same_weights(weights_of(MultiGrid.load(run)), weights_of(model(seed=4)))


def test_averaged_weights_are_preferred(tmp_path):
    m, average = model(), model(seed=9)
    ema = dict(average.named_parameters())
    m.save(tmp_path / "m.safetensors", ema=ema)
    loaded = MultiGrid.load(tmp_path / "m.safetensors")
    assert all(torch.equal(p, ema[name]) for name, p in loaded.named_parameters())
    assert torch.equal(loaded.colours, m.colours)
    assert same_weights(weights_of(MultiGrid.load(tmp_path / "m.safetensors", ema=False)), weights_of(m))
    with pytest.raises(ValueError, match="ema must hold names of the model's state, got 'nets.7'"):
        m.save(tmp_path / "m.safetensors", ema={"nets.7": torch.zeros(1)})


def test_load_weights_into_a_model(file):
    m = model(seed=5)
    optimised = m.nets[0].layers[0].weight
    m.load_weights(file)
    assert same_weights(weights_of(m), weights_of(model()))
    assert m.nets[0].layers[0].weight is optimised  # an optimiser that holds it still does


def test_a_truncated_file_is_named_wherever_it_was_cut(file):
    data = file.read_bytes()
    for length in (0, 1, 7, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="model.safetensors: truncated, or no safetensors file") as caught:
            MultiGrid.load(file)
        assert "\n" not in str(caught.value)


def test_a_file_of_another_kind_is_named(tmp_path, file):
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(CheckpointError, match="this safetensors file holds no MultiGrid model"):
        MultiGrid.load(other)
    with pytest.raises(CheckpointError, match="there is no such model file"):
        MultiGrid.load(tmp_path / "nothing.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no model here"):
        MultiGrid.load(tmp_path / "empty")


def test_nothing_is_ever_unpickled(tmp_path):
    class Boom:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    path = tmp_path / "model.safetensors"
    for writer in (lambda: path.write_bytes(pickle.dumps(Boom())), lambda: torch.save({"a": Boom()}, path)):
        writer()
        with pytest.raises(CheckpointError, match="no safetensors file"):
            MultiGrid.load(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda config, tensors: tensors.pop("nets.1.head.bias"), "tensor 'nets.1.head.bias' is missing"),
        (lambda config, tensors: tensors.update(extra=torch.zeros(1)), "tensor 'extra' is not of this model"),
        (
            lambda config, tensors: tensors.update({"nets.0.head.bias": torch.zeros(2)}),
            r"tensor 'nets.0.head.bias' must be \(1,\) torch.float32, got \(2,\)",
        ),
        (lambda config, tensors: tensors.update(colours=torch.zeros(4, 3)), "tensor 'colours' must be"),
        (
            lambda config, tensors: tensors.update({"nets.0.head.bias": torch.zeros(1, dtype=torch.float64)}),
            "got .* torch.float64",
        ),
        (lambda config, tensors: config.update(sizes=[1, 3, 4]), "configuration is wrong: .*each must divide the next"),
        (lambda config, tensors: config.pop("langevin"), "configuration is wrong"),
        (lambda config, tensors: config["nets"][0].update(size=[4, 4]), r"net of size 2 must take \(2, 2, 2\)"),
        (lambda config, tensors: config.update(sizes=[1, 2, 1 << 30]), "net of size 1073741824 must take"),
        (lambda config, tensors: config.update(langevin=[{"steps": 0}] * 2), "configuration is wrong: .*steps must be"),
    ],
)
def test_what_does_not_fit_together_is_named(file, change, message):
    _, config, tensors = storage.read_one_of(file, (storage.FORMAT,))
    change(config, tensors)
    storage.write(file, tensors, config)
    with pytest.raises(CheckpointError, match=message):
        MultiGrid.load(file)


def described(**changes):
    return {storage.KEY: json.dumps({"format": storage.FORMAT, "version": storage.VERSION, **changes})}


def test_equal_models_give_equal_files(tmp_path):
    for name in ("a", "b"):
        model(seed=3).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("changes", [{}, {"config": "{"}, {"config": [1]}])
def test_a_damaged_configuration_is_named(file, changes):
    save_file({"colours": torch.zeros(1, 2)}, file, metadata=described(**changes))
    with pytest.raises(CheckpointError, match="configuration is missing or unreadable"):
        MultiGrid.load(file)


def test_another_version_of_the_format_is_named(file):
    save_file({"colours": torch.zeros(1, 2)}, file, metadata=described(version=7))
    with pytest.raises(CheckpointError, match="version 7 of the format, this program reads 1"):
        MultiGrid.load(file)


@pytest.mark.parametrize(
    "other, message",
    [
        (dict(sizes=(1, 2, 8)), r"stored from a model of sizes \[1, 2, 4\], this one has \[1, 2, 8\]"),
        (dict(channels=3), "stored from a model of channels 2, this one has 3"),
        (dict(width=0.5), "stored from a model with other nets"),
        (dict(norm="none"), "stored from a model with other nets"),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(file, other, message):
    m = model(seed=5, **other)
    before = weights_of(m)
    with pytest.raises(CheckpointError, match=message):
        m.load_weights(file)
    assert same_weights(weights_of(m), before)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model(seed=1).save(file)
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]


def test_a_stored_file_is_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        model().save(tmp_path / "m.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == 0o644
