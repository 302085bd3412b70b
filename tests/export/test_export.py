"""Exports: energies equal to the model's without mgebm_fast, chains of the same law, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import mgebm_fast as mg
from mgebm_fast.export import export, plain
from mgebm_fast.export.describe import plain_model, plain_tensors
from mgebm_fast.export.script import script
from mgebm_fast.models import CoopNets, Frame, GenerativeConvNet, GeneratorModel, MultiGrid, SingleGrid, SpatialTemporal
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import ConvSpec, DeconvSpec, EnergyNet, Generator, ResidualNet

STILL = mg.Langevin(3, drift=0.5, noise_std=0.0, reference_std=2.0, reference_mean=0.25, grad_clamp=0.5, clamp=(-1, 1))
SHARED = {"channels": 1, "langevin": STILL, "value_range": (-1.0, 1.0)}
SMALL = {**SHARED, "norm": "none", "variant": "compact", "width": 0.1}
LAYERS = [ConvSpec(3, 3), ConvSpec(4, 3, 2)]
GENERATOR = [DeconvSpec(3, 2, 2), DeconvSpec(1, 4, 2)]


def coloured(model):
    """Every sample starts alike, so that the noise of starts does not matter."""
    model.set_colours(torch.full((1, model.channels), 0.3))
    return model


def banked(model):
    model.bank = torch.rand(1, *model.sample_shape(model.sizes[-1]), generator=torch.Generator().manual_seed(2))
    return model


MODELS = {
    "MultiGrid": lambda: coloured(MultiGrid((1, 2, 4), **SMALL, batch_size=3)),
    "linear": lambda: coloured(MultiGrid((1, 2, 4, 8), **SMALL, upsampling="linear")),
    "cycles": lambda: coloured(MultiGrid((1, 2, 4, 8), **SMALL, upsampling="linear", cycles=[4, 2])),
    "annealed": lambda: coloured(
        MultiGrid(
            (1, 2, 4),
            **{
                **SMALL,
                "langevin": [
                    STILL,
                    dataclasses.replace(STILL, drift=mg.Schedule(0.5, 0.1, "geometric"), reference_std=[2.0, 1.0, 0.5]),
                ],
            },
        )
    ),  # fmt: skip
    "spectral": lambda: coloured(MultiGrid((1, 4), **{**SMALL, "spectral_norm": True, "activation": "silu"})),
    "batch": lambda: coloured(MultiGrid((1, 2, 4), **{**SMALL, "norm": "batch"}, batch_size=4)),
    "residual": lambda: coloured(MultiGrid((1, 4, 8), **{**SMALL, "variant": "residual", "spectral_norm": True})),
    "pooled": lambda: coloured(
        MultiGrid(
            (1, 8),
            **SHARED,
            nets=[ResidualNet(8, 1, [3, 4], depth=2, activation="leaky_relu", negative_slope=0.1, head="sum")],
        )
    ),
    "bank": lambda: banked(SingleGrid(4, start="bank", sample_steps=2, **SMALL)),
    "GenerativeConvNet": lambda: GenerativeConvNet(6, LAYERS, depth=1, sample_steps=4, **SHARED),
    "Frame": lambda: Frame(6, layers=LAYERS, sample_steps=2, **SHARED),
    "video": lambda: banked(SpatialTemporal((4, 6, 6), LAYERS, **SHARED)),
    "sound": lambda: banked(SpatialTemporal((8,), LAYERS, **SHARED)),
}


def images(model, n=5):
    return torch.rand(n, *model.sample_shape(model.sizes[-1]), generator=torch.Generator().manual_seed(1)) * 2 - 1


def energies_of(model, x):
    return torch.stack(list(model.energies(x).values()), 1)


def run(code, folder):
    """Python in `folder`, in which importing mgebm_fast fails."""
    blocked = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'mgebm_fast':\n"
        "            raise ImportError('mgebm_fast is not here')\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", MODELS)
def test_energies_and_chains_in_plain_torch_are_the_models(kind):
    model = MODELS[kind]()
    described, tensors = plain_model(model), plain_tensors(model, start=True)
    energies = plain.Energies(described).requires_grad_(False)
    energies.load_state_dict({name: t for name, t in tensors.items() if name.startswith("size_")})
    x = images(model)
    torch.testing.assert_close(energies(x), energies_of(model, x), rtol=1e-4, atol=1e-5)
    drawn = plain.sample(described, energies, tensors, 6)
    torch.testing.assert_close(drawn, model.sample(6, precision="fp32"), rtol=1e-4, atol=1e-4)


def test_a_generators_images_start_its_chains():
    generator = Generator(2, GENERATOR, activation="relu", output="tanh", value_range=(-1.0, 1.0))
    model = CoopNets(4, generator, Inference(2, 0.1, 0.3), **SMALL)
    described, tensors = plain_model(model), plain_tensors(model, start=True)
    net = plain.Generator(described["generator"])
    net.load_state_dict({k.removeprefix("generator."): v for k, v in tensors.items() if k.startswith("generator.")})
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(z[:, :, None, None]), generator(z))
    started = plain.start(described, tensors, 0, 5, torch.Generator().manual_seed(0))
    assert started.shape == (5, 1, 4, 4)
    assert "class Generator" in script(described, "x")


def test_chain_noise_has_the_std_of_the_description():
    model = GenerativeConvNet(
        16, LAYERS, sample_steps=1, channels=1, langevin=mg.Langevin(1, drift=1e-9, noise_std=0.7)
    )
    described = plain_model(model)
    energies = plain.Energies(described)
    x = plain.langevin(energies, torch.zeros(40, 1, 16, 16), described["chains"][0], torch.Generator().manual_seed(0))
    assert float(x.std()) == pytest.approx(0.7, rel=0.03)  # 10,240 draws: 4 standard errors


def test_a_sampler_runs_where_mgebm_fast_is_not(tmp_path):
    model = MODELS["MultiGrid"]()
    assert [path.name for path in export(model, "sampler", tmp_path / "grid.py")] == ["grid.safetensors", "grid.py"]
    x = images(model)
    save_file({"x": x, "energies": energies_of(model, x)}, tmp_path / "known.safetensors")
    run(
        "import os, runpy, torch, grid\n"
        "from safetensors.torch import load_file\n"
        "known = load_file('known.safetensors')\n"
        "energies, stored = grid.load(grid.MODEL, 'grid.safetensors')\n"
        "torch.testing.assert_close(energies(known['x']), known['energies'], rtol=1e-4, atol=1e-5)\n"
        "sys.argv = ['grid.py', '--num', '5', '--out', 'x.npy']\n"
        "runpy.run_path('grid.py', run_name='__main__')\n"
        "for wrong in (('--num', '0'), ('--out', 'x.jpg'), ('--out', 'none/x.png'), ('--weights', 'none')):\n"
        "    sys.argv = ['grid.py', *wrong]\n"
        "    try: runpy.run_path('grid.py', run_name='__main__')\n"
        "    except SystemExit as error: assert error.code == 2, error\n"
        "    else: raise AssertionError(wrong)\n"
        "assert not os.path.exists('samples.png')\n"
        "sys.argv = ['grid.py', '--num', '5', '--out', 'x.png']\n"
        "runpy.run_path('grid.py', run_name='__main__')\n",
        tmp_path,
    )
    import numpy as np
    from PIL import Image

    drawn = torch.from_numpy(np.load(tmp_path / "x.npy"))
    torch.testing.assert_close(drawn, model.sample(5, precision="fp32"), rtol=1e-4, atol=1e-4)
    assert Image.open(tmp_path / "x.png").size == (3 * 42, 2 * 42)
    assert "mgebm_fast" not in (tmp_path / "grid.py").read_text()


@pytest.mark.parametrize("kind", ["residual", "mixed"])
def test_a_samplers_file_has_the_layers_that_its_nets_need(kind, tmp_path):
    model = MODELS["residual"]()
    if kind == "mixed":
        nets = [EnergyNet(4, 1, LAYERS, norm="none"), model.nets[1]]
        model = coloured(MultiGrid((1, 4, 8), **SHARED, nets=nets, batch_size=5))
    export(model, "sampler", tmp_path / "x.py")
    source = (tmp_path / "x.py").read_text()
    assert ("def stacked_layers" in source) == ("def layers_of" in source) == (kind == "mixed")
    names = {"__name__": "x"}
    exec(compile(source, "x.py", "exec"), names)
    energies, stored = names["load"](names["MODEL"], tmp_path / "x.safetensors")
    x = images(model)
    torch.testing.assert_close(energies(x), energies_of(model, x), rtol=1e-4, atol=1e-5)
    drawn = names["sample"](names["MODEL"], energies, stored, 5)
    torch.testing.assert_close(drawn, model.sample(5, precision="fp32"), rtol=1e-4, atol=1e-4)


def test_a_state_dict_says_how_it_is_loaded(tmp_path):
    code = ""
    for kind, finest in (("MultiGrid", 4), ("residual", 8)):
        model = MODELS[kind]()
        export(model, "state-dict", tmp_path / f"{kind}.safetensors")
        with safe_open(tmp_path / f"{kind}.safetensors", "pt") as file:
            metadata = file.metadata()
        x = images(model)
        save_file({"x": x, "energies": energies_of(model, x)}, tmp_path / f"{kind}-known.safetensors")
        code += metadata["how_to_load"] + (
            f"known = load_file('{kind}-known.safetensors')\n"
            f"energy = -nets[{finest}](known['x']).sum(1)\n"
            "assert (energy - known['energies'][:, 1]).abs().max() < 1e-5\n"
        )
        assert json.loads(metadata["model"])["kind"] == "MultiGrid"
    run(code, tmp_path)


def test_torchscript_is_the_energies_of_any_number_of_images(tmp_path):
    for kind in ("MultiGrid", "residual", "pooled", "video"):
        model = MODELS[kind]()
        export(model, "torchscript", tmp_path / "x.pt")
        traced = torch.jit.load(tmp_path / "x.pt")
        for n in (1, 5):
            x = images(model, n)
            torch.testing.assert_close(traced(x), energies_of(model, x), rtol=1e-4, atol=1e-5)


def test_onnx_is_the_energies_of_any_number_of_images(tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    for kind in ("MultiGrid", "residual"):
        model = MODELS[kind]()
        export(model, "onnx", tmp_path / "x.onnx")
        session = ReferenceEvaluator(onnx.load(tmp_path / "x.onnx"))
        for n in (1, 5):
            (found,) = session.run(None, {"x": images(model, n).numpy()})
            expected = energies_of(model, images(model, n))
            torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_onnx_says_how_to_get_it(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else real(name))
    with pytest.raises(ModuleNotFoundError, match=r'onnx needs onnx and onnxscript: pip install "mgebm_fast\[onnx\]"'):
        export(MODELS["MultiGrid"](), "onnx", tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


def test_with_batch_statistics_energies_are_the_frozen_models(tmp_path):
    model = MODELS["batch"]()
    for net, size in zip(model.nets, (2, 4), strict=True):
        with net.observing():
            net(images(model, 8)[:, :, :size, :size])
    export(model, "torchscript", tmp_path / "x.pt")
    x = images(model)
    expected = energies_of(model.freeze_norm(), x)
    torch.testing.assert_close(torch.jit.load(tmp_path / "x.pt")(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "to", "name", "words"),
    [
        ("MultiGrid", "pickle", "x.pt", "to must be one of state-dict, .*, got 'pickle'"),
        ("MultiGrid", "torchscript", "x.bin", "out must end in .pt for torchscript, got .*x.bin"),
        ("MultiGrid", "sampler", "my-model.py", "out must be named as a Python module"),
        ("MultiGrid", "sampler", "class.py", "out must be named as a Python module"),
        ("MultiGrid", "sampler", "torch.py", "out must have another name than a module, which it would hide: torch"),
        ("MultiGrid", "sampler", "random.py", "which it would hide: random"),
    ],
)
def test_wrong_names_are_refused(tmp_path, model, to, name, words):
    with pytest.raises(ValueError, match=words):
        export(MODELS[model](), to, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_leave_are_refused_by_name(tmp_path):
    generator = Generator(2, GENERATOR)
    hamiltonian = mg.Langevin(2, step_size=0.1, reference_std=1.0)
    cases = [
        (GeneratorModel(generator, Inference(2, 0.1, 0.3)), "must hold a model with energies, got a GeneratorModel"),
        (
            Frame(6, layers=LAYERS, leapfrog_steps=2, **{**SHARED, "langevin": hamiltonian}),
            "got a Frame with Hamiltonian",
        ),
        (MultiGrid((1, 2, 4), **SMALL), "be trained, with colours that chains start from"),
        (
            MultiGrid((1, 4), **SMALL, nets=[torch.nn.Flatten(0)]),
            "must be EnergyNets or ResidualNets to be exported, got Flatten",
        ),
    ]
    for model, words in cases:
        with pytest.raises(ValueError, match=words):
            export(model, "sampler", tmp_path / "x.py")
    assert not list(tmp_path.iterdir())


def test_what_differs_from_the_model_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(plain.Energy, "forward", lambda self, x: x.flatten(1).sum(1))
    with pytest.raises(RuntimeError, match="energies must be the model's"):
        export(MODELS["MultiGrid"](), "torchscript", tmp_path / "x.pt")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = MODELS["MultiGrid"]()
    with torch.no_grad():
        model.nets[0].head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="must be finite"):
        export(model, "state-dict", tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
