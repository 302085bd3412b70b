"""The spatial-temporal method: time as a spatial dimension, closed forms of linear energies, exact resume, refusals."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from mgebm_fast import noise
from mgebm_fast.cli import app
from mgebm_fast.data import Clips
from mgebm_fast.data.sound import load_sound, write_wav
from mgebm_fast.data.video import write_gif
from mgebm_fast.errors import ConfigError
from mgebm_fast.learning import METHODS, MultiGridTrainer, build_model, load_data, load_preset, merge
from mgebm_fast.models import Model, SpatialTemporal
from mgebm_fast.models.model import Group

VIDEO, SOUND = {"size": [4, 6, 8], "layers": [[5, 3, 2], [4, 3, 1]]}, {"size": [40], "layers": [[5, 9, 2], [4, 3, 1]]}


def config(name, table=None, **changes):
    own = {**(VIDEO if name == "fire" else {**SOUND, "hop": 1000}), **(table or {})}
    base = {"steps": 4, "langevin": {"steps": 3}, "precision": "fp32", **changes}
    return merge(load_preset(name), {**base, "spatial-temporal": own})


def philox(shape, slots, step, seed=0):
    """(N, C, *size) float64: sample `slots[i]`'s normals in logical C, T, H, W order."""
    elements = math.prod(shape)
    words, _ = noise.words(
        len(slots), elements, seed=seed, step=step, first_sample=torch.tensor(slots),
        stream=noise.stream(noise.Purpose.TRAINING_CHAIN, 1),
    )  # fmt: skip
    return noise.normal(words).flatten(1)[:, :elements].reshape(len(slots), *shape)


def trained_rule(settings, steps=0, model=None):
    trainer = MultiGridTrainer(model, None, settings, quiet=True, device="cpu")
    for iteration in range(steps):
        trainer.rule.update(trainer._loop.batches.batch(iteration), iteration)
    return trainer.rule, trainer


@pytest.mark.parametrize("name", ["fire", "chimes"])
def test_a_linear_energy_has_the_closed_form_of_its_chain(name):
    """E = −w·x: K steps from x₀ are m + σ²w + aᴷ(x₀ − m − σ²w) + Σ aᴷ⁻¹⁻ᵏ s ε_k, a = 1 − drift/σ², m = 0."""
    dynamics = {"steps": 5, "drift": 0.3, "noise_std": 0.07, "reference_std": 0.9, "grad_clamp": None, "clamp": False}
    settings = config(name, langevin=dynamics, stabilise={"data_noise": 0.0, "noise_anneal": 1.0})
    described = build_model(settings).config()
    described["nets"][0]["activation"] = "none"
    rule, trainer = trained_rule(settings, model=SpatialTemporal.from_config(described))
    net, size = rule.model.nets[0], rule.model.shape
    shape = (rule.model.channels, *size)
    zero = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    (w,) = torch.autograd.grad(net.double().score(zero).sum(), zero)
    net.float()
    a, s = 1 - 0.3 / 0.9**2, 0.07
    x = rule.model.bank.double().clone()
    assert torch.equal(rule.model.bank, rule.model.zeros(3))
    observed = rule.observed(trainer._loop.batches.batch(0))
    for iteration in (0, 1):
        slots = rule.initial.slots.at(iteration, 0, 3).tolist()
        assert sorted(slots) == [0, 1, 2]
        made = rule.synthesise(observed, iteration)
        (found,) = made.images
        draws = [philox(shape, slots, 5 * iteration + k) for k in range(5)]
        expected = 0.81 * w + a**5 * (x[slots] - 0.81 * w) + sum(a ** (4 - k) * s * e for k, e in enumerate(draws))
        assert (found.double() - expected).abs().max() < 2e-5
        rule.keep([made], 0)  # the second update goes on where the first ended
        x[slots] = expected


