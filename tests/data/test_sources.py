"""Whose images are read: names that could be two things, parts and classes by folders, and every bound on a source."""

from __future__ import annotations

import errno
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import unicodedata
import warnings
import zlib

import numpy as np
import pytest
from helpers.archives import cifar_bytes, tar_bytes, zip_bytes
from PIL import Image

from mgebm_fast.data import encoded, load, store, video
from mgebm_fast.data.files import MAX_FILE_BYTES
from mgebm_fast.data.sound import load_sound, write_wav
from mgebm_fast.data.video import load_video
from mgebm_fast.errors import DataError
from mgebm_fast.models.occlusions import read_mask


def read(path, split="all", **options):
    return load(path, size=8, channels=3, split=split, **options)


@pytest.fixture
def image(encode):
    return encode(np.full((8, 8, 3), 77, np.uint8))


@pytest.mark.parametrize("name", ["photos", "digits", "lfw", "texture:brick"])
def test_a_name_of_two_things_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = load(name, size=8, channels=1, most=2)
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=rf"builtin:{name} means the set, \./{name} what lies here"):
        load(name, size=8, channels=1)
    assert np.array_equal(load(f"builtin:{name}", size=8, channels=1, most=2).images, whole.images)
    with pytest.raises(DataError, match="no images in the folder"):
        load(f"./{name}", size=8, channels=1)
    with pytest.raises(DataError, match="did you mean 'photos'"):
        load("builtin:photo", size=8, channels=1)


@pytest.mark.parametrize(
    ("train", "others"),
    [("train", ["test"]), ("training", ["testing"]), ("Train", ["val", "test"]), ("train", ["valid"]),
     ("train2017", ["val2017"]), ("train", ["validation"])],
)  # fmt: skip
@pytest.mark.parametrize("form", ["{part}/{c}/{i}.png", "{c}/{part}/{i}.png", "top/{part}/images/{c}/{i}.png"])
def test_folders_named_as_parts_are_parts(train, others, form, image, write_folder):
    files = {form.format(part=p, c=c, i=i): image for p in (train, *others) for c in ("cat", "dog") for i in range(3)}
    folder = write_folder(files)
    parts = {split: read(folder, split) for split in ("train", "held_out", "all")}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 6, "held_out": 6 * len(others), "all": 6 + 6 * len(others)
    }  # fmt: skip
    assert all(f"{train}/" in name for name in parts["train"].names)
    assert parts["train"].class_names == ("cat", "dog")


def test_what_lies_beside_parts_is_refused(image, write_folder):
    files = {f"{part}/cat/{i}.png": image for part in ("train", "test") for i in range(3)}
    with pytest.raises(DataError, match="nothing beside its parts test and train, got extra/a.png"):
        read(write_folder(files | {"extra/a.png": image}))
    vehicles = write_folder({f"{c}/{i}.png": image for c in ("train", "bus") for i in range(3)}, "vehicles")
    assert read(vehicles).class_names == ("bus", "train")  # one such name is a class


@pytest.mark.parametrize(
    ("paths", "classes"),
    [
        (["cat/images/{}", "dog/Images/{}"], "cat dog"),
        (["cat/rgb/{}", "cat/depth/{}", "dog/rgb/{}", "dog/depth/{}"], "cat dog"),
        (["cat/a/{}", "cat/b/{}", "dog/a/{}", "dog/b/{}"], "cat dog"),
        (["set/cat/x/jpg/{}", "set/dog/x/jpg/{}"], "cat dog"),
        (["fold1/cat/{}", "fold1/dog/{}", "fold2/cat/{}", "fold2/dog/{}"], "cat dog"),
        (["animals/cat/{}", "animals/dog/{}", "things/car/{}"], "car cat dog"),
        (["deep/down/cat/{}", "deep/down/dog/{}"], "cat dog"),
        (["cat/images/{}", "dog/{}"], "cat dog"),
        (["cat/images/{}", "cat/extra{}", "dog/{}"], "cat dog"),
        (["cat/images/{}", "dog/photos/{}"], "cat dog"),
        (["pets/cat/{}", "pets/cat/tabby/{}", "pets/dog/{}"], "cat dog"),
        (["cat/tabby/{}", "cat/siamese/{}", "dog/{}"], "cat dog"),
        (["faces/original/{}", "faces/fake/{}"], "fake original"),
    ],
)
def test_folders_that_every_class_has_are_no_classes(paths, classes, image, write_folder):
    data = read(write_folder({path.format(f"{i}.png"): image for path in paths for i in range(3)}))
    assert " ".join(data.class_names) == classes and len(data) == 3 * len(paths)


