from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch) -> Path:
    """Each test has a cache of its own: nothing is read from, or left in, the user's."""
    folder = tmp_path / "mgebm-cache"
    monkeypatch.setenv("MGEBM_CACHE", str(folder))
    return folder


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def encode():
    def encode(pixels: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        file = io.BytesIO()
        image.save(file, format=format, **options)
        return file.getvalue()

    return encode


@pytest.fixture
def pictures(rng, encode) -> dict[str, bytes]:
    """Path -> PNG: two classes of 12, each 8 x 8 image of one colour, which its place in the class gives."""
    files = {}
    for c, name in enumerate(("cat", "dog")):
        for i in range(12):
            pixels = np.full((8, 8, 3), (100 * c, 10 * i, 7), np.uint8)
            files[f"{name}/{name}{i}.png"] = encode(pixels)
    return files


@pytest.fixture
def write_folder(tmp_path):
    def write(files: dict[str, bytes], name: str = "images") -> Path:
        for path, data in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        return tmp_path / name

    return write
