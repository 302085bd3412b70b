"""`mgebm evaluate`: samples against held-out real images, as a table or as one JSON object."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    MOST_SAMPLES,
    MOST_SEED,
    Device,
    Json,
    RunPath,
    Threads,
    collapse_of,
    fingerprint_of,
    load_images,
    named_options,
    open_model,
    print_json,
    source_of,
    use_threads,
)


def evaluate(
    run: RunPath,
    num: Annotated[int, typer.Option(min=2, max=MOST_SAMPLES, help="How many samples to draw.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of the samples.")] = 0,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="Images to compare with. Default: those it was trained on.")
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Feature space of FID, KID, precision and recall: auto, imagenet, inception or classifier.",
        ),
    ] = "auto",
    json: Json = False,
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Draw samples and measure how near they come to held-out real images.

    \b
    Examples:
      mgebm evaluate runs/digits --num 1000
      mgebm evaluate runs/digits --num 1000 --json > digits.json
      mgebm evaluate runs/photos --features imagenet

    KID and FID compare feature statistics (the feature space is named); lower is nearer. Colour images are judged by a
    net that knows ImageNet where mgebm_fast[imagenet] is installed, others by a classifier trained here. precision is
    the share of samples among the training images, recall the share of these among the samples. nearest_distance is
    the mean pixel distance to the nearest training image: far below that of real held-out images it means copying.
    For labelled data, confident_share is the share of samples that a classifier recognises with probability >= 0.9, and
    class_shares splits it by class. The *_real values are the same measures of as many held-out real images.
    """
    use_threads(threads)
    from ..evaluation import evaluate as measure
    from ..evaluation import format_report

    model, config = open_model(run, device, "evaluate")
    source = source_of(run, data, config)
    classes = config.classes if config else ()
    size, channels = model.sizes[-1], model.channels
    like = fingerprint_of(run, source, config)
    train, held_out = (
        load_images(source, size, channels, classes, split=split, like=like) for split in ("train", "held_out")
    )
    with named_options("features"):
        result = measure(model, train, held_out, num=num, seed=seed, features=features)
    if words := collapse_of(run):
        result["notes"].append(words)
    if json:
        print_json(result)
        return
    from rich.console import Console

    Console().print(format_report(result))
