"""`evaluate`: the figures of a model's samples, each beside its value on held-out real images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..data import ImageData
from ..models import MultiGrid
from .distances import KID_SUBSET_SIZE, alike, fid, kid, nearest, precision_recall
from .features import FeatureSpace, check_kind, classes_of, feature_space
from .labels import known, names_of
from .recogniser import Recogniser, fit_recogniser

NEIGHBOURS = 3  # of the supports that precision and recall are measured by


class Sampler(Protocol):
    """What `evaluate` needs of a model."""

    def sample(self, n: int, *, seed: int) -> Any: ...

    def to_uint8(self, x: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class Judges:
    """What samples are judged by, fitted to one data set: models that share them have comparable figures."""

    space: FeatureSpace
    reference: Tensor  # (N, D) float64, the features of the training images, or of a choice (`FeatureSpace.most`)
    names: list[str]  # the classes of the same images; empty where the data have no labels
    recogniser: Recogniser | None  # None where the data have fewer than two labels
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # what fitting took, by stage


def fit_judges(
    train: ImageData,
    held_out: ImageData,
    *,
    seed: int = 0,
    features: str = "auto",
    device: str | torch.device = "cpu",  # of the feature space's net
    progress: bool = True,
) -> Judges:
    """The feature space of FID and KID and the recogniser, as `evaluate` fits them with the same seed and device.

    ValueError where `train` has fewer than two images, or images that are all the same.
    """
    check_varied("fit_judges", train)
    seconds: dict[str, float] = {}
    with stage("the feature space", "features", seconds, progress):
        space = feature_space(features, train, held_out, device, seed=seed)
        chosen = space.chosen(len(train), seed)
        reference = space.extract(np.asarray(train.images[chosen]))
    recogniser = None
    if len(classes_of(train)) > 1:
        with stage("training the recogniser", "recogniser", seconds, progress):
            recogniser = fit_recogniser(train, seed=seed)
    return Judges(space, reference, names_of(train, chosen), recogniser, seconds)


def evaluate(
    model: Sampler,
    train: ImageData,
    held_out: ImageData,
    *,
    num: int = 1000,
    seed: int = 0,
    device: str | torch.device | None = None,  # where the model is moved to, and judges are fitted; None leaves it
    features: str = "auto",  # "auto", "imagenet", "inception", "classifier": see feature_space
    judges: Judges | None = None,  # None: fitted here, as `fit_judges(train, held_out, seed=seed, features=features)`
    precision: str = "auto",  # of the gradients in a sample's chains
    progress: bool = True,
) -> dict[str, Any]:
    """Measure `num` samples, and as many held-out images, against the training images.

    Returns a dict that JSON can hold:
      num, num_real           samples, and held-out images used (`num`, or all where there are fewer)
      feature_space           what FID and KID were computed in
      kid, fid                distance of the samples' features to those of the training images
      precision, recall       share of the samples within the support of as many training images, and the reverse
      fid_matched             FID of the first num_real samples: with as many images as fid_real, so the same bias
      nearest_distance        mean over samples of the root mean square difference to the nearest training image,
                              per pixel on the 0–255 scale
      confident_share         labelled data: share of the samples that `recogniser` recognises with confidence
      class_shares            labelled data: label → share recognised as it; they add up to confident_share
      confident_share_noise   labelled data: the same share for uniform noise, which should be next to nothing
      class_kid               class-conditional models: mean over classes of the KID of a class's samples
      class_agreement         class-conditional models: share of the samples whose likeliest class by the recogniser is
                              the one that they were drawn for; of held-out images, share rightly recognised
      class_accuracy          class-conditional models: share of held-out images whose class is that of lowest energy
      recogniser, notes, seconds
    and kid_real, fid_real, precision_real, recall_real, nearest_distance_real, confident_share_real,
    class_shares_real, class_kid_real: the same of the held-out images, null where there are none. Keys for labelled
    data are left out otherwise, `notes` says why, and so are those of class-conditional models, class_kid being null,
    where a training or held-out image has no label of the model's classes.

    Where the feature space does not tell the training images apart, kid and fid are null and a note says so; samples
    that are all the same image are measured, and noted.

    One seed gives the same figures (but for seconds) on one machine. ValueError for num < 2, images of
    different shapes, and fewer than two training images or ones that are all the same.
    """
    _check(train, held_out, num)
    check_kind(features)
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    notes: list[str] = []

    with stage(f"drawing {num} samples", "sampling", seconds, progress):
        samples = _draw(model, num, seed, device, train.images.shape[1:], precision)
    chosen = chosen_of(held_out, num, seed)
    real = np.asarray(held_out.images[chosen])
    if len(real) < num:
        notes.append(f"only {len(real)} held-out images: figures ending in _real are of these; compare fid_matched")

    result: dict[str, Any] = {"num": num, "num_real": len(real)}
    if judges is None:
        place = torch.device("cpu") if device is None else device
        if device is None and isinstance(model, torch.nn.Module):
            place = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), place)
        judges = fit_judges(train, held_out, seed=seed, features=features, device=place, progress=progress)
        seconds |= judges.seconds
    names = None
    if isinstance(model, MultiGrid) and model.classes:
        drawn_as = [model.classes[k] for k in model.draw_labels(num, seed=seed).tolist()]
        real_names = names_of(held_out, chosen)
        if known(model, judges.names) and (known(model, real_names) or not len(real)):
            names = {"": drawn_as, "_real": real_names}
        else:
            wanted = f"labels among the model's classes, {', '.join(model.classes)}"
            notes.append(f"class_kid, class_agreement and class_accuracy left out: not all images have {wanted}")
            result |= dict.fromkeys(["class_kid", "class_kid_real"])
    with stage("FID and KID", "fid_kid", seconds, progress):
        result |= {"feature_space": judges.space.name} | _set_distances(judges, samples, real, names, seed, notes)
    with stage("nearest training images", "nearest", seconds, progress):
        distances, _ = nearest(np.concatenate([samples, real]), train.images)
        result["nearest_distance"] = float(distances[:num].mean())
        result["nearest_distance_real"] = float(distances[num:].mean()) if len(real) else None
    if judges.recogniser is not None:
        with stage("recognising classes", "recognising", seconds, progress):
            result |= _recognised(judges.recogniser, samples, real, seed, notes)
            if names is not None:
                assert isinstance(model, MultiGrid)
                result |= _by_class(model, judges.recogniser, samples, real, names)
    else:
        why = "the data have no labels" if train.labels is None else "the data have a single class"
        notes.append(f"confident_share and class_shares left out: {why}")
    seconds["total"] = time.perf_counter() - started
    return result | {"notes": notes, "seconds": {key: round(value, 2) for key, value in seconds.items()}}


def chosen_of(held_out: ImageData, num: int, seed: int) -> np.ndarray:
    """Which held-out images are compared: `num` of them at random, since a set may be sorted by class."""
    return np.sort(np.random.default_rng(seed).permutation(len(held_out))[:num])


def record_of(result: Mapping[str, Any], update: int) -> dict[str, float]:
    """The figures of `evaluate` as a line of evaluations.jsonl: `part/figure`, the part being "samples" or "held out",
    with the kind of the feature space where a figure depends on it: those of two spaces are not comparable."""
    space = f", {result['feature_space'].partition(':')[0]}"
    record: dict[str, float] = {"step": update, "num": result["num"]}
    for figure, part in (
        ("kid", space), ("fid", space), ("precision", space), ("recall", space), ("nearest_distance", ""),
        ("confident_share", ""), ("class_kid", space), ("class_agreement", ""),
    ):  # fmt: skip
        drawn = "fid_matched" if figure == "fid" else figure  # of as many images as the held-out value
        pairs = (("samples", drawn), ("held out", f"{figure}_real"))
        record |= {f"{name}{part}/{figure}": result[key] for name, key in pairs if result.get(key) is not None}
    return record


def check_varied(op: str, train: ImageData) -> None:
    """ValueError unless there are two different training images: of one alone nothing can be learnt or measured."""
    if len(train) < 2:
        raise ValueError(f"{op}: train must have at least 2 images, got {len(train)}")
    first = train.images[0]
    if all(np.array_equal(image, first) for image in train.images):
        raise ValueError(f"{op}: train must have images that differ, got {len(train)} equal ones of {train.name}")


def _check(train: ImageData, held_out: ImageData, num: int) -> None:
    if num < 2:
        raise ValueError(f"evaluate: num must be at least 2, got {num}")
    check_varied("evaluate", train)
    if held_out.images.shape[1:] != train.images.shape[1:]:
        raise ValueError(
            f"evaluate: held_out must have images of the training images' shape {train.images.shape[1:]}, "
            f"got {held_out.images.shape[1:]}"
        )


def _draw(model: Sampler, num: int, seed: int, device: Any, shape: tuple[int, ...], precision: str) -> np.ndarray:
    if device is not None and isinstance(model, torch.nn.Module):
        model.to(device)
    draw: Any = model.sample  # only models of the package need to know of a precision
    drawn = draw(num, seed=seed) if precision == "auto" else draw(num, seed=seed, precision=precision)
    samples = model.to_uint8(drawn).cpu().numpy()
    if samples.shape != (num, *shape) or samples.dtype != np.uint8:
        raise ValueError(
            f"evaluate: model must draw uint8 images of shape {(num, *shape)} like the training images, "
            f"got {samples.dtype} {samples.shape}"
        )
    return samples


def _set_distances(
    judges: Judges,
    samples: np.ndarray,
    real: np.ndarray,
    names: Mapping[str, list[str]] | None,  # the classes of both, by suffix, where samples are drawn by class
    seed: int,
    notes: list[str],
) -> dict[str, float | None]:
    space, reference = judges.space, judges.reference
    result: dict[str, float | None] = dict.fromkeys(
        ["kid", "kid_real", "fid", "fid_real", "fid_matched", "precision", "precision_real", "recall", "recall_real"]
    )
    if names is not None:
        result |= dict.fromkeys(["class_kid", "class_kid_real"])
    if (samples == samples[:1]).all():
        notes.append("all samples are the same image")
    if alike(reference):
        notes.append("FID and KID left out: the feature space does not tell the training images apart")
        return result
    drawn = space.extract(samples)
    sets = {"": drawn}
    if len(real) >= 2:
        sets |= {"_real": space.extract(real), "_matched": drawn[: len(real)]}
    smallest = min(len(x) for x in (reference, *sets.values()))
    if smallest <= reference.shape[1]:
        notes.append(f"a set of {smallest} images in {reference.shape[1]} dimensions: FID is mostly bias, see KID")
    subset_size = min(KID_SUBSET_SIZE, smallest)
    for suffix, features in sets.items():
        result[f"fid{suffix}"] = fid(reference, features)
        if suffix != "_matched":
            result[f"kid{suffix}"] = kid(reference, features, subset_size=subset_size, seed=seed)
            result |= _supports(reference, features, suffix, smallest, seed)
            if names is not None:
                result[f"class_kid{suffix}"] = _class_kid(judges, features, names[suffix], seed)
    return result


def _class_kid(judges: Judges, features: Tensor, names: list[str], seed: int) -> float | None:
    """The mean over classes of the KID of a class; None where one has fewer than two images on either side."""
    kids = []
    for name in sorted({*names, *judges.names}):
        sets = [
            rows[torch.tensor([other == name for other in labels], dtype=torch.bool)]
            for rows, labels in ((judges.reference, judges.names), (features, names))
        ]
        smallest = min(map(len, sets))
        if smallest < 2 or alike(sets[0]):
            return None
        kids.append(kid(*sets, subset_size=min(KID_SUBSET_SIZE, smallest), seed=seed))
    return float(np.mean(kids)) if kids else None


def _supports(reference: Tensor, features: Tensor, suffix: str, num: int, seed: int) -> dict[str, float | None]:
    """Precision and recall of the first `num` samples beside as many training images."""
    if num <= NEIGHBOURS:
        return {}
    chosen = torch.randperm(len(reference), generator=torch.Generator().manual_seed(seed))[:num]
    if alike(reference[chosen]):
        return {}
    precision, recall = precision_recall(reference[chosen], features[:num], neighbours=NEIGHBOURS)
    return {f"precision{suffix}": precision, f"recall{suffix}": recall}


def _recognised(
    recogniser: Recogniser, samples: np.ndarray, real: np.ndarray, seed: int, notes: list[str]
) -> dict[str, Any]:
    noise = np.random.default_rng(seed).integers(0, 256, (1000, *samples.shape[1:]), dtype=np.uint8)
    shares = recogniser.shares(samples)
    shares_real = recogniser.shares(real) if len(real) else None
    share_real = sum(shares_real.values()) if shares_real is not None else None
    if share_real is not None and share_real < 0.2:
        notes.append(
            f"the recogniser is sure of only {share_real:.1%} of real images: on these data confident_share says little"
        )
    return {
        "confident_share": sum(shares.values()),
        "confident_share_real": share_real,
        "confident_share_noise": sum(recogniser.shares(noise).values()),
        "class_shares": shares,
        "class_shares_real": shares_real,
        "recogniser": recogniser.name,
    }


def _by_class(
    model: MultiGrid,
    recogniser: Recogniser,
    samples: np.ndarray,
    real: np.ndarray,
    names: Mapping[str, list[str]],  # the classes of both, by suffix
) -> dict[str, float | None]:
    def agreement(images: np.ndarray, names: list[str]) -> float:
        return float(np.mean([guess == name for guess, name in zip(recogniser.guesses(images), names, strict=True)]))

    result: dict[str, float | None] = {"class_agreement": agreement(samples, names[""])}
    if not len(real):
        return result | dict.fromkeys(("class_agreement_real", "class_accuracy"))
    with torch.no_grad():
        energies = model.class_energies(torch.from_numpy(real).to(model.colours.device))
    lowest = torch.stack(list(energies.values())).sum(0).argmin(1).tolist()
    result["class_agreement_real"] = agreement(real, names["_real"])
    hits = [model.classes[k] == name for k, name in zip(lowest, names["_real"], strict=True)]
    result["class_accuracy"] = float(np.mean(hits))
    return result


@contextmanager
def stage(words: str, key: str, seconds: dict[str, float], progress: bool) -> Iterator[None]:
    """Time a stage, and show it on standard error while it runs."""
    started = time.perf_counter()
    if progress:
        from ..learning.run.progress import working

        with working(words):
            yield
    else:
        yield
    seconds[key] = time.perf_counter() - started
