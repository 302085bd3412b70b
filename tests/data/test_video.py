"""Videos: frames at one size and rate out of every kind of source, back into files, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mgebm_fast.data import Clips, load
from mgebm_fast.data.simulated import simulated_fire
from mgebm_fast.data.video import load_video, write_gif, write_mp4
from mgebm_fast.errors import DataError


def blocks(frames=6, height=8, width=12, seed=0):
    """Frames of a few colours, (T, H, W, 3) uint8."""
    values = np.random.default_rng(seed).integers(0, 2, (frames, height, width, 3))
    return (values * 200 + 20).astype(np.uint8)


def test_clips_are_windows_in_order():
    clips = load_video("simulated:fire", (20, 16, 24), 3)
    frames = simulated_fire(70, 16, 24)
    assert len(clips) == 51 and clips.shape == (20, 16, 24) and clips.rate == 25 and clips.is_video
    batch = clips.batch([0, 50, 7]).numpy()
    assert batch.shape == (3, 3, 20, 16, 24) and batch.dtype == np.uint8
    for clip, start in zip(batch, (0, 50, 7)):
        assert np.array_equal(clip.transpose(1, 2, 3, 0), frames[start : start + 20])
    assert np.allclose(clips.colours()[0].double(), frames.mean((0, 1, 2)), atol=1e-4)
    assert len(load_video("simulated:fire", (20, 16, 24), 3, hop=25)) == 3


def test_clips_refuse_what_they_do_not_hold():
    clips = load_video(blocks(), (6, 8, 12), 3)
    with pytest.raises(IndexError, match=r"\[0, 1\)"):
        clips.batch([1])
    with pytest.raises(ValueError, match="recording must be"):
        Clips(np.zeros((3, 4, 5)), 2)
    assert clips.batch([]).shape == (0, 3, 6, 8, 12)


def test_a_gif_comes_back_as_it_was(tmp_path):
    frames = blocks()
    write_gif(tmp_path / "a.gif", frames, 25)
    clips = load_video(tmp_path / "a.gif", (6, 8, 12), 3)
    assert clips.rate == 25
    assert np.array_equal(clips.batch([0])[0].numpy().transpose(1, 2, 3, 0), frames)


def test_an_mp4_comes_back_nearly_as_it_was(tmp_path):
    pytest.importorskip("av")
    frames = simulated_fire(12, 32, 48)
    write_mp4(tmp_path / "a.mp4", frames, 25)
    clips = load_video(tmp_path / "a.mp4", (12, 32, 48), 3)
    error = clips.batch([0])[0].numpy().transpose(1, 2, 3, 0).astype(float) - frames
    assert clips.rate == 25 and np.abs(error).mean() < 8  # chroma is stored at half the size


def test_frames_of_a_folder_are_ordered_by_name(tmp_path):
    frames = blocks(3)
    for name, frame in zip(("b.png", "a.png", "c.png"), frames):
        Image.fromarray(frame).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no frame")
    clip = load_video(tmp_path, (3, 8, 12), 3).batch([0])[0].numpy().transpose(1, 2, 3, 0)
    assert np.array_equal(clip, frames[[1, 0, 2]])


def test_frames_are_cut_around_the_middle_and_reduced_by_means(tmp_path):
    frames = np.random.default_rng(1).integers(0, 256, (2, 8, 20, 3)).astype(np.uint8)
    clip = load_video(frames, (2, 4, 4), 3).batch([0])[0].numpy().transpose(1, 2, 3, 0)
    middle = frames[:, :, 6:14].astype(float).reshape(2, 4, 2, 4, 2, 3).mean((2, 4))
    assert np.abs(clip - middle).max() <= 1  # rows, then columns, each rounded


def test_a_rate_takes_the_frame_on_show(tmp_path):
    frames = np.repeat(np.arange(8, dtype=np.uint8)[:, None, None] * 10, 4, 1).repeat(4, 2)  # 25 a second
    half = load_video(frames, (4, 4, 4), 1, rate=12.5).batch([0])[0, 0, :, 0, 0].tolist()
    twice = load_video(frames, (16, 4, 4), 1, rate=50).batch([0])[0, 0, :, 0, 0].tolist()
    assert half == [0, 20, 40, 60] and twice == [v for v in range(0, 80, 10) for _ in (0, 1)]


def test_grey_and_colour(tmp_path):
    np.save(tmp_path / "a.npy", blocks()[..., 0])
    clip = load_video(tmp_path / "a.npy", (6, 8, 12), 3).batch([0])[0]
    assert (clip[0] == clip[1]).all() and (clip[0] == clip[2]).all()
    assert load_video("simulated:fire", (5, 8, 8), 1).channels == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.mp4", None, "is not a file, a folder of frames or the built-in video"),
        ("a.txt", b"words", "a video must be a folder of frames"),
        ("a.gif", b"no gif", "cannot be read as a GIF"),
        ("a.npy", b"no array", "cannot be read as an array"),
    ],
)
def test_what_is_no_video_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_video(tmp_path / name, (2, 4, 4), 3)


def test_too_short_empty_or_damaged(tmp_path):
    with pytest.raises(DataError, match="must have at least 7 frames, got 6"):
        load_video(blocks(), (7, 8, 12), 3)
    with pytest.raises(DataError, match="must hold the frames of a video as pictures, got none"):
        load_video(tmp_path, (2, 4, 4), 3)
    with pytest.raises(DataError, match="uint8"):
        load_video(np.zeros((4, 4)), (2, 4, 4), 3)
    (tmp_path / "a.mp4").write_bytes(b"no film at all")
    with pytest.raises(DataError, match="cannot be read as a video|needs the package av"):
        load_video(tmp_path / "a.mp4", (2, 4, 4), 3)


@pytest.mark.parametrize(("name", "kind"), [("x.avi", "video"), ("simulated:fire", "video"), ("x.wav", "sound")])
def test_images_are_not_read_from_recordings(name, kind):
    with pytest.raises(DataError, match=f"data must be images here, got the {kind} {name}"):
        load(name, size=8, channels=3)
