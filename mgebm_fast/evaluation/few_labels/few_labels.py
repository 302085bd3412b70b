"""Classification with few labels: features learnt without labels, against the same nets trained on the labels alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import noise
from ...data import ImageData
from ...errors import Refused
from ...models import Model
from ...nets import ScoreNet, from_config
from . import readout
from .net_features import energy_features, energy_nets, read_maps, scaled_down
from .readout import Scale

LEARNED, FINE_TUNED, SUPERVISED, RANDOM, PIXELS = "learned", "fine-tuned", "supervised", "random", "pixels"
_REFERENCE = 2000  # unlabelled images that set the scale of features
_SVC = (
    f"SVC with the kernel exp(-gamma |x - y|^2), C in {readout.PENALTIES}, gamma in {readout.WIDTHS} "
    f"by cross-validation on the labelled images, in at most {readout.FOLDS} folds"
)
_END_TO_END = (
    f"cross-entropy, AdamW at {readout.LEARNING_RATE:g} with weight decay {readout.WEIGHT_DECAY:g}, cosine to 0, "
    f"{readout.STEPS} steps of {readout.BATCH} labelled images, no augmentation"
)


@dataclass(frozen=True)
class Contender:
    """A way to classify the held-out images by some labelled ones, and what it is."""

    name: str
    kind: str  # LEARNED, FINE_TUNED, SUPERVISED, RANDOM or PIXELS
    run: str | None  # the run whose weights it uses
    nets: str | None  # the run whose architecture it has; of several alike the first
    predict: Callable[[np.ndarray, int], np.ndarray]  # (labelled images, number of the draw) -> (num_test,)


def draw_labelled(
    labels: np.ndarray,  # (N,) of the training images
    per_class: int,
    *,
    draw: int,
    seed: int = 0,
) -> np.ndarray:  # (classes · per_class,) int64, rising
    """The training images whose labels a draw may look at: so many of every class, without replacement.

    A function of (seed, draw, labels): every contender gets the same, and the draw of more a class holds that of fewer.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if per_class > len(members):
            raise ValueError(
                f"draw_labelled: per_class must be at most {len(members)}, the images of class {label}, got {per_class}"
            )
        chosen.append(np.random.default_rng([seed, draw, int(label)]).permutation(members)[:per_class])
    return np.sort(np.concatenate(chosen))