def test_an_image_beside_all_classes_has_no_class(image, write_folder):
    folder = write_folder({f"pets/{name}.png": image for name in ("cat/1", "dog/1", "2")})
    with pytest.raises(DataError, match="classes are sub-folders, but pets/2.png lies in none"):
        read(folder, classes="cat")


@pytest.mark.parametrize("container", ["folder", "zip", "tar"])
def test_files_passed_over_are_counted(container, image, write_folder, tmp_path):
    files = {"a/1.png": image, "a/2.cr2": b"x", "a/3.CR2": b"x", "a/4.nef": b"x", "a/5": b"x", "a/notes.txt": b"x"}
    path = write_folder(files) if container == "folder" else tmp_path / f"x.{container}"
    if container != "folder":
        path.write_bytes((zip_bytes if container == "zip" else tar_bytes)(files))
    with pytest.warns(UserWarning, match=r"no images: 2 \.cr2, 1 \.nef, 1 without an ending$"):
        assert len(read(path)) == 1
    files.pop("a/1.png")
    with pytest.raises(DataError, match="no images in the folder .*found 2 .cr2"):
        read(write_folder(files, "none"))


@pytest.mark.parametrize("top", [1, 15, 16, 31])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_integers_of_another_scale_are_refused(top, dtype):
    pixels = (np.arange(640).reshape(10, 8, 8) % (top + 1)).astype(dtype)
    for source in (pixels, list(pixels)):
        with pytest.raises(DataError, match=rf"must be in 0 … 255 .*at most {top}, which looks like another scale"):
            load(source, size=8, channels=1)
    scaled = load(np.rint(pixels * (255 / top)).astype(dtype), size=8, channels=1, split="all")
    assert scaled.images.max() == 255
    dark = np.zeros((10, 8, 8), dtype)
    dark[9, 0, 0] = 200
    assert load(dark, size=8, channels=1, split="all").images.max() == 200  # a few dark images are images