@pytest.mark.parametrize("name", ["fire", "chimes"])
def test_one_update_is_the_contrastive_gradient(name):
    """SGD on mean E(observed) − mean E(chains), the chains held fixed: against float64 convolutions."""
    settings = config(
        name, optimiser={"name": "sgd", "lr": 0.1, "schedule": "constant"},
        stabilise={"data_noise": 0.0, "energy_l2": 0.0, "noise_anneal": 1.0},
    )  # fmt: skip
    rule, trainer = trained_rule(settings)
    net = rule.model.nets[0]
    before = [p.detach().double().requires_grad_() for p in net.parameters()]
    batch = trainer._loop.batches.batch(0)
    rule.update(batch, 0)
    slots = rule.initial.slots.at(0, 0, 3)
    convolve = F.conv3d if name == "fire" else F.conv1d

    def score(x):
        x = x.double()
        for weight, bias, spec in zip(before[0::2], before[1::2], net.specs):
            x = F.silu(convolve(x, weight, bias, spec.stride, spec.kernel // 2))
        return x.flatten(1) @ before[-2][0] + before[-1]

    real, chain = rule.observed(batch)[1], rule.model.bank[slots]
    loss = -score(real).mean() + score(chain).mean()
    for parameter, old, g in zip(net.parameters(), before, torch.autograd.grad(loss, before)):
        assert (parameter.double() - (old - 0.1 * g)).abs().max() < 1e-5


def test_chains_of_places_in_time_do_not_share_noise():
    """Of a video, pixel (c, t, h, w) has the normal number ((c T + t) H + h) W + w: no two frames are alike."""
    rule, trainer = trained_rule(config("fire", langevin={"steps": 1, "noise_std": 0.1, "clamp": False}))
    (found,) = rule.synthesise(rule.observed(trainer._loop.batches.batch(0)), 0).images
    frames = found.transpose(1, 2).flatten(0, 1).flatten(1)
    assert len(torch.unique(frames, dim=0)) == 3 * 4


@pytest.mark.parametrize("name", ["fire", "chimes"])
def test_a_resumed_run_is_the_run_bit_for_bit(name, tmp_path):
    changes = {"steps": 5, "checkpoint_every": 2, "sample_every": 0}
    MultiGridTrainer(None, None, config(name, **changes), quiet=True, out=tmp_path / "whole", device="cpu").fit()
    MultiGridTrainer(None, None, config(name, **changes), quiet=True, out=tmp_path / "parts", device="cpu").fit(2)
    again = MultiGridTrainer(None, None, config(name, **changes), quiet=True, out=tmp_path / "parts", device="cpu")
    assert again.resume() == 2
    again.fit()
    whole, parts = (Model.load(tmp_path / folder) for folder in ("whole", "parts"))
    assert isinstance(whole, SpatialTemporal) and len(whole.bank) == 3
    for key, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[key]), key
    for key in ("shape", "rate"):
        assert getattr(whole, key) == getattr(parts, key)


@pytest.mark.parametrize("name", ["fire", "chimes"])
def test_a_sample_depends_on_its_number_alone(name):
    rule, _ = trained_rule(config(name), steps=2)
    model = rule.model
    whole = model.sample(5, seed=3, precision="fp32")
    assert whole.shape == (5, model.channels, *model.shape)
    assert torch.equal(whole[2:4], model.sample(2, seed=3, first_sample=2, batch_size=1, precision="fp32"))
    assert torch.equal(model._start(Group(5, 0, 2)), model.bank[[2, 0, 1, 2, 0]])
    image = torch.zeros(1, model.channels, model.sizes[-1], model.sizes[-1])
    with pytest.raises(ValueError, match="mask must be None"):
        model.sample(1, mask=image.bool(), known=image)
    assert model.explain(2)


def test_sounds_are_in_the_units_of_the_model():
    settings = config("chimes", value_range=[0.0, 10.0])
    clips = load_data(settings)
    raw = load_sound("simulated:chimes", 40, rate=11025.0, hop=1000)
    assert len(clips) == len(raw) and np.allclose(clips.recording, 5 + 5 * raw.recording, atol=1e-5)
    rule, _ = trained_rule(settings)
    assert torch.equal(rule.model.zeros(1), torch.full((1, 1, 40), 5.0))


def test_settings_that_do_not_fit_are_told():
    with pytest.raises(ConfigError, match=r"spatial-temporal.size must be \[frames, height, width\] or \[samples\]"):
        METHODS["spatial-temporal"].build_model(config("fire", {"size": [4, 6]}))
    with pytest.raises(ConfigError, match="channels must be 1 for sounds"):
        build_model(config("chimes", channels=3))
    with pytest.raises(ValueError, match="data must be what the method 'multigrid' takes, got clips"):
        clips = Clips(np.zeros((1, 4, 8, 8), np.uint8), 2)
        MultiGridTrainer(None, clips, load_preset("digits"), quiet=True)


# the commands

SMALL = ["--set", "steps=2", "--set", "langevin.steps=2", "--set", "width=0.1", "--threads", "1"]


def mgebm(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    frames = np.random.default_rng(0).integers(0, 256, (9, 10, 12, 3)).astype(np.uint8)
    write_gif(folder / "own.gif", frames, 25)
    write_wav(folder / "own.wav", np.sin(np.arange(400) / 5), 11025)
    sizes = {"fire": "spatial-temporal.size=[6,8,8]", "chimes": "spatial-temporal.size=[200]"}
    for name, data in (("fire", "own.gif"), ("chimes", "own.wav")):
        mgebm("train", name, "--data", folder / data, *SMALL, "--set", sizes[name], "--out", folder / name)
    return folder


def test_a_video_is_written_in_every_form(runs, tmp_path):
    from PIL import Image

    for name in ("a.gif", "a.png", "a.npy"):
        mgebm("sample", runs / "fire", "--num", 2, "--out", tmp_path / name)
    mgebm("sample", runs / "fire", "--num", 1, "--out", tmp_path / "frames")
    mgebm("sample", runs / "fire", "--num", 2, "--out", tmp_path / "several")
    array = np.load(tmp_path / "a.npy")
    assert array.shape == (2, 3, 6, 8, 8) and array.dtype == np.uint8
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 6 and gif.info["duration"] == 40
    frames = sorted(path.name for path in (tmp_path / "frames").iterdir())
    assert frames == [f"frame_{i:05d}.png" for i in range(6)]
    with Image.open(tmp_path / "frames" / "frame_00003.png") as frame:
        assert np.array_equal(np.asarray(frame), array[0, :, 3].transpose(1, 2, 0))
    assert len(list((tmp_path / "several").glob("sample_0000[01]/frame_*.png"))) == 12
    assert list((runs / "fire" / "samples").glob("*.png"))


def test_a_sound_is_written_in_every_form(runs, tmp_path):
    for name in ("a.wav", "a.png", "a.npy"):
        mgebm("sample", runs / "chimes", "--out", tmp_path / name)
    mgebm("sample", runs / "chimes", "--num", 2, "--out", tmp_path / "several")
    array = np.load(tmp_path / "a.npy")
    assert array.shape == (1, 1, 200) and array.dtype == np.float32
    from mgebm_fast.data.sound import read_wav

    samples, rate = read_wav(tmp_path / "a.wav")
    assert rate == 11025 and np.abs(samples - array[0, 0]).max() < 2 / 32767
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == ["sample_00000.wav", "sample_00001.wav"]


@pytest.mark.parametrize(("name", "num"), [("fire", 1), ("fire", 2), ("chimes", 1)])
def test_overwrite_leaves_no_recording_of_before(runs, tmp_path, name, num):
    out = tmp_path / "x"
    mgebm("sample", runs / name, "--num", 3, "--out", out)
    (out / "notes.txt").write_text("mine")
    (out / "sample_mine.wav").write_text("mine too")
    mgebm("sample", runs / name, "--num", num, "--seed", 5, "--out", out, "--overwrite")
    mgebm("sample", runs / name, "--num", num, "--seed", 5, "--out", tmp_path / "fresh")
    written = {path.relative_to(out).as_posix() for path in out.rglob("*")} - {"notes.txt", "sample_mine.wav"}
    assert written == {path.relative_to(tmp_path / "fresh").as_posix() for path in (tmp_path / "fresh").rglob("*")}
    assert (out / "notes.txt").read_text() == "mine" and (out / "sample_mine.wav").read_text() == "mine too"


def test_a_recording_is_read_once(runs, tmp_path, monkeypatch):
    from mgebm_fast.data import video

    read, whole = [], video.load_video
    monkeypatch.setattr(video, "load_video", lambda *a, **k: read.append(1) or whole(*a, **k))
    small = [*SMALL, "--set", "spatial-temporal.size=[6,8,8]"]
    mgebm("train", "fire", "--data", runs / "own.gif", *small, "--out", tmp_path / "run")
    assert len(read) == 1


@pytest.mark.parametrize("name", ["fire", "chimes"])
def test_chains_of_videos_and_sounds_are_diagnosed(runs, tmp_path, name):
    """The last potential is U = E + ‖x − m‖²/2σ² of the samples, whose chains these are."""
    mgebm("diagnose", runs / name, "--num", 4, "--out", tmp_path)
    (chain,) = json.loads((tmp_path / "report.json").read_text())["chains"]
    model = Model.load(runs / name)
    steps = model.sampling[0]
    assert (chain["chains"], chain["steps"]) == (4, steps.steps)
    x = model.sample(4, seed=0, precision="fp32")
    with torch.no_grad():
        potential = model.nets[0](x).double()
    if steps.reference_std is not None:
        potential += (x.double() - steps.reference_mean).square().flatten(1).sum(1) / (2 * steps.reference_std**2)
    assert chain["potential_last"] == pytest.approx(float(np.median(potential)), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--data", "{runs}/own.gif"], "data must be images here, got the video"),
        (["train", "digits", "--data", "{runs}/own.wav"], "data must be images here, got the sound"),
        (["train", "fire", "--data", "{runs}/own.wav"], "data: must be a video for a net of size"),
        (["train", "chimes", "--data", "{runs}/own.gif"], "data: must be a sound for a net of size"),
        (["train", "fire", "--data", "digits"], "data: must be a video for the method"),
        (["train", "chimes", "--data", "digits"], "data: must be a sound for the method"),
        (["train", "chimes", "--set", "flips=true"], "flips must be false for sounds, size [16384]"),
        (["train", "fire", "--set", "shifts=3"], "shifts must be 0 for the method 'spatial-temporal'"),
        (["sample", "{runs}/fire", "--out", "x.wav"], "--out: must end in .gif"),
        (["sample", "{runs}/chimes", "--out", "x.gif"], "--out: must end in .wav"),
        (["sample", "{runs}/chimes", "--num", "2", "--out", "x.wav"], "--out: must be a folder to hold 2 sounds"),
        (["sample", "{runs}/fire", "--grids", "--out", "x.png"], "--grids: must be left out"),
        (["inpaint", "{runs}/fire"], "run: must hold a model of images for `mgebm inpaint`"),
        (["evaluate", "{runs}/chimes"], "run: must hold a model of images for `mgebm evaluate`"),
    ],
)
def test_what_does_not_fit_ends_in_one_sentence(arguments, message, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = mgebm(*(argument.format(runs=runs) for argument in arguments), code=2)
    flat = " ".join(output.replace("│", " ").split())
    assert message in flat and "Traceback" not in flat
    assert not list(tmp_path.glob("x.*"))


def test_the_presets_are_listed_with_their_method():
    listed = {entry["name"]: entry for entry in json.loads(mgebm("presets", "--json"))}
    assert [listed[name]["data"] for name in ("fire", "chimes")] == ["simulated:fire", "simulated:chimes"]
    assert {listed[name]["method"] for name in ("fire", "chimes")} == {"spatial-temporal"}
