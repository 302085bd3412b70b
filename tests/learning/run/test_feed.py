"""The order of the data: whole epochs, a function of (seed, update)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.training import tiny_data

from mgebm_fast.learning.run.feed import Batches


def test_epochs_hold_every_image_once():
    batches = Batches(tiny_data(20), 8, seed=3)
    shown = torch.cat([batches.indices(i) for i in range(5)])
    for epoch in range(2):
        assert sorted(shown[20 * epoch : 20 * epoch + 20].tolist()) == list(range(20))
    assert shown[:20].tolist() != shown[20:].tolist()


def test_a_batch_depends_on_seed_and_update_alone():
    forward = Batches(tiny_data(), 8, seed=3, flips=True, shifts=2)
    backward = Batches(tiny_data(), 8, seed=3, flips=True, shifts=2)
    ahead = [forward.batch(i) for i in range(6)]
    for i in reversed(range(6)):
        assert torch.equal(backward.batch(i), ahead[i])
    assert not torch.equal(Batches(tiny_data(), 8, seed=4).indices(0), forward.indices(0))


def test_batches_made_ahead_are_the_same():
    ahead, plain = (Batches(tiny_data(), 8, seed=3, flips=True, ahead=ahead) for ahead in (True, False))
    for iteration in (0, 1, 2, 7, 8, 3):  # a run that is resumed begins elsewhere
        assert torch.equal(ahead.batch(iteration), plain.batch(iteration))


def test_what_goes_wrong_ahead_is_raised_when_its_batch_is_asked_for(monkeypatch):
    batches = Batches(tiny_data(), 8, seed=3, ahead=True)
    monkeypatch.setattr(batches, "indices", lambda i, other: torch.arange(8) if i < 2 else torch.full((8,), 99))
    for iteration in range(2):
        batches.batch(iteration)
    with pytest.raises(IndexError):
        batches.batch(2)


def test_a_set_smaller_than_a_batch_fills_it():
    shown = Batches(tiny_data(3), 8, seed=0).indices(0)
    assert len(shown) == 8 and sorted(shown[:3].tolist()) == [0, 1, 2] and sorted(shown[3:6].tolist()) == [0, 1, 2]


def test_shifts_move_images_each_way_alike_and_mirror_the_border():
    data, most = tiny_data(400), 2
    got, images = Batches(data, 400, seed=1, shifts=most).batch(0), Batches(data, 400, seed=1).batch(0)
    wide = np.pad(images.numpy(), ((0, 0), (0, 0), (most, most), (most, most)), mode="symmetric")
    found = {}
    for down in range(-most, most + 1):
        for right in range(-most, most + 1):
            window = wide[:, :, most - down : most - down + 4, most - right : most - right + 4]
            found[down, right] = (got.numpy() == window).reshape(400, -1).all(1)
    assert np.any(list(found.values()), 0).all()
    assert all(4 <= int(moved.sum()) <= 36 for moved in found.values())  # 16 expected of each, four deviations
    halves = [Batches(data, 400, seed=1, shifts=most, places=places) for places in (range(200), range(200, 400))]
    assert torch.equal(torch.cat([half.batch(0) for half in halves]), got)


def test_flips_mirror_about_half():
    data = tiny_data(400)
    flipped, plain = Batches(data, 400, seed=1, flips=True), Batches(data, 400, seed=1)
    got, images = flipped.batch(0), plain.batch(0)
    mirrored = (got == images.flip(-1)).flatten(1).all(1)
    same = (got == images).flatten(1).all(1)
    assert bool((mirrored | same).all())
    assert 150 < int(mirrored.sum()) < 250  # five standard deviations


def test_another_draw_for_a_batch_has_other_images_and_leaves_the_order_as_it_was():
    ahead, plain = (Batches(tiny_data(200), 8, seed=3, ahead=ahead) for ahead in (True, False))
    first, other = ahead.batch(0), ahead.batch(0, 1)
    assert torch.equal(other, plain.batch(0, 1)) and not torch.equal(other, first)
    assert not torch.equal(other, plain.batch(0, 2))
    assert torch.equal(ahead.batch(1), Batches(tiny_data(200), 8, seed=3).batch(1))
