"""torch Datasets (anything with a length and items), and torchvision's sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError, suggest
from .arrays import as_array, channels_first, check_scale, largest, pixel_scale, to_uint8
from .collection import Batch, Collection, number_labels
from .files import open_folder
from .foreign import reason
from .policy import convert, fit, match_channels

_CHUNK_IMAGES = 256
# torchvision's sets that are read without a pickle; others (LSUN, ImageNet, PhotoTour) keep an index or labels in one
_TORCHVISION = set(
    "CIFAR10 CIFAR100 Caltech101 Caltech256 CelebA Country211 DTD EMNIST EuroSAT FGVCAircraft FakeData FashionMNIST "
    "Flowers102 Food101 GTSRB Imagenette KMNIST LFWPeople MNIST Omniglot OxfordIIITPet PCAM Places365 RenderedSST2 "
    "SEMEION STL10 SUN397 SVHN StanfordCars USPS".split()
)
_CIFAR = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}  # pickles, which `data.cifar` reads
_IMAGE_KEYS, _LABEL_KEYS = ("image", "img", "x"), ("label", "y")


def dataset_collection(
    dataset: Any, size: int, channels: int, *, name: str | None = None, held_out: np.ndarray | None = None
) -> Collection:
    """A map-style Dataset or a sequence whose items are images, (image, label) or {"image": …, "label": …}.

    An image is a Pillow image, an array or a tensor: (H, W), (H, W, C) or (C, H, W); floats must be in [0, 1]. Labels
    come from `targets` or `labels` where the dataset has them, else from one pass over the items; names from
    `classes`. An item that raises OSError or ValueError is skipped.
    """
    name = name or type(dataset).__name__
    count = len(dataset)
    if not count:
        raise DataError(f"{name} is empty")
    raw = _known_labels(dataset)
    if raw is None:
        raw = _labels_of_items(dataset)
    labels, names = (None, ()) if raw is None else number_labels(raw, _class_names(dataset))

    def decode(index: np.ndarray) -> Iterator[Batch]:
        high: int | None = (
            None  # largest value of integer items: one dark image is normal, a whole dark set has another scale
        )
        for start in range(0, len(index), _CHUNK_IMAGES):
            images, positions, skipped = [], [], []
            for position, i in enumerate(index[start : start + _CHUNK_IMAGES], start):
                where = f"item {i} of {name}"
                try:
                    picture = _split_item(dataset[int(i)])[0]
                    images.append(_item_pixels(picture, size, channels, where))
                    if not hasattr(picture, "getexif") and (array := as_array(picture)[0]).dtype.kind in "iu":
                        high = max(high or 0, largest(array[None]))
                    positions.append(position)
                except DataError:  # the wrong kind of item, not a damaged one: others are likely wrong too
                    raise
                except (OSError, ValueError) as error:
                    skipped.append((where, reason(error)))
            stacked = np.stack(images) if images else np.empty((0, channels, size, size), np.uint8)
            yield Batch(stacked, positions, skipped)
        check_scale(high or 0, f"the items of {name}")

    why = "its items have no labels"
    return Collection(name, count, decode, labels=labels, class_names=names, held_out=held_out, why_unlabelled=why)


def torchvision_collection(
    source: str,  # "torchvision:NAME" or "torchvision:NAME:ROOT"
    size: int,
    channels: int,
    *,
    root: str | Path,
    download: bool,
) -> Collection:
    """A torchvision set; its own test (else validation) part is the held-out split where it has one."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{source} needs torchvision (pip install torchvision): {error}") from error
    except (
        RuntimeError,
        OSError,
        AttributeError,
    ) as error:  # raised on import by a torchvision built for another torch
        raise DataError(f"{source} needs a torchvision that fits this torch: {error}") from error
    _, name, *rest = source.split(":", 2)
    folder = Path(rest[0] if rest else root).expanduser()
    known = [key for key in datasets.__all__ if inspect.isclass(getattr(datasets, key))]
    if name not in known:
        raise DataError(f"torchvision has no set {name!r}{suggest(name, known)}")
    make = getattr(datasets, name)
    if make.__module__.startswith("torchvision."):
        if name not in _TORCHVISION:
            raise DataError(
                f"torchvision's {name} must be passed as the Dataset itself: it may unpickle files, which can "
                f"run code; by name {', '.join(sorted(_TORCHVISION))} are read"
            )
        if name in _CIFAR:
            if download:
                make(root=str(folder), download=True)
            if not (folder / _CIFAR[name]).is_dir():
                raise DataError(_not_there(name, folder, "Dataset not found"))
            return replace(open_folder(folder / _CIFAR[name], size, channels), name=name)
    parameters = inspect.signature(make).parameters
    options: dict[str, Any] = {"root": str(folder)} if "root" in parameters else {}
    if "download" in parameters:
        options["download"] = download
    parts = _parts(make, parameters, options, name, folder)
    if len(parts) == 1:
        return dataset_collection(parts[0], size, channels, name=name)
    from torch.utils.data import ConcatDataset

    held_out = np.repeat([False, True], [len(part) for part in parts])
    return dataset_collection(ConcatDataset(parts), size, channels, name=name, held_out=held_out)


