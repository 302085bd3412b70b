"""Folders and archives: order, classes, and everything that can be wrong with them."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from mgebm_fast.data import encoded, load
from mgebm_fast.data import files as files_module
from mgebm_fast.errors import DataError


def write_zip(path, files, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "zip", "stored.zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def source(request, pictures, write_folder, tmp_path):
    if request.param == "folder":
        return write_folder(pictures)
    path = tmp_path / f"images.{request.param}"
    if "zip" in request.param:
        return write_zip(path, pictures, zipfile.ZIP_STORED if "stored" in request.param else zipfile.ZIP_DEFLATED)
    return write_tar(path, pictures, "w:" + request.param.partition(".")[2])


def test_every_container_gives_the_same_images(source):
    data = load(source, size=4, channels=3, split="all")
    assert data.images.shape == (24, 3, 4, 4) and data.images.dtype == np.uint8
    assert data.class_names == ("cat", "dog") and data.skipped == ()
    np.testing.assert_array_equal(data.labels, np.repeat([0, 1], 12))
    np.testing.assert_array_equal(data.images[:, 1, 0, 0], np.tile(10 * np.arange(12), 2))  # natural order: 2 < 10
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], 100 * data.labels)


def test_only_the_chosen_class_is_decoded(source, monkeypatch):
    decoded = []
    monkeypatch.setattr(files_module, "decode", lambda *a: decoded.append(a) or np.zeros((3, 4, 4), np.uint8))
    data = load(source, size=4, channels=3, classes=["dog"], split="all")
    assert len(data) == len(decoded) == 12
    assert data.class_names == ("dog",) and (data.labels == 0).all()


def test_labels_follow_the_order_of_the_classes(source):
    data = load(str(source), size=4, channels=3, classes=["dog", "cat", "dog"], split="all")
    assert data.class_names == ("dog", "cat")
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], np.where(data.labels == 0, 100, 0))


def test_unknown_class_is_suggested(source):
    with pytest.raises(DataError, match=r"cat, dog .*'dogs' \(did you mean 'dog'\?\)"):
        load(source, size=4, channels=3, classes=["dogs"])


def test_nested_hidden_and_foreign_files(pictures, write_folder, encode):
    files = {f"deep/down/{path}": data for path, data in pictures.items()}
    files |= {".hidden/x.png": b"", "cat/.x.png": b"", "__MACOSX/cat/x.png": b"", "cat/notes.txt": b"hello"}
    data = load(write_folder(files), size=8, channels=3, split="all", strict=True)
    assert len(data) == 24 and data.class_names == ("cat", "dog")


def test_loose_images_have_no_labels(pictures, write_folder):
    pictures["loose.png"] = pictures["cat/cat0.png"]
    folder = write_folder(pictures)
    data = load(folder, size=8, channels=3, split="all")
    assert len(data) == 25 and data.labels is None and data.class_names == ()
    with pytest.raises(DataError, match="loose.png lies directly in it"):
        load(folder, size=8, channels=3, classes="cat")


def test_class_folders_sort_as_numbers(write_folder, pictures):
    image = pictures["cat/cat0.png"]
    data = load(write_folder({f"{i}/x.png": image for i in range(12)}), size=8, channels=3, split="all")
    assert data.class_names == tuple(str(i) for i in range(12))


BROKEN = ["zero", "garbage", "truncated", "not_really", "jpeg_cut"]


def damage(pictures, encode):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    pictures["cat/zero.png"] = b""
    pictures["cat/garbage.png"] = bytes(range(256)) * 4
    pictures["dog/truncated.png"] = encode(noise)[:-3000]
    pictures["dog/not_really.jpg"] = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"
    pictures["dog/jpeg_cut.jpg"] = encode(noise, "JPEG")[:-900]
    return pictures


@pytest.mark.parametrize("container", ["folder", "zip", "tar.gz"])
def test_broken_images_are_listed_and_skipped(container, pictures, encode, write_folder, tmp_path):
    damage(pictures, encode)
    path = tmp_path / f"x.{container}"
    if container == "folder":
        path = write_folder(pictures)
    elif container == "zip":
        write_zip(path, pictures)
    else:
        write_tar(path, pictures, "w:gz")
    with pytest.warns(UserWarning, match="skipped 5 of 29 images; the first, .*: "):
        data = load(path, size=8, channels=3, split="all")
    assert len(data) == len(data.labels) == 24
    assert sorted(name.split("/")[1].split(".")[0] for name, _ in data.skipped) == sorted(BROKEN)
    assert dict(data.skipped)["cat/zero.png"] == "empty file"
    assert dict(data.skipped)["dog/not_really.jpg"] == "not an image, or of an unknown format"
    assert all(why and "\n" not in why and "BytesIO" not in why for _, why in data.skipped)
    np.testing.assert_array_equal(data.images[:, 0, 0, 0], 100 * data.labels)  # labels stay with their images
    with pytest.raises(DataError, match="cat/(zero|garbage).png cannot be used"):
        load(path, size=8, channels=3, split="all", strict=True)


def test_nothing_readable_is_an_error(write_folder):
    folder = write_folder({"a/x.png": b"", "a/y.png": b"nonsense"})
    with pytest.raises(DataError, match="no readable image among 2 .*a/x.png: empty file"):
        load(folder, size=8, channels=3, split="all")


def test_empty_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in the folder .*empty"):
        load(tmp_path / "empty", size=8, channels=3)
    with pytest.raises(DataError, match="no images in the zip archive"):
        load(write_zip(tmp_path / "e.zip", {"readme.txt": b"hi"}), size=8, channels=3)
    with pytest.raises(DataError, match="no images in the tar archive"):
        load(write_tar(tmp_path / "e.tar", {"readme.txt": b"hi"}), size=8, channels=3)


@pytest.mark.parametrize("ending", ["zip", "tar.gz", "tgz", "tar"])
def test_damaged_archives(ending, pictures, tmp_path):
    path = tmp_path / f"x.{ending}"
    whole = write_zip(path, pictures) if ending == "zip" else write_tar(path, pictures, "w:gz")
    path.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be (read as a|decompressed)"):
        load(path, size=8, channels=3)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="cannot be read as a"):
        load(path, size=8, channels=3)


@pytest.mark.parametrize(
    "outside", ["../evil.png", "/tmp/evil.png", "cat/../../evil.png", "C:/evil.png", "..\\evil.png"]
)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_paths_outside_the_archive_are_refused(kind, outside, pictures, tmp_path):
    image = pictures["cat/cat0.png"]
    path = tmp_path / "in" / f"x.{kind}"
    path.parent.mkdir()
    (write_zip if kind == "zip" else write_tar)(path, {**pictures, outside: image})
    before = sorted(tmp_path.rglob("*"))
    with pytest.warns(UserWarning, match="path outside the archive"):
        data = load(path, size=8, channels=3, split="all")
    assert len(data) == 24 and data.skipped == ((outside, "a path outside the archive"),)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was extracted
    with pytest.raises(DataError, match="outside the archive"):
        load(path, size=8, channels=3, split="all", strict=True)


def test_links_in_a_tar_are_not_followed(pictures, tmp_path):
    path = write_tar(tmp_path / "x.tar", pictures)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.warns(UserWarning, match="a link"):
        assert len(load(path, size=8, channels=3, split="all")) == 24


def test_damaged_member_of_a_zip(pictures, tmp_path):
    path = write_zip(tmp_path / "x.zip", pictures, zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[content.find(b"IDAT") + 5] ^= 0xFF  # the checksum no longer fits
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="CRC"):
        data = load(path, size=8, channels=3, split="all")
    assert [name for name, _ in data.skipped] == ["cat/cat0.png"]


def test_oversized_files_are_not_read(monkeypatch, pictures, write_folder, tmp_path):
    pictures["cat/big.png"] = pictures["cat/cat0.png"] + bytes(5000)
    monkeypatch.setattr(files_module, "MAX_FILE_BYTES", 5000)
    for path in (write_folder(pictures), write_zip(tmp_path / "x.zip", pictures)):
        with pytest.warns(UserWarning, match="more than the 5000 allowed"):
            data = load(path, size=8, channels=3, split="all")
        assert [name for name, _ in data.skipped] == ["cat/big.png"]


def test_folders_that_link_in_a_loop_end(pictures, write_folder):
    folder = write_folder(pictures)
    os.symlink(folder, folder / "cat" / "again")
    os.symlink(folder / "nowhere", folder / "cat" / "broken.png")
    with pytest.warns(UserWarning, match="cat/broken.png: No such file"):
        assert len(load(folder, size=8, channels=3, split="all")) == 24


def test_many_small_chunks_keep_their_order(monkeypatch, pictures, write_folder):
    monkeypatch.setattr(files_module, "_CHUNK_IMAGES", 1)
    data = load(write_folder(pictures), size=8, channels=3, split="all")
    np.testing.assert_array_equal(data.images[:, 1, 0, 0], np.tile(10 * np.arange(12), 2))


def test_paths_that_are_not_there(tmp_path, write_folder, pictures):
    folder = write_folder(pictures, "photographs")
    with pytest.raises(DataError, match=r"not a file, a folder or a built-in set .*did you mean 'photographs'"):
        load(folder.with_name("photograph"), size=8, channels=3)
    with pytest.raises(DataError, match=r"'digit' is not .*did you mean 'digits'"):
        load("digit", size=8, channels=1)
    single = tmp_path / "one.png"
    single.write_bytes(pictures["cat/cat0.png"])
    with pytest.raises(DataError, match="must be a folder"):
        load(single, size=8, channels=3)


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_of_pictures(channels, pictures, write_folder):
    with pytest.raises(DataError, match=rf"channels must be 1 \(grey\) or 3 \(colour\) for .*got {channels}"):
        load(write_folder(pictures), size=8, channels=channels)


def test_wrong_arguments(pictures, write_folder):
    folder = write_folder(pictures)
    for bad in ({"size": 0}, {"channels": 0}, {"split": "held-out"}):
        with pytest.raises(DataError, match=f"load: {next(iter(bad))} must be"):
            load(folder, **{"size": 8, "channels": 3, **bad})
    with pytest.raises(TypeError, match="size must be an int"):
        load(folder, size=8.0, channels=3)
    with pytest.raises(TypeError, match="source must be"):
        load(12, size=8, channels=3)


def test_heic_is_read_where_its_package_is(rng, encode, write_folder):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    pixels = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(16, 0).repeat(16, 1)
    upright, turned = Image.fromarray(pixels), Image.fromarray(np.rot90(pixels))
    turned.getexif()[0x0112] = 6  # turned by a quarter, clockwise, it is upright
    files = {
        f"{name}.HEIC": encode(image, "HEIF", quality=-1, exif=image.getexif().tobytes())
        for name, image in (("a", upright), ("b", turned))
    }
    images = load(write_folder(files), size=4, channels=3, split="all").images.astype(int)
    expected = pixels[::16, ::16].transpose(2, 0, 1).astype(int)
    assert np.abs(images - expected).max() <= 4  # it is stored as luma and colour differences
    with pytest.raises(DataError, match="not an image"):
        load(write_folder({"a.heic": files["a.HEIC"][:40]}, "cut"), size=4, channels=3, split="all", strict=True)


def test_heic_without_its_package_is_skipped_by_name(pictures, write_folder, monkeypatch):
    monkeypatch.setattr(encoded, "_heif_opens", lambda: False)
    monkeypatch.setattr(encoded, "FORMATS", [name for name in encoded.FORMATS if name != "HEIF"])
    files = pictures | {"cat/photo.heic": b"\x00\x00\x00\x18ftypheic" + bytes(64)}
    with pytest.warns(UserWarning, match="HEIC, which pip install 'mgebm_fast.heic.' lets it read"):
        data = load(write_folder(files), size=8, channels=3, split="all")
    assert len(data) == len(pictures) and data.skipped[0][0].endswith("photo.heic")
