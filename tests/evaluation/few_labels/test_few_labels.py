"""Few labels: features by hooks, draws, the scale, the classifiers, and a planted problem that good features win."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mgebm_fast as mg
from mgebm_fast.data import ImageData
from mgebm_fast.evaluation import energy_features
from mgebm_fast.evaluation.few_labels import few_labels
from mgebm_fast.evaluation.few_labels.few_labels import draw_labelled
from mgebm_fast.evaluation.few_labels.readout import Scale, kernel_predictions, logistic_predictions, net_predictions
from mgebm_fast.models import GeneratorModel, SingleGrid
from mgebm_fast.models.latent import Inference
from mgebm_fast.nets import ConvSpec, EnergyNet


def model_of(size=8, channels=1, norm="none", width=0.25, seed=0, layers=None):
    if layers:
        net = EnergyNet(size, channels, layers, norm=norm, seed=seed)
        return SingleGrid(size, channels=channels, nets=[net], value_range=(-1.0, 1.0))
    return mg.MultiGrid(
        (1, 4, size), channels=channels, norm=norm, variant="compact", width=width, value_range=(-1.0, 1.0), seed=seed
    )


def bytes_of(n, channels=1, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


def data_of(images, labels, names=("a", "b"), name="planted"):
    return ImageData(images, np.asarray(labels, np.int64), names, name)


# features


def test_features_are_what_reaches_each_head():
    model, images = model_of(channels=2), bytes_of(300, 2)
    caught = {}
    for i, net in enumerate(model.nets):
        net.head.register_forward_pre_hook(lambda module, inputs, i=i: caught.update({i: inputs[0].flatten(1)}))
    found = energy_features(model, images)
    x = torch.from_numpy(images).double() / 255 * 2 - 1
    with torch.no_grad():
        for i, (size, net) in enumerate(zip((4, 8), model.nets, strict=True)):
            energies = net(F.avg_pool2d(x, 8 // size).float())
            assert torch.allclose(found[i], caught[i], atol=1e-5)
            # and with the head they are the energies
            assert torch.allclose(F.linear(found[i], net.head.weight, net.head.bias)[:, 0], -energies, atol=1e-4)


def test_large_top_maps_are_averaged_to_4_by_4():
    model = model_of(16, layers=[ConvSpec(3, 3)])
    images = bytes_of(5, size=16)
    (found,) = energy_features(model, images)
    with torch.no_grad():
        whole = model.nets[0].layers[0](torch.from_numpy(images).float() / 127.5 - 1)
    assert found.shape == (5, 3 * 16)
    assert torch.allclose(found.reshape(5, 3, 4, 4), whole.reshape(5, 3, 4, 4, 4, 4).mean((3, 5)), atol=1e-5)


def test_features_of_batch_statistics_do_not_depend_on_the_batch_and_leave_the_model_alone():
    model, images = model_of(norm="batch"), bytes_of(40)
    x = model.from_uint8(torch.from_numpy(images))
    for size, net in zip((4, 8), model.nets, strict=True):
        with net.observing():
            net(F.avg_pool2d(x, 8 // size))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    whole, few = energy_features(model, images), energy_features(model, images[7:9])
    for a, b in zip(whole, few, strict=True):
        assert torch.allclose(a[7:9], b, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_features_refuse_what_has_none():
    generator = mg.nets.Generator(4, mg.nets.generator_layers(8, channels=1, width=4), seed=0)
    alone = GeneratorModel(generator, Inference(steps=1, step_size=0.1, std=0.3))
    with pytest.raises(ValueError, match="a GeneratorModel, which has no energy"):
        energy_features(alone, bytes_of(2))
    foreign = SingleGrid(8, channels=1, nets=[torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 1))])
    with pytest.raises(ValueError, match="of the classes EnergyNet and ResidualNet, got Sequential"):
        energy_features(foreign, bytes_of(2))
    for wrong in (bytes_of(2, size=4), bytes_of(2, 3), bytes_of(2).astype(np.float32)):
        with pytest.raises(ValueError, match=r"must be uint8 \(N, 1, 8, 8\), got"):
            energy_features(model_of(), wrong)


def test_no_images_have_no_features():
    assert [f.shape for f in energy_features(model_of(), bytes_of(0))] == [
        (0, f.shape[1]) for f in energy_features(model_of(), bytes_of(1))
    ]


def test_scale_gives_blocks_equal_variance_a_coordinate():
    generator = torch.Generator().manual_seed(0)
    blocks = [5 + 3 * torch.randn(500, 8, generator=generator), 0.01 * torch.randn(500, 24, generator=generator)]
    blocks[1][:, 3] = 7.0  # a unit that never changes
    out = Scale(blocks)(blocks)
    assert torch.allclose(out.mean(0), torch.zeros(32), atol=1e-5)
    variance = out.var(0, unbiased=False)
    assert variance.sum().item() == pytest.approx(1, abs=1e-4)
    assert variance[:8].mean().item() == pytest.approx(1 / 32, abs=1e-5)
    assert variance[8:].mean().item() == pytest.approx(1 / 32, abs=1e-5)
    assert variance[8 + 3] < 1e-6


# draws


def test_draws_are_stratified_nested_and_a_function_of_seed_and_draw():
    labels = np.random.default_rng(0).integers(0, 3, 200) * 2  # classes 0, 2, 4
    ten = draw_labelled(labels, 10, draw=0, seed=1)
    assert np.array_equal(np.unique(labels[ten], return_counts=True)[1], [10, 10, 10])
    assert len(np.unique(ten)) == 30 and np.array_equal(ten, np.sort(ten))
    assert np.array_equal(ten, draw_labelled(labels, 10, draw=0, seed=1))
    assert set(ten) < set(draw_labelled(labels, 20, draw=0, seed=1))
    for other in (draw_labelled(labels, 10, draw=1, seed=1), draw_labelled(labels, 10, draw=0, seed=2)):
        assert not np.array_equal(ten, other)
    with pytest.raises(ValueError, match=r"per_class must be at most \d+, the images of class \d, got 199"):
        draw_labelled(labels, 199, draw=0)


def test_every_contender_gets_the_same_draws_of_training_images_and_the_whole_test(monkeypatch):
    """The test set's labels are 1 where those of the training set cannot be: nothing is fitted on it."""
    from mgebm_fast.evaluation.few_labels import readout

    seen, tested = [], []

    def record(known, n):
        seen.append(np.asarray(known).copy())
        tested.append(n)
        return np.zeros(n, np.int64)

    for name in ("kernel_predictions", "logistic_predictions"):
        monkeypatch.setattr(readout, name, lambda own, known, test: record(known, len(test)))
    inputs = []

    def whole(nets, reference, labelled, known, test, *, seed):
        inputs.append((seed, labelled[-1].clone()))
        return record(known, len(test[0]))

    monkeypatch.setattr(readout, "net_predictions", whole)
    labels = np.random.default_rng(1).integers(0, 2, 60)
    train, test = data_of(bytes_of(60), labels), data_of(bytes_of(25, seed=9), np.ones(25))
    model = model_of()
    result = few_labels({"m": model}, train, test, labels=(3, 5), draws=2, seed=4, fine_tune=True)
    assert set(tested) == {25}
    assert len(seen) == 6 * 4
    each = [seen[i : i + 4] for i in range(0, 24, 4)]
    for known in each[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(known, each[0], strict=True))
    # the images of the nets trained end to end are those of the draw
    order = [(k, d) for k in (3, 5) for d in (0, 1)]
    for (seed, x), (k, d) in zip(inputs, order * 2, strict=True):
        chosen = draw_labelled(labels, k, draw=d, seed=4)
        assert seed == d
        assert torch.equal(x, model.from_uint8(torch.from_numpy(train.images[chosen])))
    assert all(row["accuracy"]["3"]["mean"] == 0 for row in result["contenders"])


