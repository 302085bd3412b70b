"""What every kind of source is opened as, before anything is decoded; and how a part of it is chosen."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from .. import noise
from ..errors import DataError, suggest
from . import fingerprint

SPLITS = ("train", "held_out", "all")
HELD_OUT_SHARE = 0.1
HELD_OUT_MOST = 5000
_SPLIT_STREAM = noise.stream(noise.Purpose.DATA_ORDER, 0xFFFF)  # no grid has this index, so no counter is used twice


class Batch(NamedTuple):
    """Some decoded images, in the order asked for, and what was left out between them."""

    images: np.ndarray  # (k, C, S, S) uint8
    positions: list[int]  # (k,) places in the indices that were asked for, ascending
    skipped: list[tuple[str, str]]  # (path, reason)


@dataclass(frozen=True)
class Collection:
    """A source that is listed but not decoded: choosing a class or a split comes first, and costs no decoding."""

    name: str
    count: int
    decode: Callable[[np.ndarray], Iterator[Batch]]  # ascending indices -> batches
    labels: np.ndarray | None = None  # (count,) int64
    class_names: tuple[str, ...] = ()
    names: Sequence[str] | None = None  # (count,) paths; None: an image is named by its place
    held_out: np.ndarray | None = None  # (count,) bool, where the source has its own split
    skipped: tuple[tuple[str, str], ...] = ()  # files refused while listing
    passed_over: str = ""  # files that are no images, counted by their endings
    why_unlabelled: str = "it has no labels"
    source_bytes: Callable[[np.ndarray], int] | None = None  # size of the files to decode
    fingerprint: Callable[[np.ndarray], Iterable[str]] | None = None  # what the cache is keyed by; None: no cache


def number_labels(raw: Sequence | np.ndarray, names: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Any labels -> int64 indices 0 … K-1 of the values that occur, in sorted order, and their names.

    Integer labels are looked up in `names` where all of them fit; otherwise a value's text is its name.
    """
    values, labels = np.unique(np.asarray(raw), return_inverse=True)
    whole = values.dtype.kind in "iub" or (values.dtype.kind == "f" and bool((values == np.floor(values)).all()))
    if whole:
        values = values.astype(np.int64)
    fits = whole and names is not None and len(values) and values[0] >= 0 and values[-1] < len(names)
    texts = tuple(str(names[v]) if fits else str(v) for v in values)  # type: ignore[index]
    return labels.reshape(-1).astype(np.int64), texts


def held_out_mask(count: int, labels: np.ndarray | None) -> np.ndarray:
    """The fixed split: (count,) bool, True where an image is held out. A function of `count` and `labels` only.

    A share of min(10 %, 5000 / count) of each class, rounded, at least one image, and none of a class of one; which
    ones, a fixed Philox permutation of the class says. Without labels, or where every class has one image, all images
    count as one class.
    """
    mask = np.zeros(count, bool)
    share = min(HELD_OUT_SHARE, HELD_OUT_MOST / max(count, 1))
    if labels is None or np.bincount(labels, minlength=1).max() < 2:
        labels = np.zeros(count, np.int64)
    for c in range(int(labels.max(initial=-1)) + 1):
        members = np.flatnonzero(labels == c)
        if len(members) < 2:
            continue
        order = noise.permutation(len(members), seed=0, step=c, stream=_SPLIT_STREAM).numpy()
        mask[members[order[: max(1, round(len(members) * share))]]] = True
    return mask


@dataclass(frozen=True)
class Choice:
    """A part of a source, ascending, and what goes with each image of it."""

    index: np.ndarray  # (n,) places in the source
    labels: np.ndarray | None  # (n,), renumbered in the order of the classes asked for
    class_names: tuple[str, ...]
    names: tuple[str, ...]  # (n,)
    held_out: tuple[str, ...]  # names of the held-out part, whichever part was asked for

    def take(self, places: np.ndarray) -> Choice:
        labels = None if self.labels is None else self.labels[places]
        names = tuple(self.names[i] for i in places)
        return replace(self, index=self.index[places], labels=labels, names=names)


def choose(
    collection: Collection,
    split: str,
    classes: Sequence[str | int] | str | None,
    like: dict[str, Any] | None = None,
) -> Choice:
    """A split of some classes. The split is made over all classes first: choosing one moves no image between parts.

    `like` is the fingerprint of an earlier training part: images are then divided as they were, and new ones left out.
    """
    wanted = _class_list(classes)
    labels, class_names = _renumber(collection, wanted) if wanted else (collection.labels, collection.class_names)
    of_classes = labels >= 0 if wanted and labels is not None else np.ones(collection.count, bool)
    names = [str(i) for i in range(collection.count)] if collection.names is None else collection.names
    known = None if like is None else fingerprint.parts(like)
    if known is None:
        mask = collection.held_out
        if mask is None:
            mask = held_out_mask(collection.count, collection.labels)
        train = ~mask
    else:
        train, mask = (np.fromiter((name in part for name in names), bool, len(names)) for part in known)
    keep = of_classes & {"train": train, "held_out": mask, "all": train | mask}[split]
    index = np.flatnonzero(keep)
    if not len(index) and split != "held_out":
        of = f" of {', '.join(class_names)}" if wanted else ""
        part = "images" if split == "all" else f"images in split {split!r}"
        before = "" if known is None else "; none of them is named as one that was trained on"
        raise DataError(f"{collection.name} has no {part}{of} ({collection.count} images in all){before}")
    held_out = tuple(names[i] for i in np.flatnonzero(of_classes & mask).tolist())
    chosen = tuple(names[i] for i in index.tolist())
    return Choice(index, None if labels is None else labels[index], class_names, chosen, held_out)


def _class_list(classes: Sequence[str | int] | str | int | None) -> list[str]:
    if classes is None:
        return []
    if isinstance(classes, (str, int)):
        classes = [classes]
    return list(dict.fromkeys(str(c) for c in classes))


def _renumber(collection: Collection, wanted: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    names = collection.class_names
    if collection.labels is None:
        raise DataError(f"classes={wanted} cannot be chosen from {collection.name}: {collection.why_unlabelled}")
    wanted = [unicodedata.normalize("NFC", name) for name in wanted]  # as the names of folders are
    new = np.full(max(len(names), 1), -1, np.int64)
    for i, name in enumerate(wanted):
        if name not in names:
            shown = ", ".join(names[:20]) + (f", … ({len(names)} classes)" if len(names) > 20 else "")
            raise DataError(f"classes must be among {shown} for {collection.name}, got {name!r}{suggest(name, names)}")
        new[names.index(name)] = i
    return new[collection.labels], tuple(wanted)
