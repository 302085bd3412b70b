#!/usr/bin/env python3
"""Make `cifar10.zip`, the class folders that docs/gallery.md and docs/results train on, of CIFAR-10's own archive.

  python scripts/cifar10_zip.py cifar-10-python.tar.gz cifar10.zip

It holds the 50,000 training images as CLASS/00000.png; mgebm trains on nine tenths of a class (4,500) and holds the
rest out. The archive is at https://www.cs.toronto.edu/~kriz/cifar.html; `--data` also takes it as it is, and then
trains on its 5,000 training images of a class and holds out its 1,000 test images.
"""

from __future__ import annotations

import argparse
import io
import os
import zipfile
from collections import Counter
from pathlib import Path

from PIL import Image

from mgebm_fast import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", help="cifar-10-python.tar.gz, or any labelled source of mgebm")
    parser.add_argument("out", type=Path, help="the zip, not there yet")
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"out: must not exist yet, got {options.out}")
    images = data.load(options.archive, size=options.size, channels=3)
    if images.labels is None:
        parser.error(f"archive: must have labelled images, got {options.archive} without labels")
    part = options.out.with_name(f".{options.out.name}.part")
    count: Counter[str] = Counter()
    with zipfile.ZipFile(part, "w") as file:  # PNG is compressed already
        for pixels, label in zip(images.images, images.labels, strict=True):
            name, buffer = images.class_names[label], io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, format="png")
            file.writestr(f"{name}/{count[name]:05d}.png", buffer.getvalue())
            count[name] += 1
    os.replace(part, options.out)
    print(f"{options.out}: {len(images)} images, " + ", ".join(f"{n} of {name}" for name, n in sorted(count.items())))


if __name__ == "__main__":
    main()
