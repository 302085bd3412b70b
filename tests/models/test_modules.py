"""Models as torch modules: state of any number of rows, copies and pickles, and nets of one's own."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers.training import tiny_data

from mgebm_fast.errors import CheckpointError
from mgebm_fast.learning import MultiGridTrainer
from mgebm_fast.models import CoopNets, Frame, GenerativeConvNet, GeneratorModel, MultiGrid, SingleGrid, SpatialTemporal
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import ConvSpec, Generator, generator_layers
from mgebm_fast.sampling import Langevin

CHAIN = Langevin(2, drift=0.1, noise_std=0.1, clamp=(-1.0, 1.0))
COMMON = {"channels": 1, "value_range": (-1.0, 1.0), "langevin": CHAIN}
LAYERS = [ConvSpec(2, 3), ConvSpec(3, 3)]


def generator():
    return Generator(3, generator_layers(4, 1, 4), value_range=(-1.0, 1.0))


MAKE = {
    "MultiGrid": lambda: MultiGrid((1, 2, 4), variant="compact", width=0.1, **COMMON),
    "SingleGrid": lambda: SingleGrid(4, start="bank", variant="compact", width=0.1, norm="none", **COMMON),
    "GenerativeConvNet": lambda: GenerativeConvNet(4, LAYERS, depth=1, sample_steps=9, **COMMON),
    "Frame": lambda: Frame(4, layers=LAYERS, leapfrog_steps=2, sample_steps=9, **COMMON),
    "SpatialTemporal": lambda: SpatialTemporal((4, 4, 4), LAYERS, **COMMON),
    "GeneratorModel": lambda: GeneratorModel(generator(), Inference(2, 0.1, 0.3)),
    "CoopNets": lambda: CoopNets(4, generator(), Inference(2, 0.1, 0.3), variant="compact", width=0.1, **COMMON),
}
ROWS = ("colours", "bank", "latents")


def filled(name: str, rows: int = 7):
    model = MAKE[name]()
    for buffer in ROWS:
        if hasattr(model, buffer):
            setattr(model, buffer, torch.rand(rows, *getattr(model, buffer).shape[1:]) * 2 - 1)
    return model


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("rows", [0, 3])
def test_a_state_dict_brings_its_number_of_rows(name, rows):
    trained, other = filled(name), filled(name, rows)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.sample(2, seed=1), trained.sample(2, seed=1))
    state = {name: torch.zeros(7, 9) if name == "colours" else value for name, value in trained.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for colours"):
        other.load_state_dict(state)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("name", MAKE)
def test_copies_and_pickles_sample_the_same(name, again):
    model = filled(name)
    other = again(model)
    assert other.config() == model.config() and torch.equal(other.sample(2, seed=1), model.sample(2, seed=1))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for value in other.state_dict().values():
        value.zero_()  # of the copy alone, its parts included
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name == "GenerativeConvNet":
        assert other.net.layers[0] is other.nets[0].layers[0]


# nets of one's own


class Mine(torch.nn.Module):
    """With attributes of the names that an `EnergyNet` has, which mean something else here."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.activation, self.norm = size, torch.nn.SiLU(), torch.nn.LayerNorm(size)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(size, size), torch.nn.Linear(size, size)])
        self.layers[1].weight = self.layers[0].weight  # tied

    def forward(self, x):
        for layer in self.layers:
            x = self.activation(self.norm(layer(x)))
        return x.flatten(1).sum(1)


def mine(**more):
    return MultiGrid((1, 2, 4), nets=[Mine(2), Mine(4)], **COMMON, **more)


def test_nets_of_ones_own_train_and_are_stored(tmp_path):
    settings = {"steps": 3, "log_every": 1, "checkpoint_every": 2, "sample_every": 0, "batch_size": 8, "quiet": True}
    more = {"stabilise": {"ema": 0.5}, "optimiser": {"per_layer_divide": True}}
    trainer = MultiGridTrainer(mine(), tiny_data(8), out=tmp_path / "run", **settings, **more)
    assert trainer.fit().finished
    again = mine()
    again.load_weights(tmp_path / "run")
    with trainer.rule.averaged_weights():
        assert torch.equal(again.sample(3, seed=2), trainer.model.sample(3, seed=2))
    assert again.nets[1].layers[0].weight is again.nets[1].layers[1].weight
    for load in (MultiGrid.load, lambda path: MultiGrid.from_config(mine().config())):
        with pytest.raises(CheckpointError, match=r"nets of one's own, .*Mine.*load_weights"):
            load(tmp_path / "run")
    with pytest.raises(CheckpointError, match="stored from a model with other nets"):
        MultiGrid((1, 2, 4), variant="compact", **COMMON).load_weights(tmp_path / "run")
    resumed = MultiGridTrainer(mine(), tiny_data(8), out=tmp_path / "run", **settings, **more)
    assert resumed.resume() == 3


class Extra(Mine):
    def get_extra_state(self):
        return {"words": "no tensor"}

    def set_extra_state(self, state):
        pass


class Fixed(torch.nn.Module):
    def forward(self, x):
        return x.square().flatten(1).sum(1)


def with_buffer(net, value):
    net.register_buffer("more", value)
    return net


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Extra, r"must hold dense real tensors alone.*'nets.0._extra_state', a dict"),
        (lambda size: Fixed(), "every net must have parameters that learn"),
        (lambda size: with_buffer(Mine(size), torch.zeros(2, dtype=torch.complex64)), "dense real.*complex64"),
        (lambda size: with_buffer(Mine(size), torch.zeros(2, device="meta")), "dense real.*'nets.0.more', on meta"),
    ],
)
def test_nets_that_no_file_can_hold_are_refused_before_an_update(tmp_path, net, message):
    model = MultiGrid((1, 4), nets=[net(4)], **COMMON)
    with pytest.raises(ValueError, match=message):
        MultiGridTrainer(model, tiny_data(8), steps=3, batch_size=8, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_nets_that_are_no_modules_are_refused():
    with pytest.raises(TypeError, match="MultiGrid: nets must be torch modules, got a function"):
        MultiGrid((1, 4), nets=[lambda x: x.sum()])
    with pytest.raises(ValueError, match="GenerativeConvNet: nets must be EnergyNets to be grown, got Mine"):
        GenerativeConvNet(4, nets=[Mine(4)], **COMMON)


def test_a_derived_net_is_not_taken_for_its_base(tmp_path):
    """A subclass may compute something else: a file holds its weights, and does not rebuild it as an `EnergyNet`."""
    from mgebm_fast.nets import EnergyNet

    class Doubled(EnergyNet):
        def forward(self, x):
            return 2 * super().forward(x)

    model = SingleGrid(4, nets=[Doubled(4, 1, LAYERS, norm="none")], **COMMON)
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="Doubled"):
        SingleGrid.load(tmp_path / "m.safetensors")