# classifiers


@pytest.mark.parametrize("classify", [kernel_predictions, logistic_predictions])
def test_classifiers_keep_the_names_of_classes_and_separate_what_is_separable(classify):
    rng = np.random.default_rng(0)
    labels, truth = np.repeat([2, 5, 9], 6), np.repeat([2, 5, 9], 40)
    centres = {2: (1, 0), 5: (0, 1), 9: (-1, -1)}
    points = [np.array([centres[k] for k in y]) + 0.1 * rng.standard_normal((len(y), 2)) for y in (labels, truth)]
    assert (classify(points[0], labels, points[1]) == truth).mean() > 0.99


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_net_trained_end_to_end_learns_and_leaves_its_start_alone(norm):
    rng = np.random.default_rng(0)
    labels, truth = np.repeat([3, 7], 10), np.repeat([3, 7], 50)

    def stripes(y):
        x = rng.standard_normal((len(y), 1, 8, 8)) * 0.3
        x[y == 3, :, ::2] += 1
        x[y == 7, :, :, ::2] += 1
        return torch.from_numpy(x).float()

    net = EnergyNet(8, 1, [ConvSpec(4, 3), ConvSpec(8, 3, 2)], norm=norm, seed=1)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    own, test = stripes(labels), stripes(truth)
    found = [net_predictions([net], [test], [own], labels, [test], seed=s, steps=60) for s in (0, 0)]
    assert np.array_equal(*found)
    assert (found[0] == truth).mean() > 0.95
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


# all of it


