import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from mgebm_fast.nets import ConvSpec, EnergyNet, compact_layers, multigrid_net
from mgebm_fast.nets.layers import ACTIVATIONS

SMALL = [ConvSpec(6, 5, 2), ConvSpec(8, 3), ConvSpec(5, 3, 2)]


def images(n, channels, size, seed=0, ndim=2):
    return torch.randn(n, channels, *[size] * ndim, generator=torch.Generator().manual_seed(seed))


def by_hand(net, x):
    """f(x) in float64 with every window written out: padding, stride and batch statistics from their definitions."""
    x = x.double()
    for spec, layer in zip(net.specs, net.layers, strict=True):
        pad = spec.kernel // 2
        n, c, h, w = x.shape
        padded = torch.zeros(n, c, h + 2 * pad, w + 2 * pad, dtype=torch.float64)
        padded[:, :, pad : pad + h, pad : pad + w] = x
        windows = padded.unfold(2, spec.kernel, spec.stride).unfold(3, spec.kernel, spec.stride)
        x = torch.einsum("nchwij,ocij->nohw", windows, layer.weight.double())
        if layer.bias is not None:
            x = x + layer.bias.double()[:, None, None]
        if layer.norm is not None:
            mean = x.mean((0, 2, 3), keepdim=True)
            deviation = torch.sqrt(((x - mean) ** 2).mean((0, 2, 3), keepdim=True) + 1e-5)
            x = (x - mean) / deviation * layer.norm.weight.double()[:, None, None]
            x = x + layer.norm.bias.double()[:, None, None]
        x = torch.where(x > 0, x, net.negative_slope * x)
    if net.head is None:
        return x.sum((1, 2, 3))
    return x.reshape(len(x), -1) @ net.head.weight.double()[0] + net.head.bias.double()