def _parts(make: Any, parameters: Any, options: dict[str, Any], name: str, folder: Path) -> list[Any]:
    """[train, held out], or [everything]."""
    choices: list[list[dict[str, Any]]]
    if "train" in parameters:
        choices = [[{"train": True}], [{"train": False}]]
    elif "split" in parameters:
        choices = [[{"split": "train"}], [{"split": "test"}, {"split": "val"}]]
    else:
        choices = [[{}]]
    parts = []
    for choice in choices:
        for i, part in enumerate(choice):
            try:
                parts.append(make(**options, **part))
                break
            except TypeError as error:
                raise DataError(
                    f"torchvision's {name} takes more than a root ({error}): pass the Dataset itself"
                ) from error
            except ValueError as error:
                if i == len(choice) - 1:
                    raise DataError(f"torchvision's {name} has no {part} ({error}): pass the Dataset itself") from error
            except (RuntimeError, OSError) as error:
                raise DataError(_not_there(name, folder, error)) from error
    return parts


def _not_there(name: str, folder: Path, error: object) -> str:
    return (
        f"torchvision's {name} cannot be read below {folder}: {error}. Name its folder as "
        f"torchvision:{name}:FOLDER (or root=), or fetch it once with data.load(..., download=True)"
    )


def _split_item(item: Any) -> tuple[Any, Any]:
    """An item -> (image, label or None)."""
    if isinstance(item, dict):
        image = next((item[key] for key in _IMAGE_KEYS if key in item), None)
        label = next((item[key] for key in _LABEL_KEYS if key in item), None)
        if image is None:
            raise DataError(f"an item must have an image under one of {_IMAGE_KEYS}, got keys {tuple(item)}")
        return image, label
    if isinstance(item, (tuple, list)):
        if not item:
            raise DataError("an item must be an image or (image, label), got an empty tuple")
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _item_pixels(picture: Any, size: int, channels: int, where: str) -> np.ndarray:
    """One item's image -> (channels, size, size) uint8."""
    if hasattr(picture, "getexif"):
        if channels not in (1, 3):
            raise DataError(f"channels must be 1 or 3 for pictures, got {channels}")
        return convert(picture, size, channels)
    array, is_tensor = as_array(picture)
    if array.ndim not in (2, 3) or 0 in array.shape:
        got = _describe(picture, array)
        raise DataError(f"{where} must be a picture, (H, W), (H, W, C) or (C, H, W), got {got}")
    if array.ndim == 2:
        array = array[..., None]
    elif channels_first(array.shape, channels, is_tensor, where):
        array = array.transpose(1, 2, 0)
    pixels = to_uint8(array[None], pixel_scale(array[None], where, unit_only=True))
    try:
        return fit(match_channels(pixels, channels), size)[0]
    except ValueError as error:
        raise DataError(f"{where} has {error}") from error


def _describe(picture: Any, array: np.ndarray) -> str:
    return f"{type(picture).__name__}" + (f" of shape {array.shape}" if array.ndim else "")


def _known_labels(dataset: Any) -> np.ndarray | None:
    """Labels that a dataset states without giving an item; through Subset and ConcatDataset."""
    parts = getattr(dataset, "datasets", None)
    if isinstance(parts, (list, tuple)):
        known = [_known_labels(part) for part in parts]
        return None if any(part is None for part in known) else np.concatenate(known)  # type: ignore[arg-type]
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices)]
    for key in ("targets", "labels"):
        value = getattr(dataset, key, None)
        if value is not None and hasattr(value, "__len__") and len(value) == len(dataset):
            labels, _ = as_array(value)
            if labels.ndim == 1 and labels.dtype.kind in "iubfU":
                return labels
    return None


def _labels_of_items(dataset: Any) -> np.ndarray | None:
    """One pass over the items; None as soon as one has no label that is a single value."""
    labels: list[Any] = []
    for i in range(len(dataset)):
        try:
            label = _split_item(dataset[i])[1]
        except DataError:
            raise
        except (OSError, ValueError):
            labels.append(None)
            continue
        value = None if label is None else as_array(label)[0]
        if value is None or value.ndim or value.dtype.kind not in "iubfU":
            return None
        labels.append(value.item())
    known = next((label for label in labels if label is not None), None)
    # a broken item is skipped later, when it is decoded: until then it gets any class that exists
    return None if known is None else np.asarray([known if label is None else label for label in labels])


def _class_names(dataset: Any) -> list[str] | None:
    """The names that a dataset states for its labels; of a ConcatDataset, where all parts state the same."""
    parts = getattr(dataset, "datasets", None)
    if isinstance(parts, (list, tuple)) and parts:
        stated = [_class_names(part) for part in parts]
        return stated[0] if all(names == stated[0] for names in stated) else None
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        return _class_names(dataset.dataset)
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, (list, tuple)) and names else None