def checkers(n, seed):
    """Two classes of noise that differ in the sign of one texture under a random contrast of either sign: pixels are
    alike on average, a net that rectifies the texture's response tells them apart."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    pattern = np.where(np.indices((8, 8)).sum(0) % 2, 1.0, -1.0)
    other = np.where(np.arange(8) % 4 < 2, 1.0, -1.0)[:, None] * np.ones(8)
    sign = rng.choice([-1.0, 1.0], (n, 1, 1))
    x = sign * np.where(labels[:, None, None] == 1, pattern, other) + 2.0 * rng.standard_normal((n, 8, 8))
    return np.clip(128 + 20 * x, 0, 255).astype(np.uint8)[:, None], labels


def planted_model():
    """The absolute responses to both textures: what an ideal learner would have found."""
    net = EnergyNet(8, 1, [ConvSpec(4, 8, 8), ConvSpec(2, 1)], norm="none", activation="relu", seed=0)
    pattern = torch.where((torch.arange(8)[:, None] + torch.arange(8)) % 2 == 1, 1.0, -1.0)
    other = torch.where(torch.arange(8) % 4 < 2, 1.0, -1.0)[:, None] * torch.ones(8)
    layer = net.layers[0]
    with torch.no_grad():
        layer.weight.copy_(torch.stack([pattern, -pattern, other, -other])[:, None])
        net.layers[1].weight.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])[:, :, None, None])
    return net


def test_good_features_win_where_labels_are_few():
    (x, y), (z, t) = checkers(200, 0), checkers(150, 1)
    net = planted_model()
    model = SingleGrid(8, channels=1, nets=[net], value_range=(-1.0, 1.0))
    result = few_labels({"planted": model}, data_of(x, y), data_of(z, t), labels=(4,), draws=2, seed=0)
    mean = {row["kind"]: row["accuracy"]["4"]["mean"] for row in reversed(result["contenders"])}
    assert mean["learned"] > 0.95
    assert mean["learned"] > max(mean["pixels"], mean["supervised"], mean["random"]) + 0.1


def test_figures_are_a_function_of_the_seed_and_models_of_the_same_layers_share_rows(monkeypatch):
    monkeypatch.setattr(net_predictions, "__kwdefaults__", {**net_predictions.__kwdefaults__, "steps": 5})
    (x, y), (z, t) = checkers(60, 0), checkers(30, 1)
    models = {"a": model_of(), "b": model_of(seed=1), "c": model_of(width=0.5)}
    args = (data_of(x, y), data_of(z, t))
    steps = []
    one = few_labels(models, *args, labels=(3,), draws=2, seed=5, progress=lambda *row: steps.append(row))
    rows = [(row["kind"], row["run"], row["nets"]) for row in one["contenders"]]
    assert rows == [
        ("learned", "a", "a"), ("learned", "b", "b"), ("learned", "c", "c"), ("supervised", None, "a"),
        ("random", None, "a"), ("supervised", None, "c"), ("random", None, "c"), ("pixels", None, None),
        ("pixels", None, None),
    ]  # fmt: skip
    assert [row[1] for row in steps] == list(range(18)) and {row[2] for row in steps} == {18}
    for row in one["contenders"]:
        figures = row["accuracy"]["3"]
        assert figures["mean"] == pytest.approx(np.mean(figures["draws"]))
        assert figures["std"] == pytest.approx(np.std(figures["draws"], ddof=1))
    alone = few_labels({"a": models["a"]}, *args, labels=(3,), draws=2, seed=5)
    same = {row["name"]: row["accuracy"] for row in one["contenders"]}
    assert all(same[row["name"]] == row["accuracy"] for row in alone["contenders"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ()}, "labels must be different numbers of images a class, at least 2, got"),
        ({"labels": (1,)}, "at least 2, got"),
        ({"labels": (3, 3)}, "labels must be different"),
        ({"labels": (31,)}, "labels must be at most 30, the training images of class 'b', got 31 in planted"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"seed": -1}, "seed"),
        ({"models": {}}, "models must hold at least one model, got none"),
        (
            {"models": {"big": model_of(16)}},
            "models must be of 1 x 8 x 8 images like the data, got big, of 1 x 16 x 16",
        ),
        ({"train": data_of(bytes_of(70), np.zeros(70))}, "at least two classes, got 1 in planted"),
        ({"train": ImageData(bytes_of(70))}, "must be labelled, with at least two classes, got no labels in data"),
        ({"held_out": data_of(bytes_of(0), [])}, "must hold out labelled images to test on, got none of planted"),
        ({"held_out": ImageData(bytes_of(4))}, "must hold out labelled images"),
    ],
)
def test_bad_input_is_refused_in_words(change, message):
    arguments = {
        "models": {"m": model_of()},
        "train": data_of(bytes_of(70), np.repeat([0, 1], [40, 30])),
        "held_out": data_of(bytes_of(10), np.arange(10) % 2),
        "labels": (5,),
        "draws": 1,
        "seed": 0,
    } | change
    positional = [arguments.pop(key) for key in ("models", "train", "held_out")]
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        few_labels(*positional, **arguments)
