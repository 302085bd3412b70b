"""SingleGrid: where its samples start, seeds, groups, known pixels, and its files."""

from __future__ import annotations

import pytest
import torch

from mgebm_fast import noise, ops
from mgebm_fast.errors import CheckpointError
from mgebm_fast.models import MultiGrid, SingleGrid
from mgebm_fast.models.single import STARTS
from mgebm_fast.sampling import Langevin

CHAIN = Langevin(3, drift=0.5, noise_std=0.1, clamp=(-1.0, 1.0))


def model(start="noise", norm="none", **more):
    more = {"channels": 2, "variant": "compact", "width": 0.25, "value_range": (-1.0, 1.0), "langevin": CHAIN, **more}
    m = SingleGrid(4, start=start, norm=norm, batch_size=4, **more)
    draw = torch.Generator().manual_seed(0)
    m.set_colours(torch.rand(6, 2, generator=draw) * 2 - 1)
    if start == "bank":
        m.bank = torch.rand(10, 2, 4, 4, generator=draw) * 2 - 1
    return m


def start_of(m, n, seed, first=0):
    """The starts, by the noise's own functions."""
    if m.start == "noise":
        where = noise.stream(noise.Purpose.SAMPLING_STATE, 1)
        return 2 * ops.noise((n, 2, 4, 4), seed=seed, step=0, first_sample=first, stream=where,
                             distribution="uniform") - 1  # fmt: skip
    if m.start == "colours":
        return m.draw_colours(n, seed=seed, first_sample=first).expand(n, 2, 4, 4).contiguous()
    where = noise.stream(noise.Purpose.SAMPLING_BANK, 1)
    return m.bank[noise.integers(len(m.bank), n, seed=seed, step=0, first_sample=first, stream=where)]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("steps", [None, 5])
def test_a_sample_is_a_chain_from_its_start(start, steps):
    m = model(start, sample_steps=steps)
    expected = Langevin(steps or 3, drift=0.5, noise_std=0.1, clamp=(-1.0, 1.0))(
        m.nets[0], start_of(m, 6, 7), seed=7, stream=noise.stream(noise.Purpose.SAMPLING, 1), precision="fp32"
    )
    means, x = m.sample(6, seed=7, return_grids=True, batch_size=6, precision="fp32")
    torch.testing.assert_close(x, expected)
    torch.testing.assert_close(means, x.mean((2, 3), keepdim=True))
    assert m.sampling[0].steps == (steps or 3) and m.langevin == (CHAIN,)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_samples_go_on_where_others_stopped(start, norm):
    m = model(start, norm)
    ten = m.sample(10, seed=3)
    torch.testing.assert_close(m.sample(3, seed=3), ten[:3])
    torch.testing.assert_close(m.sample(6, seed=3, first_sample=4), ten[4:])
    assert not torch.equal(m.sample(3, seed=4), ten[:3])


@pytest.mark.parametrize("start", STARTS)
def test_known_pixels_are_held(start):
    m = model(start)
    known = torch.rand(5, 2, 4, 4) * 2 - 1
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 1:3, 1:3] = True
    x = m.sample(5, mask=mask, known=known)
    assert torch.equal(torch.where(mask, 0.0, x), torch.where(mask, 0.0, known))
    assert not torch.equal(x, known)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("cls", [SingleGrid, MultiGrid])
def test_a_stored_model_says_its_class_and_samples_the_same(tmp_path, start, cls):
    m = model(start, sample_steps=4)
    m.save(tmp_path / "m.safetensors")
    loaded = cls.load(tmp_path / "m.safetensors")
    assert type(loaded) is SingleGrid and loaded.config() == m.config()
    assert torch.equal(loaded.sample(5, seed=1), m.sample(5, seed=1))


def test_files_of_other_classes_are_told(tmp_path):
    MultiGrid((1, 4), channels=2, width=0.25, variant="compact").save(tmp_path / "many.safetensors")
    with pytest.raises(CheckpointError, match="holds no SingleGrid model but a MultiGrid"):
        SingleGrid.load(tmp_path / "many.safetensors")
    with pytest.raises(CheckpointError, match="holds no SingleGrid model but a MultiGrid"):
        model().load_weights(tmp_path / "many.safetensors")


def test_frozen_norm_keeps_the_start_and_the_bank():
    m = model("bank", "batch")
    with m.nets[0].observing():
        m.nets[0](torch.randn(8, 2, 4, 4))
    frozen = m.freeze_norm()
    assert type(frozen) is SingleGrid and frozen.norm == "frozen" and torch.equal(frozen.bank, m.bank)
    assert torch.equal(frozen.colours, m.colours) and frozen.sample(2).shape == (2, 2, 4, 4)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="start must be one of colours, noise, bank, got 'data'"):
        model("data")
    with pytest.raises(ValueError, match="sample_steps must be a positive int or None, got 0"):
        model(sample_steps=0)
    with pytest.raises(ValueError, match="must hold a bank of chains"):
        SingleGrid(4, start="bank", channels=1, width=0.2, variant="compact").sample(1)
