"""The work of a run, against what torch counts of the same passes, and equal between presets that are compared."""

from __future__ import annotations

import pytest
import torch
from helpers.training import tiny_config
from torch.utils.flop_counter import FlopCounterMode

from mgebm_fast import nets
from mgebm_fast.learning import METHODS, build_model, load_preset, merge, preset_names, with_work_of, work

COMPARED = [
    name
    for name in preset_names()
    if name.partition("-")[0] in ("digits", "cifar10")
    and load_preset(name).method in ("cd", "pcd", "single-grid-cd", "short-run", "cooperative")
]


def counted(call) -> float:
    """Multiply-accumulates that torch counts while `call` runs: two floating point operations each."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("latent_map", [1, 4])
def test_a_generator_counts_its_transposed_convolutions(latent_map):
    layers = nets.generator_layers(16, channels=3, width=5, latent_map=latent_map)
    generator = nets.Generator(7, layers, latent_map=latent_map)
    z = torch.randn(3, *generator.latent_shape)
    assert 3 * generator.macs() == counted(lambda: generator(z))


def passes(net, x, *, inputs: bool, weights: bool) -> float:
    """Forward and the backward passes asked for, of all layers, as torch counts them; an image."""
    x = x.detach().requires_grad_(inputs)
    net.requires_grad_(weights)
    return counted(lambda: net(x).sum().backward()) / len(x)


@pytest.mark.parametrize("method", ["multigrid", "cd", "pcd", "single-grid-cd", "short-run", "cooperative", "abp"])
def test_an_update_counts_what_torch_counts(method):
    overrides = {method: {"infer_steps": 5}} if method in ("cooperative", "abp") else {}
    config = merge(tiny_config(method=method), overrides)
    model, narrow = build_model(config), METHODS[method].narrow(config)
    expected = 0.0
    if method != "abp":
        for net, chain in zip(model.nets, narrow.dynamics(), strict=True):
            x = torch.randn(4, *net._input_shape)
            expected += chain.steps * passes(net, x, inputs=True, weights=False)
            # learning's x needs no gradient: of the lowest layer that pass is counted all the same
            expected += 2 * passes(net, x, inputs=True, weights=True)
    if method in ("cooperative", "abp"):
        generator, z = model.generator, torch.randn(4, *model.generator.latent_shape)
        expected += 5 * passes(generator, z, inputs=True, weights=False)
        expected += passes(generator, z, inputs=True, weights=True)
        expected += counted(lambda: generator(z)) / 4 if method == "cooperative" else 0
    assert METHODS[method].work(model, config) == pytest.approx(expected, rel=1e-9)
    assert work(config) == pytest.approx(config.steps * config.batch_size * expected, rel=1e-9)


def test_layers_that_are_not_in_use_do_not_count():
    config = merge(
        load_preset("texture"),
        {
            "sizes": [1, 16],
            "steps": 40,
            "generative-convnet": {"grow": 0.5, "layers": [[8, 5, 1], [4, 3, 1], [2, 3, 1]]},
        },
    )
    model = build_model(config)
    passes = 2 * config.langevin.steps + 6
    expected = 0
    for update in range(40):  # one layer for ten updates, two for ten, then all three
        model.depth = 1 + min(update // 10, 2)
        expected += passes * model.net.macs()
    assert work(config) == config.batch_size * expected


def test_a_net_that_begins_later_counts_its_own_updates():
    late = tiny_config(begin=[0.0, 0.5])
    first, last = (net.macs() for net in build_model(late).nets)
    each = 2 * 3 + 6
    assert work(late) == 6 * 8 * each * first + 3 * 8 * each * last


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_its_work(name):
    config = load_preset(name)
    assert work(config) > 0
    assert work(merge(config, {"steps": 2 * config.steps})) == pytest.approx(2 * work(config), rel=0.01)


@pytest.mark.parametrize("name", COMPARED)
def test_presets_that_are_compared_do_equal_work(name):
    assert work(load_preset(name)) == pytest.approx(work(load_preset(name.partition("-")[0])), rel=0.03)


def test_both_data_sets_have_every_baseline():
    assert len(COMPARED) == 10


def test_updates_of_equal_work():
    first, other = load_preset("digits"), load_preset("digits-pcd")
    for steps in (0, 1, 700):  # of the other, whatever it had
        found = with_work_of(first, merge(other, {"steps": steps}))
        assert work(found) == pytest.approx(work(first), rel=0.5 / found.steps)
    assert with_work_of(first, first) == first
    none = merge(first, {"steps": 0})
    assert with_work_of(none, other).steps == 0 and with_work_of(none, none) == none
    assert with_work_of(merge(other, {"steps": 1}), first).steps == 1  # less than a half of an update's
