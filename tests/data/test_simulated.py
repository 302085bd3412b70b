"""The simulated fire and chimes: what a seed promises, and that they are a moving texture and a sound."""

from __future__ import annotations

import numpy as np
import pytest

from mgebm_fast.data.simulated import simulated_chimes, simulated_fire
from mgebm_fast.errors import DataError


def test_fire_moves_upwards_and_cools():
    fire = simulated_fire(12, 32, 24)
    assert fire.shape == (12, 32, 24, 3) and fire.dtype == np.uint8
    rows = fire.astype(float).mean((0, 2, 3))
    assert rows[-8:].mean() > 2 * rows[:8].mean()  # hot below, dark above
    grey = fire.astype(float).mean(3)
    changes = {
        shift: np.abs(grey[1:, : 32 - shift] - grey[:-1, shift:]).mean() if shift >= 0
        else np.abs(grey[1:, -shift:] - grey[:-1, : 32 + shift]).mean()
        for shift in (-2, -1, 0, 1, 2)
    }  # fmt: skip
    assert min(changes, key=changes.get) > 0, changes  # a frame is the one before, moved up
    assert 1 < changes[0] < 40


def test_chimes_are_the_notes_of_their_scale():
    sound = simulated_chimes(22050, 11025)
    assert sound.shape == (22050,) and sound.dtype == np.float32 and np.abs(sound).max() == pytest.approx(0.9)
    power = np.abs(np.fft.rfft(sound)) ** 2
    frequencies = np.fft.rfftfreq(22050, 1 / 11025)
    notes = 523.25 * 2 ** (np.array([0, 2, 4, 7, 9, 12, 14, 16]) / 12)
    near = np.zeros(len(frequencies), bool)
    for ratio in (1.0, 2.756, 5.404):
        for note in notes * ratio:
            near |= np.abs(frequencies - note) < 15
    assert power[near].sum() > 0.9 * power.sum() and near.mean() < 0.2
    assert np.sqrt((sound.reshape(10, -1) ** 2).mean(1)).min() > 0.02  # no part is silent


def test_a_seed_is_all_they_depend_on():
    np.testing.assert_array_equal(simulated_fire(3, 8, 8, seed=4), simulated_fire(3, 8, 8, seed=4))
    assert (simulated_fire(3, 8, 8, seed=4) != simulated_fire(3, 8, 8, seed=5)).any()
    np.testing.assert_array_equal(simulated_chimes(500, seed=4), simulated_chimes(500, seed=4))
    assert (simulated_chimes(500, seed=4) != simulated_chimes(500, seed=5)).any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 5), (1, 7, 1)])
def test_small_fires(shape):
    assert simulated_fire(*shape).shape == (*shape, 3)
    assert simulated_chimes(1).shape == (1,)


def test_wrong_sizes():
    with pytest.raises(DataError, match="frames must be a positive int, got 0"):
        simulated_fire(0)
    with pytest.raises(DataError, match="rate must be a positive int, got 0.5"):
        simulated_chimes(10, 0.5)