def few_labels(
    models: Mapping[str, Model],  # by the name of their run
    train: ImageData,
    held_out: ImageData,
    *,
    labels: Sequence[int] = (10, 20, 50),
    draws: int = 5,
    seed: int = 0,
    fine_tune: bool = False,
    progress: Callable[[str, int, int], None] | None = None,  # (contender, fits done, fits in all)
) -> dict[str, Any]:
    """Accuracy on all held-out images of classifiers that know `labels` images a class.

    The training images are what the models learnt from without labels. Each of `draws` draws reveals the labels of some
    (`draw_labelled`), the same ones to every contender:

      learned     `energy_features` of each model, its weights frozen, read by a support-vector classifier
      supervised  the same layers from random weights, trained end to end on the labelled images alone
      random      the same layers, random and frozen, read as the learned ones are
      pixels      the same classifier on pixels, and logistic regression
      fine-tuned  `supervised`, but from the learned weights (where `fine_tune`)

    Models of the same layers share one supervised and one random contender. A draw has initial weights of its own.
    Frozen features and pixels are scaled by unlabelled training images (`Scale`); C, γ and the penalty of the
    regression are chosen by cross-validation on the labelled images.

    Returns a dict that JSON can hold: data, seed, draws, labels, num_train, num_test, classes, classifier, training,
    seconds, and `contenders`: dicts of name, kind, run, nets and `accuracy`, for each of `labels` (as a string) the
    mean, the standard deviation over the draws (null for one draw) and the `draws` themselves, between 0 and 1.
    One seed gives the same figures (but for seconds) on one machine.

    ValueError for a model without energy nets, models of different images, data without two labelled classes or
    without held-out images, and more labels than a class has images. Source: the protocol of Gao et al. (CVPR 2018).
    """
    started = time.perf_counter()
    _check(models, train, held_out, labels, draws, seed)
    truth, known = np.asarray(held_out.labels), np.asarray(train.labels)
    contenders = _contenders(models, train, held_out, seed, fine_tune)
    done, total = 0, len(contenders) * len(labels) * draws
    rows = []
    for contender in contenders:
        accuracy = {}
        for per_class in labels:
            each = []
            for draw in range(draws):
                if progress is not None:
                    progress(contender.name, done, total)
                predicted = contender.predict(draw_labelled(known, per_class, draw=draw, seed=seed), draw)
                each.append(float((predicted == truth).mean()))
                done += 1
            spread = float(np.std(each, ddof=1)) if draws > 1 else None
            accuracy[str(per_class)] = {"mean": float(np.mean(each)), "std": spread, "draws": each}
        rows.append(
            {"name": contender.name, "kind": contender.kind, "run": contender.run, "nets": contender.nets,
             "accuracy": accuracy}
        )  # fmt: skip
    return {
        "data": train.name,
        "seed": seed,
        "draws": draws,
        "labels": list(labels),
        "num_train": len(train),
        "num_test": len(held_out),
        "classes": len(np.unique(known)),
        "classifier": _SVC,
        "training": _END_TO_END,
        "contenders": rows,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _check(
    models: Mapping[str, Model], train: ImageData, held_out: ImageData, labels: Sequence[int], draws: int, seed: int
) -> None:
    if not models:
        raise Refused("models", "hold at least one model", "none", "few_labels")
    noise.check_seed(seed, "few_labels")
    if draws < 1:
        raise Refused("draws", "be at least 1", draws, "few_labels")
    if not labels or min(labels) < 2 or len(set(labels)) < len(labels):
        must = "be different numbers of images a class, at least 2"
        raise Refused("labels", must, list(labels), "few_labels")
    for name, model in models.items():
        try:
            energy_nets(model)
        except ValueError as error:
            raise ValueError(f"few_labels: {name}: {error}") from None
        if (model.channels, model.sizes[-1]) != (train.channels, train.size):
            must = f"be of {train.channels} x {train.size} x {train.size} images like the data"
            got = f"{name}, of {model.channels} x {model.sizes[-1]} x {model.sizes[-1]}"
            raise Refused("models", must, got, "few_labels")
    classes, counts = np.unique(() if train.labels is None else train.labels, return_counts=True)
    if len(classes) < 2:
        got = "no labels" if train.labels is None else f"{len(classes)}"
        raise Refused("data", "be labelled, with at least two classes", f"{got} in {train.name}", "few_labels")
    if len(held_out) == 0 or held_out.labels is None:
        raise Refused("data", "hold out labelled images to test on", f"none of {train.name}", "few_labels")
    if max(labels) > counts.min():
        fewest = int(classes[counts.argmin()])
        name = train.class_names[fewest] if fewest < len(train.class_names) else str(fewest)
        must = f"be at most {counts.min()}, the training images of class {name!r}"
        raise Refused("labels", must, f"{max(labels)} in {train.name}", "few_labels")


def _contenders(
    models: Mapping[str, Model], train: ImageData, held_out: ImageData, seed: int, fine_tune: bool
) -> list[Contender]:
    known = np.asarray(train.labels)
    # features are scaled by these: labels play no part in the choice
    reference = np.sort(np.random.default_rng(seed).permutation(len(train))[:_REFERENCE])

    def frozen(train_blocks: list[Tensor], test_blocks: list[Tensor], classify: Any) -> Callable[..., Any]:
        scale = Scale([block[reference] for block in train_blocks])
        test = scale(test_blocks).numpy()

        def predict(labelled: np.ndarray, draw: int) -> np.ndarray:
            own = scale([block[labelled] for block in train_blocks]).numpy()
            return classify(own, known[labelled], test)

        return predict

    pixels, unseen = ([torch.from_numpy(np.asarray(d.images) / 255.0).flatten(1)] for d in (train, held_out))
    first: dict[tuple, str] = {}
    out, alike = [], []
    for name, model in models.items():
        nets = energy_nets(model)
        own, tested = (energy_features(model, d.images) for d in (train, held_out))
        out.append(Contender(f"{name}: features", LEARNED, name, name, frozen(own, tested, readout.kernel_predictions)))
        inputs = [scaled_down(model, d.images) for d in (train, held_out)]
        if fine_tune:

            def learned(draw: int, nets: Sequence[ScoreNet] = nets) -> Sequence[ScoreNet]:
                return nets

            predict = _end_to_end(learned, inputs, known, reference)
            out.append(Contender(f"{name}: fine-tuned", FINE_TUNED, name, name, predict))
        key = (model.sizes, model.value_range, *(str(_fresh(net, 0).config()) for net in nets))
        if key in first:
            continue
        first[key] = name

        def begin(draw: int, nets: Sequence[ScoreNet] = nets) -> list[ScoreNet]:
            device = next(nets[0].parameters()).device
            seeds = np.random.SeedSequence([seed, draw]).generate_state(len(nets), np.uint32)
            return [_fresh(net, int(s)).to(device) for net, s in zip(nets, seeds, strict=True)]

        def untrained(labelled: np.ndarray, draw: int, begin: Any = begin, inputs: Any = inputs) -> np.ndarray:
            nets = readout.readable(begin(draw), [x[reference] for x in inputs[0]])
            own, tested = (read_maps(nets, x) for x in inputs)
            return frozen(own, tested, readout.kernel_predictions)(labelled, draw)

        alike.append(
            Contender(
                f"nets of {name}: supervised only", SUPERVISED, None, name, _end_to_end(begin, inputs, known, reference)
            )
        )
        alike.append(Contender(f"nets of {name}: random, frozen", RANDOM, None, name, untrained))
    out += alike
    out.append(Contender("pixels", PIXELS, None, None, frozen(pixels, unseen, readout.kernel_predictions)))
    out.append(
        Contender(
            "pixels, logistic regression", PIXELS, None, None, frozen(pixels, unseen, readout.logistic_predictions)
        )
    )
    return out


def _end_to_end(
    begin: Callable[[int], Sequence[ScoreNet]], inputs: list[list[Tensor]], known: np.ndarray, reference: np.ndarray
) -> Callable[[np.ndarray, int], np.ndarray]:
    def predict(labelled: np.ndarray, draw: int) -> np.ndarray:
        train, test = inputs
        return readout.net_predictions(
            begin(draw), [x[reference] for x in train], [x[labelled] for x in train], known[labelled], test, seed=draw
        )

    return predict


def _fresh(net: ScoreNet, seed: int) -> ScoreNet:
    """The layers of a net with random weights; of one whose statistics were folded in, as it was before that."""
    config = net.config()
    if net.norm == "frozen":
        config["norm"] = "batch"
    return from_config(config, seed=seed)
