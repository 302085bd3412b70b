#!/usr/bin/env python3
"""Make `tiny.zip`, the class folders that docs/gallery.md and docs/results train on at 64x64, of Tiny ImageNet.

  python scripts/tiny_imagenet_zip.py tiny-imagenet-200.zip tiny.zip
  python scripts/tiny_imagenet_zip.py tiny-imagenet-200.zip cats.zip --classes n02123045=tabby n02124075=egyptian_cat

It holds the 500 training images of each class as they are, CLASS/n09193705_0.jpg; mgebm trains on nine tenths of a
class (450) and holds the rest out. The archive is at https://cs231n.stanford.edu/tiny-imagenet-200.zip.
"""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections import Counter
from pathlib import Path

CLASSES = [
    "n09193705=alp", "n09246464=cliff", "n09256479=coral_reef", "n09332890=lakeside", "n01443537=goldfish",
    "n02058221=albatross", "n02106662=german_shepherd", "n02124075=egyptian_cat", "n02279972=monarch_butterfly",
    "n02509815=lesser_panda", "n02814533=beach_wagon", "n03977966=police_van", "n04146614=school_bus",
    "n07768694=pomegranate", "n07873807=pizza", "n07920052=espresso",
]  # fmt: skip
TRAINING_IMAGE = re.compile(r"train/(n\d{8})/images/(\w+)\.jpe?g$", re.IGNORECASE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="tiny-imagenet-200.zip")
    parser.add_argument("out", type=Path, help="the zip, not there yet")
    parser.add_argument(
        "--classes", nargs="+", metavar="WNID=NAME", default=CLASSES, help="default: sixteen of the 200"
    )
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"out: must not exist yet, got {options.out}")
    named = dict(re.findall(r"^(n\d{8})=(\w+)$", "\n".join(options.classes), re.MULTILINE))
    if len(named) < len(options.classes):
        parser.error(f"classes: must be different, each as n09193705=alp, got {' '.join(options.classes)}")
    part, count = options.out.with_name(f".{options.out.name}.part"), Counter[str]()
    with zipfile.ZipFile(options.archive) as archive, zipfile.ZipFile(part, "w") as file:  # JPEG is compressed already
        for path in archive.namelist():
            found = TRAINING_IMAGE.search(path)
            if found and found[1] in named:
                name = named[found[1]]
                file.writestr(f"{name}/{found[2]}.jpg", archive.read(path))
                count[name] += 1
    missing = sorted(set(named.values()) - set(count))
    if missing:
        part.unlink()
        parser.error(f"archive: must have train/WNID/images of every class, got {options.archive} without {missing}")
    os.replace(part, options.out)
    print(f"{options.out}: {count.total()} images, " + ", ".join(f"{n} of {name}" for name, n in sorted(count.items())))


if __name__ == "__main__":
    main()
