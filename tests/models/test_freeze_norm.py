"""freeze_norm of every class of model: the nets that chains see are the frozen ones, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast.models import CoopNets, Frame, GenerativeConvNet, MultiGrid, SingleGrid, SpatialTemporal
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import ConvSpec, EnergyNet, Generator, generator_layers
from mgebm_fast.sampling import Langevin

RANGE = (-4.0, 4.0)
CHAIN = Langevin(3, step_size=0.3, reference_std=1.0, clamp=RANGE)
LAYERS = [ConvSpec(4, 3), ConvSpec(3, 3, 2)]


def frame(norm):
    net = EnergyNet(4, 1, [ConvSpec(4, 3)], norm=norm, activation="relu", seed=6)
    return Frame(4, nets=[net], sample_steps=3, channels=1, langevin=CHAIN, value_range=RANGE)


def make(kind, norm):
    """A model of two layers or more, with colours and a bank, and running statistics where it keeps any."""
    plain = {"channels": 1, "langevin": CHAIN, "value_range": RANGE, "norm": norm, "seed": 5}
    built = {**plain, "variant": "compact", "width": 0.25}
    generator = Generator(3, generator_layers(4, 1, width=2), seed=1, value_range=RANGE)
    model = {
        "MultiGrid": lambda: MultiGrid((1, 2, 4), **built),
        "SingleGrid": lambda: SingleGrid(4, start="bank", **built),
        "GenerativeConvNet": lambda: GenerativeConvNet(4, LAYERS, sample_steps=3, **plain),
        "GenerativeConvNet in growth": lambda: GenerativeConvNet(4, LAYERS, sample_steps=3, depth=1, **plain),
        "Frame": lambda: frame(norm),
        "CoopNets": lambda: CoopNets(4, generator, Inference(2, 0.1, 0.3), **built),
        "SpatialTemporal": lambda: SpatialTemporal((4, 4, 4), [ConvSpec(3, 3)], **plain),
    }[kind]()
    draw = torch.Generator().manual_seed(2)
    model.set_colours(torch.randn(6, 1, generator=draw))
    if hasattr(model, "bank"):
        model.bank = torch.randn(5, *model.bank.shape[1:], generator=draw)
    for net in model.nets:
        with net.observing():
            net(torch.randn(16, 1, *net.size, generator=draw))
    return model


KINDS = [
    "MultiGrid", "SingleGrid", "GenerativeConvNet", "GenerativeConvNet in growth", "Frame", "CoopNets",
    "SpatialTemporal",
]  # fmt: skip


def energies(model):
    """What the chains of a model see."""
    return [model.net] if isinstance(model, GenerativeConvNet) else list(model.nets)


@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_energies_are_the_frozen_nets(kind, norm):
    model = make(kind, norm)
    frozen = model.freeze_norm()
    assert type(frozen) is type(model) and frozen.norm == {"none": "none", "batch": "frozen"}[norm]
    draw = torch.Generator().manual_seed(3)
    for net, other, seen, expected in zip(
        model.nets, frozen.nets, energies(frozen), [e.freeze_norm() for e in energies(model)], strict=True
    ):
        x = torch.randn(5, 1, *net.size, generator=draw)
        assert torch.equal(seen(x), expected(x)) and torch.equal(other(x), net.freeze_norm()(x))
    whole = frozen.sample(3, seed=1, precision="fp32")
    torch.testing.assert_close(frozen.sample(2, seed=1, precision="fp32"), whole[:2], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_without_batch_statistics_the_samples_are_the_same(kind):
    model = make(kind, "none")
    frozen = model.freeze_norm()
    assert torch.equal(frozen.sample(3, seed=1), model.sample(3, seed=1))
    for (name, ours), theirs in zip(frozen.named_parameters(), model.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad and ours.data_ptr() != theirs.data_ptr(), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_model_stays_on_its_device(kind, norm):
    frozen = make(kind, norm).to("cuda").freeze_norm()
    assert {tensor.device.type for tensor in frozen.state_dict().values()} == {"cuda"}
    assert frozen.sample(2, seed=1).device.type == "cuda"