def randomised(net, seed=5):
    """The net with every parameter random, so that no bias or scale hides at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


@pytest.mark.parametrize(
    "size, variant, parameters, mmac",
    [
        (4, "A", 414_689, 1.65),
        (4, "B", 414_689, 1.65),
        (16, "A", 1_627_105, 102),
        (16, "B", 1_627_105, 102),
        (64, "A", 439_873, 99),
        (64, "B", 4_315_713, 162),
    ],
)
def test_published_nets_have_their_parameter_counts_and_costs(size, variant, parameters, mmac):
    net = multigrid_net(size, variant=variant)
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert net.macs() / 1e6 == pytest.approx(mmac, rel=6e-3)
    assert net.activation == ("relu" if (size, variant) == (64, "A") else "leaky_relu")


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("head", ["linear", "sum"])
@pytest.mark.parametrize("size", [7, 8])
def test_energy_is_minus_the_score_written_out_by_hand(norm, head, size):
    net = randomised(EnergyNet(size, 3, SMALL, norm=norm, head=head, seed=1))
    x = images(4, 3, size)
    torch.testing.assert_close(net(x).double(), -by_hand(net, x), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(net.score(x), -net(x), rtol=0, atol=0)


def test_gradient_passes_through_the_batch_statistics_exactly():
    net = randomised(EnergyNet(8, 3, SMALL, norm="batch", seed=2)).double()
    x = images(4, 3, 8).double().requires_grad_()
    (ours,) = torch.autograd.grad(net(x).sum(), x)
    (exact,) = torch.autograd.grad(-by_hand(net, x).sum(), x)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-10)


def test_batch_statistics_couple_samples_and_none_does_not():
    x = images(6, 3, 8)
    other = x.clone()
    other[5] += 1.0
    coupled, alone = (EnergyNet(8, 3, SMALL, norm=norm) for norm in ("batch", "none"))
    assert (coupled(x)[0] - coupled(other)[0]).abs() > 1e-4
    assert torch.equal(alone(x)[:5], alone(other)[:5])


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_mode_makes_no_difference_and_nothing_moves_outside_observing(norm):
    net = EnergyNet(8, 3, SMALL, norm=norm, spectral_norm=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = images(4, 3, 8)
    energies = net.train()(x)
    assert torch.equal(net.eval()(x), energies)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with net.observing():
        net(x)
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(getattr(module, "observe", False) for module in net.modules())


def test_observing_ends_with_an_exception():
    net = EnergyNet(8, 3, SMALL)
    with pytest.raises(RuntimeError, match="stop"), net.observing():
        raise RuntimeError("stop")
    net(images(4, 3, 8))
    assert all(int(layer.norm.observed) == 0 for layer in net.layers)


@pytest.mark.parametrize("batches", [1, 3])
def test_freeze_norm_is_the_batch_net_under_its_running_statistics(batches):
    net = randomised(EnergyNet(8, 3, SMALL, norm="batch", spectral_norm=True, seed=3))
    with net.observing(), torch.no_grad():
        for seed in range(batches):
            net(2.0 * images(32, 3, 8, seed=seed) + 1.0)
    frozen = net.freeze_norm()
    assert frozen.norm == "frozen"
    x = images(5, 3, 8, seed=9)
    y = x
    weights = [0.9 ** (batches - 1 - i) for i in range(batches)]
    assert net.layers[0].norm.running_mean.abs().sum() > 0
    for layer in net.layers:
        y = F.conv2d(y, layer.effective_weight(), None, layer.stride, layer.padding)
        total = 0.1 * sum(weights)
        mean, var = layer.norm.running_mean / total, layer.norm.running_var / total
        y = F.leaky_relu(F.batch_norm(y, mean, var, layer.norm.weight, layer.norm.bias, False, 0.0, 1e-5), 0.2)
    torch.testing.assert_close(frozen(x), -net.head(y), rtol=1e-5, atol=1e-5)


def test_a_net_frozen_after_one_batch_agrees_with_that_batch():
    net = randomised(EnergyNet(8, 3, SMALL, norm="batch", seed=3))
    x = images(256, 3, 8)
    with net.observing():
        energies = net(x)
    # The running variance is the unbiased one: at 256 images the two differ by about 1e-3 in the deepest layer.
    torch.testing.assert_close(net.freeze_norm()(x), energies, rtol=5e-3, atol=5e-3)


def test_freeze_norm_refuses_a_net_that_saw_no_data():
    with pytest.raises(ValueError, match="must have observed data"):
        EnergyNet(8, 3, SMALL).freeze_norm()


def test_freeze_norm_copies_a_net_without_batch_statistics():
    net = EnergyNet(8, 3, SMALL, norm="none")
    copy = net.freeze_norm()
    x = images(4, 3, 8)
    assert torch.equal(copy(x), net(x))
    with torch.no_grad():
        copy.head.weight.zero_()
    assert net.head.weight.abs().sum() > 0


def test_spectral_norm_divides_by_the_largest_singular_value_once_it_has_converged():
    net = EnergyNet(8, 3, SMALL, norm="none", spectral_norm=True)
    with torch.no_grad():
        for layer in (*net.layers, net.head):
            layer.weight.mul_(7.0)
    with net.observing(), torch.no_grad():
        for _ in range(200):
            net(images(2, 3, 8))
    for layer in (*net.layers, net.head):
        top = torch.linalg.matrix_norm(layer.effective_weight().detach().flatten(1), 2).item()
        assert top == pytest.approx(1.0, abs=2e-3)


def test_spectral_norm_passes_the_gradient_through_the_norm():
    net = EnergyNet(4, 1, [ConvSpec(3, 3)], norm="none", spectral_norm=True).double()
    x = images(2, 1, 4).double()
    weight = net.layers[0].weight
    net(x).sum().backward()
    # The effective weight does not change with the weight's scale, so the gradient is orthogonal to the weight.
    assert weight.grad.norm() > 1e-3
    assert (weight.grad * weight).sum().abs() < 0.05 * weight.grad.norm() * weight.norm()


def test_weights_come_from_the_seed_alone():
    first, again, other = (EnergyNet(8, 3, SMALL, norm="none", seed=seed) for seed in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.layers[0].weight, other.layers[0].weight)
    bound = (6 / (25 * 3 + 25 * 6)) ** 0.5  # Xavier: fans of the first layer
    assert 0.9 * bound < first.layers[0].weight.abs().max() <= bound
    assert all(not p.any() for name, p in first.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_any_number_of_spatial_dimensions(ndim):
    net = EnergyNet(8, 2, SMALL, ndim=ndim, norm="none")
    assert net(images(3, 2, 8, ndim=ndim)).shape == (3,)


def test_a_rectangular_size_and_a_sum_head_on_any_size():
    assert EnergyNet((8, 6), 1, SMALL)(torch.randn(2, 1, 8, 6)).shape == (2,)
    net = EnergyNet(8, 1, SMALL, head="sum", norm="none")
    assert net(torch.randn(2, 1, 20, 12)).shape == (2,)


@pytest.mark.parametrize("activation", ["leaky_relu", "relu", "silu", "elu", "none"])
def test_config_rebuilds_the_architecture(activation):
    net = EnergyNet(8, 2, SMALL, norm="none", activation=activation, negative_slope=0.1, spectral_norm=True, seed=6)
    copy = EnergyNet.from_config(net.config())
    copy.load_state_dict(net.state_dict())
    x = images(3, 2, 8)
    assert torch.equal(copy(x), net(x))
    assert copy.config() == net.config()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48])
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_every_size_has_a_compact_net(size, norm):
    net = multigrid_net(size, channels=2, norm=norm, variant="compact", width=0.5)
    assert net(images(3, 2, size)).shape == (3,)
    assert max(spec.channels for spec in net.specs) <= 64
    assert net.specs[0] == ConvSpec(16, 3, 1)


def test_compact_layers_halve_the_map_to_four_or_to_an_odd_size():
    assert compact_layers(32) == (ConvSpec(32, 3), ConvSpec(64, 3, 2), ConvSpec(128, 3, 2), ConvSpec(128, 3, 2))
    assert compact_layers(12) == (ConvSpec(32, 3), ConvSpec(64, 3, 2), ConvSpec(128, 3, 2))
    assert compact_layers(8) == compact_layers(4) == (ConvSpec(32, 3), ConvSpec(64, 3, 2), ConvSpec(64, 3))
    assert compact_layers(2) == compact_layers(3) == (ConvSpec(32, 3), ConvSpec(64, 3))


def test_width_multiplies_hidden_channels():
    assert [spec.channels for spec in multigrid_net(16, width=0.25).specs] == [24, 32, 64, 128]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(norm="bach"), r"norm must be one of batch, frozen, none, got 'bach' \(did you mean 'batch'\?\)"),
        (dict(activation="swish"), "activation must be one of"),
        (dict(head="mean"), "head must be one of"),
        (dict(ndim=4), "ndim must be 1, 2 or 3, got 4"),
        (dict(channels=0), "channels must be a positive int, got 0"),
        (dict(size=(8, 8, 8)), "size must have 2 entries"),
        (dict(size=0), "size must be a positive int, got 0"),
        (dict(layers=[]), "layers must hold at least one"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EnergyNet(**{"size": 8, "channels": 3, "layers": SMALL, **arguments})


@pytest.mark.parametrize("arguments", [(0, 3), (4, 0), (4, 3, -1), (True, 3)])
def test_a_layer_of_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="ConvSpec: .* must be a positive int"):
        ConvSpec(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(variant="C"), "variant must be one of A, B, compact, residual, got 'C'"),
        (dict(size=0), "size must be a positive int"),
        (dict(width=-1.0), "width must be a finite number > 0"),
        (dict(norm="frozen"), "then freeze_norm"),
    ],
)
def test_wrong_arguments_of_multigrid_net_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        multigrid_net(**{"size": 8, **arguments})


def test_wrong_inputs_are_named():
    net = EnergyNet(8, 3, SMALL)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3, 8, 8\), got \(2, 1, 8, 8\)"):
        net(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="more than one value a channel"):
        EnergyNet(1, 3, [ConvSpec(4, 3)])(torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nets_survive_pickle_and_torch_save(activation):
    net = EnergyNet(8, 1, [ConvSpec(4, 3, 2)], activation=activation, norm="none")
    x, stored = torch.randn(2, 1, 8, 8), io.BytesIO()
    torch.save(net, stored)
    stored.seek(0)
    for copy in (pickle.loads(pickle.dumps(net)), torch.load(stored, weights_only=False)):
        assert torch.equal(copy(x), net(x))


@pytest.mark.parametrize(("name", "value"), [("activation", "silu"), ("negative_slope", 0.7)])
def test_what_is_set_after_construction_is_what_runs_and_is_stored(name, value):
    layers, x = [ConvSpec(4, 3), ConvSpec(4, 3)], torch.randn(2, 1, 8, 8)
    net = EnergyNet(8, 1, layers, norm="none")
    setattr(net, name, value)
    assert torch.equal(net(x), EnergyNet(8, 1, layers, norm="none", **{name: value})(x))
    assert torch.equal(EnergyNet.from_config(net.config())(x), net(x))
    with pytest.raises(ValueError, match=f"{name} must be"):
        setattr(net, name, "softsign")


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net.layers[1], "activation", "silu"),
        lambda net: setattr(net.layers[0], "stride", 2),
        lambda net: net.layers.append(torch.nn.Identity()),
        lambda net: net.layers.pop(1),
    ],
)
def test_a_net_changed_by_hand_is_not_described_as_another(change):
    net = EnergyNet(8, 1, [ConvSpec(4, 3), ConvSpec(4, 3)], norm="none", head="sum")
    change(net)
    with pytest.raises(ValueError, match=r"layers must be those that it was built with.*layers\.\d was changed"):
        net.config()