def png16(wide, colour, *, interlace=False, extra=b""):
    """(H, W, C) of 16 bits as a PNG: colour 2 RGB, 4 grey + alpha, 6 RGBA; rows filtered by Sub, Up, Average, Paeth."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = wide.shape
    rows = wide.astype(">u2").reshape(height, -1).view(np.uint8).astype(int)
    lines, step = [], 2 * channels
    for y, row in enumerate(rows):
        left = np.concatenate([np.zeros(step, int), row[:-step]])
        up = rows[y - 1] if y else np.zeros_like(row)
        kind = y % 3
        base = (0, left, up)[kind]
        lines.append(bytes([kind]) + ((row - base) % 256).astype(np.uint8).tobytes())
    head = struct.pack(">2I5B", width, height, 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + extra
        + chunk(b"IDAT", zlib.compress(b"".join(lines)))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (6, 4), (4, 2)])
def test_sixteen_bits_are_rounded(colour, channels, write_folder, rng):
    wide = rng.integers(0, 65536, (32, 32, channels))
    wide[0, :8, 0] = [127, 128, 129, 255, 256, 385, 386, 65407]
    if channels != 3:
        wide[..., -1] = 65535
    data = load(write_folder({"a/1.png": png16(wide, colour)}), size=32, channels=3, split="all")
    expected = np.broadcast_to(wide[..., : 3 if channels > 2 else 1], (32, 32, 3))
    np.testing.assert_array_equal(data.images[0].transpose(1, 2, 0), np.floor(expected / 257 + 0.5))


def test_sixteen_bit_tiff(write_folder, rng):
    wide = rng.integers(0, 65536, (4, 4, 3)).astype("<u2")
    entries = [(256, 4, 4), (257, 4, 4), (258, 3, 122), (259, 3, 1), (262, 3, 2), (273, 4, 128), (277, 3, 3),
               (278, 4, 4), (279, 4, wide.nbytes)]  # fmt: skip
    directory = struct.pack("<H", len(entries))
    for tag, kind, value in entries:
        count = 3 if tag == 258 else 1
        directory += struct.pack("<HHI", tag, kind, count) + struct.pack("<I", value)
    directory += struct.pack("<I", 0)
    content = struct.pack("<2sHI", b"II", 42, 8) + directory
    content = content.ljust(122, b"\0") + struct.pack("<3H", 16, 16, 16) + wide.tobytes()
    data = load(write_folder({"a/1.tif": content}), size=4, channels=3, split="all")
    np.testing.assert_array_equal(data.images[0].transpose(1, 2, 0), (wide.astype(int) + 128) // 257)


def test_large_notes_of_a_png_lose_nothing(write_folder, rng):
    wide = rng.integers(0, 65536, (8, 8, 3))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    big = zlib.compress(bytes(3 << 20))
    notes = {
        "text": chunk(b"zTXt", b"Comment\0\0" + big),
        "itext": chunk(b"iTXt", b"Comment\0\1\0\0\0" + big),
        "profile": chunk(b"iCCP", b"icc\0\0" + big),
        "damaged": chunk(b"iCCP", b"icc\0\0" + b"no profile"),
        "short": chunk(b"gAMA", b"x") + chunk(b"pHYs", b"x"),
    }
    data = read(write_folder({f"a/{name}.png": png16(wide, 2, extra=extra) for name, extra in notes.items()}))
    assert len(data) == len(notes) and not data.skipped
    assert (data.images == data.images[0]).all()


def test_an_absurd_member_name_loses_one_image(image, tmp_path):
    name = "a/" + "9" * 5000 + ".png"
    long = "a/" + "9" * 200 + ".png"
    for path, content in (("x.zip", zip_bytes), ("x.tar", tar_bytes)):
        (tmp_path / path).write_bytes(content({"a/1.png": image, name: image, long: image, "a/2.png": image}))
        with pytest.warns(UserWarning, match="skipped 1 of 4 images; .*a path of 5006 characters"):
            data = read(tmp_path / path)
        assert len(data) == 3 and data.names[:2] == ("a/1.png", "a/2.png" if "zip" in path else long)


def test_hard_links_in_a_tar(image, encode, tmp_path):
    other = encode(np.full((8, 8, 3), 200, np.uint8))
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name, content in (("a/1.png", image), ("a/2.png", other)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, target in (("b/1.png", "a/1.png"), ("b/2.png", "b/1.png"), ("b/3.png", "none.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)
    with pytest.warns(UserWarning, match="skipped 1 of 5 images; the first, b/3.png: a link"):
        data = read(tmp_path / "x.tar.gz")
    assert dict(zip(data.names, data.images[:, 0, 0, 0].tolist())) == {
        "a/1.png": 77, "b/1.png": 77, "b/2.png": 77, "a/2.png": 200
    }  # fmt: skip


def test_a_tar_that_is_cut_short_says_so(image, tmp_path):
    whole = tar_bytes({f"a/{i}.png": image for i in range(6)})
    member = len(whole) and 512 * (1 + -(-len(image) // 512))
    for cut in (3 * member, 3 * member + 200):
        (tmp_path / "x.tar").write_bytes(whole[:cut])
        with pytest.warns(UserWarning, match="x.tar: no mark of the end after 3 members: cut short or damaged"):
            assert len(read(tmp_path / "x.tar")) == 3
        with pytest.raises(DataError, match="cut short or damaged"):
            read(tmp_path / "x.tar", strict=True)
    damaged = bytearray(whole)
    damaged[3 * member + 150] ^= 1  # in the checksum of the fourth header
    (tmp_path / "x.tar").write_bytes(damaged)
    with pytest.warns(UserWarning, match="after 3 members"):
        read(tmp_path / "x.tar")


def test_headers_of_a_tar_that_lead_nowhere(image, tmp_path):
    path = tmp_path / "x.tar"
    good = tarfile.TarInfo("a/1.png")
    good.size = len(image)
    first = good.tobuf() + image.ljust(-(-len(image) // 512) * 512, b"\0")
    for size in (-512, -1024, -(10**12)):
        info = tarfile.TarInfo("a/2.png")
        info.size = size
        path.write_bytes(first + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(DataError, match=f"a member of {size} bytes"):
            read(path)
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 3 << 30
        path.write_bytes(first + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        with pytest.raises(DataError, match="an extended header of 3221225472 bytes"):
            read(path)
    info = tarfile.TarInfo("a/2.png")
    info.pax_headers = {"size": "-2048"}
    path.write_bytes(first + info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    with pytest.raises(DataError, match="leads back in the archive"):
        read(path)


@pytest.mark.parametrize("form", ["tar", "folder"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_cifar_as_its_authors_give_it(form, protocol, rng, tmp_path, write_folder):
    pixels = rng.integers(0, 256, (6, 3072), np.uint8)
    folder = "cifar-10-batches-py"
    files = {f"{folder}/batches.meta": pickle.dumps({"label_names": ["cat", "dog"]}, protocol)}
    for i, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        batch = {
            b"data": pixels[2 * i : 2 * i + 2],
            b"labels": [i % 2, 1],
            b"filenames": [b"x.png", f"{i}.png".encode()],
        }
        files[f"{folder}/{name}"] = pickle.dumps(batch, protocol)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(tar_bytes(files, "w:gz"))
    path = path if form == "tar" else write_folder(files) / folder
    data = load(path, size=32, channels=3)
    np.testing.assert_array_equal(data.images, pixels[:4].reshape(4, 3, 32, 32))
    assert data.labels.tolist() == [0, 1, 1, 1] and data.class_names == ("cat", "dog")
    assert data.names[3] == "data_batch_2/1.png"
    held_out = load(path, size=32, channels=3, split="held_out", classes="dog")
    np.testing.assert_array_equal(held_out.images[0], pixels[5].reshape(3, 32, 32))


def test_cifar_100_and_binary(rng, tmp_path):
    pixels = rng.integers(0, 256, (4, 3072), np.uint8)
    batch = [
        pickle.dumps({b"data": p, b"fine_labels": [1, 0], b"coarse_labels": [9, 9]}, 2)
        for p in (pixels[:2], pixels[2:])
    ]
    meta = pickle.dumps({b"fine_label_names": [b"ant", b"bee"], b"coarse_label_names": [b"x"]}, 2)
    python = {"cifar-100-python/train": batch[0], "cifar-100-python/test": batch[1], "cifar-100-python/meta": meta}
    records = [np.c_[[[9, 1], [9, 0]], p].astype(np.uint8).tobytes() for p in (pixels[:2], pixels[2:])]
    binary = {"c/train.bin": records[0], "c/test.bin": records[1], "c/fine_label_names.txt": b"ant\nbee\n"}
    for files in (python, binary):
        (tmp_path / "x.tar").write_bytes(tar_bytes(files))
        data = load(tmp_path / "x.tar", size=32, channels=3, split="all")
        np.testing.assert_array_equal(data.images, pixels.reshape(4, 3, 32, 32))
        assert data.labels.tolist() == [1, 0, 1, 0] and data.class_names == ("ant", "bee")


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_no_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = cifar_bytes()
    for name in list(files):
        (tmp_path / "x.tar").write_bytes(tar_bytes(files | {name: pickle.dumps({b"data": Evil(), b"labels": [0]}, 2)}))
        with pytest.raises(DataError, match=r"names \w+.system, which no CIFAR archive holds"):
            read(tmp_path / "x.tar")
    assert not (tmp_path / "ran").exists()


def test_idx_files(rng, tmp_path):
    import gzip

    for part, n in (("train", 6), ("t10k", 3)):
        images, labels = rng.integers(0, 256, (n, 8, 8), np.uint8), np.arange(n, dtype=np.uint8) % 3
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 0x803, n, 8, 8) + images.tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(
            gzip.compress(struct.pack(">2I", 0x801, n) + labels.tobytes())
        )
    data = load(tmp_path, size=8, channels=1, split="held_out")
    np.testing.assert_array_equal(data.images[:, 0], images)
    assert data.labels.tolist() == [0, 1, 2] and len(load(tmp_path, size=8, channels=1)) == 6
    assert len(load(tmp_path / "train-images-idx3-ubyte", size=8, channels=1, split="all")) == 6


def test_names_of_classes_in_either_unicode_form(image, write_folder):
    folder = write_folder({unicodedata.normalize("NFD", f"café/{i}.png"): image for i in range(3)})
    write_folder({f"thé/{i}.png": image for i in range(3)})
    for form in ("NFC", "NFD"):
        data = read(folder, classes=unicodedata.normalize(form, "café"))
        assert len(data) == 3 and data.class_names == ("café",) and data.names[0] == "café/0.png"


READERS = {
    "images": read,
    "sound": lambda path: load_sound(path, 10),
    "video": lambda path: load_video(path, (2, 4, 4), 3),
    "mask": lambda path: read_mask(path, 8),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("ending", ["", ".npy", ".wav", ".gif", ".zip", ".tar"])
def test_what_never_ends_is_refused(reader, ending, tmp_path):
    pipe, device = tmp_path / f"pipe{ending}", tmp_path / f"zero{ending}"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path, kind in ((pipe, "a pipe"), (device, "a device")):
        with pytest.raises(DataError, match=f"must be a regular file, got {kind}|must be images here"):
            READERS[reader](path)


@pytest.mark.parametrize(
    ("reader", "name"), [("sound", "a.wav"), ("sound", "a.npy"), ("mask", "a.png"), ("mask", "a.npy")]
)
def test_sparse_files_are_refused_unread(reader, name, tmp_path):
    with (tmp_path / name).open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(DataError, match="must have at most .* bytes, got 10737418240"):
        READERS[reader](tmp_path / name)


def test_a_zip_whose_directory_is_said_to_be_huge(tmp_path, image):
    path = tmp_path / "x.zip"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 3 << 30, 0, 0)
    with path.open("wb") as file:
        file.truncate(3 << 30)
        file.seek(3 << 30)
        file.write(end)
    with pytest.raises(DataError, match=f"cannot be read as a zip archive: a part of {3 << 30} bytes"):
        read(path)


def test_decoding_is_bounded(monkeypatch, encode):
    """However many threads: no more pixels at once than the budget, or one image that alone is larger."""
    import threading

    budget = encoded._Budget(100)
    held, most, lock = [0], [0], threading.Lock()

    def work(pixels):
        with budget.of(pixels):
            with lock:
                held[0] += pixels
                most[0] = max(most[0], held[0])
                alone = held[0] == pixels
            assert pixels <= 100 or alone
            with lock:
                held[0] -= pixels

    threads = [threading.Thread(target=work, args=(n,)) for n in (40, 40, 40, 250, 60, 100, 1) * 20]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert held[0] == 0 and most[0] in (*range(1, 101), 250)
    assert encoded.PIXELS_AT_ONCE == 64 << 20 and MAX_FILE_BYTES == 256 << 20


def test_memory_of_one_large_picture(tmp_path):
    code = (
        "import resource, sys; from mgebm_fast.data.policy import decode; data = open(sys.argv[1], 'rb').read();"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "before = peak(); decode(data, 8, 3); print(before, peak())"
    )
    Image.new("RGBA", (4000, 4000), (1, 2, 3, 40)).save(tmp_path / "a.png", compress_level=1)
    command = [sys.executable, "-c", code, tmp_path / "a.png"]
    before, after = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
    assert (after - before) * 1024 < 12 * 4000 * 4000


def test_rates_that_would_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "MAX_RECORDING_BYTES", 1 << 24)
    with pytest.raises(DataError, match="must come to at most .* bytes of pixels at its size and rate"):
        load_video(np.zeros((3, 400, 400), np.uint8), (2, 400, 400), 1, rate=1e9)
    write_wav(tmp_path / "a.wav", np.sin(np.arange(100)), 8000)
    for rate in (1e12, 1e-9):
        with pytest.raises(DataError, match="must come to 1 … .* samples at its rate"):
            load_sound(tmp_path / "a.wav", 10, rate=rate)


def test_the_place_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("MGEBM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert store.cache_folder() == tmp_path / "xdg" / "mgebm_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_folder() == tmp_path / ".cache" / "mgebm_fast"


def test_a_cache_without_fsync_and_one_on_a_failing_disk(monkeypatch, image, write_folder):
    def fails(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    folder = write_folder({"a/1.png": image})
    number = errno.EINVAL
    with pytest.warns(UserWarning, match="does not support fsync"):
        assert len(read(folder, cache=True)) == 1
    number = errno.EIO
    with pytest.raises(OSError, match="cannot write decoded images.*Input/output error"):
        load(folder, size=8, channels=1, cache=True)


def test_no_home_at_all(monkeypatch, image, write_folder):
    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MGEBM_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", nobody)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda self: nobody() if str(self).startswith("~") else self)
    assert store.cache_folder() is None
    assert len(read(write_folder({"a/1.png": image}), cache=True)) == 1
    with pytest.raises(DataError, match="'~/photos' has no meaning here"):
        read("~/photos")


def test_ints_of_every_kind_are_taken(image, write_folder):
    folder = write_folder({f"a/{i}.png": image for i in range(3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load(folder, size=np.int64(4), channels=np.array(3), most=np.int32(2), seed=np.int64(1))
    assert data.images.shape == (2, 3, 4, 4)
    for wrong in ({"most": 2.5}, {"size": np.array([4])}, {"channels": True}, {"size": "4"}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be an int"):
            load(folder, **{"size": 4, "channels": 3, **wrong})
