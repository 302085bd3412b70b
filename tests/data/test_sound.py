"""Sounds: samples at one rate and scale out of wav files and arrays, back into wav files, their pictures, refusals."""

from __future__ import annotations

import wave

import numpy as np
import pytest

from mgebm_fast.data.simulated import simulated_chimes
from mgebm_fast.data.sound import load_sound, read_wav, spectrogram, waveform, write_wav
from mgebm_fast.errors import DataError


def tone(length, rate, frequency, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(length) / rate)


def test_a_wav_file_comes_back_to_half_a_level(tmp_path):
    samples = tone(1000, 8000, 440)
    write_wav(tmp_path / "a.wav", samples, 8000)
    read, rate = read_wav(tmp_path / "a.wav")
    assert rate == 8000 and read.dtype == np.float32
    assert np.abs(read * (32768 / 32767) - samples).max() < 0.51 / 32767


@pytest.mark.parametrize("width", [1, 2, 4])
def test_channels_are_averaged_at_every_width(width, tmp_path):
    left, right = tone(500, 8000, 300), tone(500, 8000, 700)
    peak = 2 ** (8 * width - 1) - 1
    both = np.rint(np.stack([left, right], 1) * peak)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(8000)
        file.writeframes((both + 128).astype("u1").tobytes() if width == 1 else both.astype(f"<i{width}").tobytes())
    read, _ = read_wav(tmp_path / "a.wav")
    assert np.abs(read - (left + right) / 2).max() < 2 / peak + 1e-6


def test_clips_of_the_built_in_sound():
    clips = load_sound("simulated:chimes", 1000, rate=11025, hop=500)
    whole = simulated_chimes(60000, 11025)
    assert clips.shape == (1000,) and not clips.is_video and len(clips) == 119 and clips.channels == 1
    assert np.allclose(clips.batch([3])[0, 0].numpy(), whole[1500:2500], atol=1e-6)
    assert float(clips.colours()) == 127.5


def test_a_sound_is_scaled_and_brought_to_a_rate(tmp_path):
    write_wav(tmp_path / "a.wav", tone(16000, 16000, 440, amplitude=0.1), 16000)
    clips = load_sound(tmp_path / "a.wav", 7000, rate=8000)
    samples = clips.recording[0]
    assert clips.rate == 8000 and len(samples) == 8000 and np.abs(samples).max() == pytest.approx(0.9)
    inner = samples[500:7500].astype(float)
    expected = tone(8000, 8000, 440, amplitude=1.0)[500:7500]
    scale = (inner @ expected) / (expected @ expected)
    assert np.abs(inner - scale * expected).max() < 1e-3 * scale


def test_what_is_no_sound_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no sound at all")
    (tmp_path / "a.mp3").write_bytes(b"")
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    for name, message in (
        ("a.wav", "cannot be read as a wav file"),
        ("a.mp3", "must be a .wav file"),
        ("a.npy", "must be a sound"),
        ("none.wav", "got .*none.wav', which does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            load_sound(tmp_path / name, 10)
    with pytest.raises(DataError, match="not all zero"):
        load_sound(np.zeros(100), 10)
    with pytest.raises(DataError, match="must have at least 10 samples, got 5"):
        load_sound(np.ones(5), 10)


def test_a_spectrogram_is_darkest_at_the_frequency():
    picture = spectrogram(tone(8000, 8000, 1000), height=64, width=50)
    assert picture.shape == (64, 50) and picture.dtype == np.uint8
    rows = 64 - 1 - picture[:, 5:-5].argmin(axis=0)  # from the bottom: 0 … 4000 Hz
    assert np.abs((rows + 0.5) * 4000 / 64 - 1000).max() <= 4000 / 64


def test_a_waveform_spans_what_the_samples_reach():
    picture = waveform(np.concatenate([np.zeros(50), tone(50, 50, 10, amplitude=1.0)]), height=101, width=10)
    dark = picture < 128
    assert dark[:, 0].nonzero()[0].tolist() == [50]
    assert dark[:, 7].sum() > 80
