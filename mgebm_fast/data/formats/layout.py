"""What the paths of a folder or an archive say: which files are images, of which class, and in which part."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import DataError
from ..policy import EXTENSIONS

_MAX_PATH = 4096  # characters: no system opens a longer one
_PARTS = re.compile(
    r"(?P<train>train(ing)?)|(val|valid|validation|test|testing|dev|eval|held[ _-]?out|holdout)", re.IGNORECASE
)
_SUFFIX = re.compile(r"[ _-]?(set|data|images|imgs|[0-9]{2,4}|[AB])$")  # trainset, val_images, train2017, testA
# Names of folders that describe files, not what they show: a class may have folders of these names.
_GENERIC = set(
    "color colour data depth files frames full gray grey hr image images img imgs jpeg jpg left lr original photos "
    "pictures png raw rgb right thumbnails".split()
)
_SIDE_FILES = set(".cfg .csv .db .html .ini .json .log .md .pdf .py .rst .toml .tsv .txt .xml .yaml .yml".split())


class Layout(NamedTuple):
    labels: np.ndarray | None  # (N,) int64
    class_names: tuple[str, ...]
    held_out: np.ndarray | None  # (N,) bool, where the folders name the parts
    why_unlabelled: str


def natural(path: str) -> tuple:
    """Sort key by which img2 comes before img10, folder by folder."""
    runs = (re.split(r"([0-9]+)", part) for part in path.split("/"))
    # a number by its length, then its digits: int() refuses more than 4,300 of them
    return [[_number(run) if i % 2 else run for i, run in enumerate(part)] for part in runs], path


def _number(digits: str) -> tuple[int, str]:
    digits = digits.lstrip("0")
    return len(digits), digits


def plain(path: str) -> str:
    """The path in one Unicode form: macOS writes é as e and an accent, other systems as one character."""
    return unicodedata.normalize("NFC", path)


def refused(member: str) -> str | None:
    """Why a path inside an archive cannot be taken."""
    name = member.replace("\\", "/")
    if len(name) > _MAX_PATH:
        return f"a path of {len(name)} characters"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
        return "a path outside the archive"
    return None


def inside(member: str) -> str:
    """A path inside an archive in its shortest form."""
    return plain("/".join(part for part in member.replace("\\", "/").split("/") if part not in ("", ".")))


def is_hidden(path: str) -> bool:
    """A file whose name, or a folder of which, begins with a dot, or one that macOS adds to archives."""
    parts = path.split("/")
    return any(part.startswith(".") for part in parts) or parts[0] == "__MACOSX"


def is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in EXTENSIONS


def described(endings: Counter[str]) -> str:
    """Files that were passed over, by their endings, most first: `12 .cr2, 1 without an ending`."""
    return ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in endings.most_common())


def count_ending(path: str, endings: Counter[str]) -> None:
    """Count a file that is no image, unless its ending is one of text and notes beside images."""
    ending = os.path.splitext(path)[1].lower()
    if ending not in _SIDE_FILES:
        endings[ending] += 1


def read_layout(paths: Sequence[str], source: str) -> Layout:
    """Classes and parts by the folders that images lie in.

    Parts: at the first level where folders are called as a training part and as another (train and test, val, …), each
    of these folders is a part, and all but training are held out. DataError where something else lies beside them.
    Classes: the folder each image lies in, less inner folders with generic names and those that every class has; the
    outermost folder, less those that all images share, where images lie at unequal depths.
    """
    folders = [path.split("/")[:-1] for path in paths]
    held_out = _take_parts(folders, paths, source)
    if all(folders):
        _drop_inner(folders)
        _even_out(folders)
    if not all(folders):
        loose = paths[next(i for i, parts in enumerate(folders) if not parts)]
        where = "in none" if "/" in loose else "directly in it"
        return Layout(None, (), held_out, f"classes are sub-folders, but {loose} lies {where}")
    parents = [parts[-1] for parts in folders]
    order = sorted(set(parents), key=natural)
    place = {name: i for i, name in enumerate(order)}
    return Layout(np.array([place[parent] for parent in parents], np.int64), tuple(order), held_out, "")


def _part(folder: str) -> str | None:
    """ "train" or "other" for a folder that is named as a part, else None."""
    for name in (folder, _SUFFIX.sub("", folder)):
        match = _PARTS.fullmatch(name)
        if match:
            return "train" if match["train"] else "other"
    return None


def _take_parts(folders: list[list[str]], paths: Sequence[str], source: str) -> np.ndarray | None:
    """Takes the level of parts out of `folders`, if there is one; which images are held out."""
    for level in range(max(map(len, folders))):
        kinds = {parts[level]: _part(parts[level]) for parts in folders if len(parts) > level}
        if not {"train", "other"} <= set(kinds.values()):
            continue
        for parts, path in zip(folders, paths, strict=True):
            if len(parts) <= level or kinds[parts[level]] is None:
                named = " and ".join(sorted(name for name, kind in kinds.items() if kind))
                raise DataError(
                    f"{source} must have nothing beside its parts {named}, got {path}: move it, or name the "
                    "folder of one part"
                )
        return np.array([kinds[parts.pop(level)] == "other" for parts in folders])
    return None


def _drop_inner(folders: list[list[str]]) -> None:
    """Takes off the innermost folders that are no classes: where all of a folder's have generic names (cat/images), or
    each folder above has the same ones (cat/front, cat/side, dog/front, dog/side)."""
    while True:
        inner: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for *outer, name in folders:
            if outer:
                inner[tuple(outer)].add(name.lower() if name.lower() in _GENERIC else name)
        less = {outer for outer, names in inner.items() if names <= _GENERIC}
        if not less and _all_the_same(inner) and all(len(parts) > 1 for parts in folders):
            less = set(inner)
        if not less:
            return
        for parts in folders:
            if tuple(parts[:-1]) in less:
                parts.pop()


def _all_the_same(inner: dict[tuple[str, ...], set[str]]) -> bool:
    if len(inner) < 2 or any(names != next(iter(inner.values())) for names in inner.values()):
        return False
    # fold1/cat, fold2/cat: folders that differ by a number alone are no classes, what they hold is
    numbered = len({re.sub(r"[0-9]+", "#", outer[-1]) for outer in inner}) == 1
    return not numbered or len(next(iter(inner.values()))) == 1


def _even_out(folders: list[list[str]]) -> None:
    """Takes the outermost folders, less those that all images share, where images lie at unequal depths."""
    if len(set(map(len, folders))) == 1:
        return
    while all(folders) and len({parts[0] for parts in folders}) == 1:
        for parts in folders:
            del parts[0]
    for parts in folders:
        del parts[1:]
