"""A class-conditional MultiGrid: labels as planes that chains hold, energies of an image and a class."""

import pytest
import torch

from mgebm_fast import noise, ops
from mgebm_fast.models import MultiGrid
from mgebm_fast.sampling import Langevin, langevin_sample

CLASSES = ("cat", "dog", "frog")
LAW = {"drift": 0.5, "noise_std": 0.1, "clamp": (-1.0, 1.0)}


def conditional(sizes=(1, 2, 4), channels=2, classes=CLASSES, **more):
    more = {"langevin": Langevin(3, **LAW), "norm": "none", "variant": "compact", "width": 0.25, **more}
    m = MultiGrid(sizes, channels=channels, classes=classes, value_range=(-1.0, 1.0), **more)
    draw = torch.Generator().manual_seed(0)
    colours = 2 * torch.rand(20, channels, generator=draw) - 1
    if classes:
        m.set_colours(colours, torch.randint(len(classes), (20,), generator=draw))
    else:
        m.set_colours(colours)
    return m


def planes(labels, size):
    own = torch.nn.functional.one_hot(labels, len(CLASSES)) / 4  # an eighth of the range
    return own[:, :, None, None].expand(-1, -1, size, size)


def test_a_chain_is_that_of_the_energy_of_images_with_the_planes_held():
    m, labels = conditional(), torch.tensor([2, 0, 1, 1])
    start = m.colours[:4][:, :, None, None]
    found = m.cascade(start, labels=labels, seed=5, precision="fp32")
    x = start
    for grid, (size, net) in enumerate(zip(m.sizes[1:], m.nets, strict=True), start=1):
        x = langevin_sample(
            lambda y, net=net, size=size: net(torch.cat([y, planes(labels, size)], 1)),
            ops.upsample(x, size // x.shape[-1]),
            steps=3, seed=5, stream=noise.stream(noise.Purpose.SAMPLING, grid), precision="fp32", **LAW,
        )  # fmt: skip
        assert found[grid].shape == (4, 2, size, size)
        torch.testing.assert_close(found[grid], x, rtol=1e-4, atol=1e-5)


def test_the_class_of_a_sample_is_its_own_whatever_its_neighbours_are_of():
    m = conditional()
    mixed = m.sample(3, seed=1, labels=torch.tensor([0, 2, 1]))
    for place, label in enumerate((0, 2, 1)):
        torch.testing.assert_close(mixed[place], m.sample(3, seed=1, labels=label)[place])
    colours = {tuple(row.tolist()) for row in m.colours[m.labels == 2]}
    starts = m.sample(40, seed=0, labels=2, return_grids=True)[0]
    assert {tuple(row.tolist()) for row in starts[:, :, 0, 0]} <= colours


def test_without_labels_classes_come_as_often_as_in_the_stored_colours():
    m = conditional()
    drawn = m.draw_labels(4000, seed=3)
    shares = torch.bincount(m.labels, minlength=3) / len(m.labels)
    torch.testing.assert_close(torch.bincount(drawn, minlength=3) / 4000, shares, rtol=0, atol=0.03)
    starts = m.sample(4, seed=3, return_grids=True)[0]
    torch.testing.assert_close(
        m.sample(4, seed=3), m.cascade(starts, labels=drawn[:4], seed=3)[-1], rtol=1e-5, atol=1e-6
    )


def test_energies_are_those_of_the_nets_and_sum_over_classes():
    m = conditional(langevin=Langevin(3, reference_std=0.7, **LAW))
    x = 2 * torch.rand(5, 2, 4, 4) - 1
    of_class = m.class_energies(x, reference=True)
    for size, net in zip(m.sizes[1:], m.nets, strict=True):
        at_size = x if size == 4 else ops.pyramid(x, [size])[0]
        for label in range(3):
            expected = net(torch.cat([at_size, planes(torch.full((5,), label), size)], 1)).detach()
            expected = expected + at_size.square().flatten(1).sum(1) / (2 * 0.7**2)
            torch.testing.assert_close(of_class[size][:, label], expected)
        torch.testing.assert_close(m.energies(x, reference=True)[size], -torch.logsumexp(-of_class[size], 1))
    bytes_ = m.to_uint8(x)
    torch.testing.assert_close(m.class_energies(bytes_)[4], m.class_energies(m.from_uint8(bytes_))[4])


def test_known_pixels_and_label_planes_are_held_together():
    m = conditional()
    known = 2 * torch.rand(1, 2, 4, 4) - 1
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:, :2] = False
    seen = []
    follow = lambda grid, step, x: seen.append(x.clone())  # noqa: E731
    filled = m.sample(2, labels=1, seed=0, mask=mask, known=known, callback=follow)
    assert torch.equal(filled[:, :, :, :2], known[..., :2].expand(2, -1, -1, -1))
    assert not torch.equal(filled[0, :, :, 2:], filled[1, :, :, 2:])
    for x in seen:
        assert torch.equal(x[:, 2:], planes(torch.tensor([1, 1]), x.shape[-1]))


@pytest.mark.parametrize("half", [False, True])
def test_a_file_holds_classes_and_labels(tmp_path, half):
    m = conditional()
    m.save(tmp_path / "m.safetensors", half=half)
    again = MultiGrid.load(tmp_path / "m.safetensors")
    assert again.classes == CLASSES and torch.equal(again.labels, m.labels)
    if not half:
        assert torch.equal(again.sample(3, seed=2, labels=1), m.sample(3, seed=2, labels=1))
    assert "classes" not in conditional(classes=()).config()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda m: m.sample(2, labels=3), "labels must be from 0 to 2"),
        (lambda m: m.sample(2, labels=torch.tensor([0, 1, 2])), r"int64 tensor \(2,\).*got torch.int64 \(3,\)"),
        (lambda m: m.sample(2, labels=torch.tensor([0.0, 1.0])), "int64 tensor"),
        (lambda m: m.sample(2, labels=True), "labels must be a class number"),
        (lambda m: m.cascade(torch.zeros(2, 2, 1, 1)), "labels must be given for a class-conditional model"),
        (lambda m: m.cascade(torch.zeros(2, 2, 1, 1), labels=0, known=torch.zeros(2, 4, 4)), "got known alone"),
        (lambda m: m.set_colours(torch.zeros(2, 2)), "labels must be given"),
        (lambda m: conditional(classes=()).sample(2, labels=0), "labels must be None"),
        (lambda m: conditional(classes=()).class_energies(torch.zeros(1, 2, 4, 4)), "must be class-conditional"),
        (lambda m: conditional(classes=("a",)), "classes must be two or more different names"),
        (lambda m: conditional(classes=("a", "a")), "classes must be two or more different names"),
        (lambda m: conditional(nets=conditional(classes=()).nets), "net of size 2 must take"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(conditional())


def test_a_class_that_no_stored_colour_has_is_named():
    m = conditional()
    m.set_colours(torch.zeros(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="frog"):
        m.sample(1, labels=2)
