"""What a run remembers of its data, so that a later command can say whether they are still the same.

A fingerprint is a dict for a JSON file: of images

    kind, policy, shape   "images"; the version of the pixel policy; [channels, size, size]
    count, listed         images of this part; images of all parts, those that cannot be read included
    digest                one hash of all names and contents in their order
    names, held_out       name of each image, and of each that the source holds out: a path in the folder or archive,
                          or a place in an array; null in a set of more than MOST images
    content               CRC-32 of the pixels of each image, 8 hex digits each; null likewise

and of a recording `kind` "clips", `shape`, `count` and `digest`. Nothing in it depends on the machine, on where the
data lie, or on the cache.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

MOST = 1 << 16  # images whose names and contents are kept one by one: about 2 MB of JSON
_SHOWN = 3


def of_images(images: np.ndarray, names: Sequence[str], held_out: Sequence[str], policy: int) -> dict[str, Any]:
    """Fingerprint of images (N, C, S, S) uint8, their N names, and the names that their source holds out."""
    contents = np.fromiter((zlib.crc32(np.ascontiguousarray(image).data) for image in images), ">u4", len(images))
    names = names or [str(i) for i in range(len(images))]
    digest = hashlib.sha256(f"{images.shape[1:]}\0".encode())
    for name in names:
        digest.update(name.encode(errors="surrogatepass") + b"\0")
    digest.update(contents.tobytes())
    listed = len({*names, *held_out})
    small = listed <= MOST
    return {
        "kind": "images",
        "policy": policy,
        "shape": list(images.shape[1:]),
        "count": len(images),
        "listed": listed,
        "digest": digest.hexdigest()[:32],
        "names": list(names) if small else None,
        "held_out": list(held_out) if small else None,
        "content": contents.tobytes().hex() if small else None,
    }


def of_recording(recording: np.ndarray, shape: Sequence[int], rate: float) -> dict[str, Any]:
    """Fingerprint of a recording, (C, total, H, W) uint8 or (C, total) float32, and of the shape of its clips."""
    digest = hashlib.sha256(f"{recording.shape} {float(rate)!r}\0".encode())
    for channel in recording:
        digest.update(np.ascontiguousarray(channel, recording.dtype.newbyteorder("<")).data)
    return {
        "kind": "clips",
        "shape": [recording.shape[0], *shape],
        "count": recording.shape[1],
        "digest": digest.hexdigest()[:32],
    }


def difference(stored: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two fingerprints of the same part of a source, in one sentence; "" where nothing does."""
    if stored.get("kind") != now["kind"]:
        return f"they are {now['kind']} where they were {stored.get('kind')}"
    if stored.get("shape") != now["shape"]:
        then = stored.get("shape")
        said = "×".join(map(str, then)) if isinstance(then, list) else f"{then}"
        return f"they are {'×'.join(map(str, now['shape']))} each where they were {said}"
    same_policy = stored.get("policy") == now.get("policy")
    if stored.get("digest") == now["digest"] and same_policy:
        return ""
    if now["kind"] == "clips":
        return "the recording is another"
    then, here = _contents(stored), _contents(now)
    if then is None or here is None:
        if not same_policy and stored.get("count") == now["count"]:
            return ""  # pixels are made by another policy, and names are not kept: nothing to compare
        counts = f"{now['count']} images where there were {stored.get('count')}"
        return counts if stored.get("count") != now["count"] else "names or pixels of some images differ"
    listed_then, listed_here = (dict.fromkeys([*part, *fp["held_out"]]) for part, fp in ((then, stored), (here, now)))
    changes = {
        "added": [name for name in listed_here if name not in listed_then],
        "removed": [name for name in listed_then if name not in listed_here],
        "replaced": [name for name in here if same_policy and name in then and then[name] != here[name]],
    }
    parts_said = [f"{len(found)} {what} ({_some(found)})" for what, found in changes.items() if found]
    if parts_said:
        return f"of {len(listed_then)} images {', '.join(parts_said)}"
    return "" if list(then) == list(here) else "the same images are in another order or in other parts"


def same_set(stored: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether most images of one fingerprint are in the other: under their names, and with their pixels where these are
    made by one policy (sets of other images may have the same names: `001.png`)."""
    then, here = _contents(stored), _contents(now)
    if then is None or here is None:
        return stored.get("digest") == now["digest"]
    pixels = stored.get("policy") == now.get("policy")
    return 2 * sum(name in here and (not pixels or here[name] == crc) for name, crc in then.items()) > len(then)


def _contents(fingerprint: dict[str, Any]) -> dict[str, str] | None:
    """{name: CRC of its pixels} in order; None where they are not kept, or not as this module writes them."""
    names, held_out, content = (fingerprint.get(key) for key in ("names", "held_out", "content"))
    if not (isinstance(names, list) and isinstance(held_out, list) and isinstance(content, str)):
        return None
    if len(content) != 8 * len(names) or not all(isinstance(name, str) for name in [*names, *held_out]):
        return None
    return {name: content[8 * i : 8 * i + 8] for i, name in enumerate(names)}


def parts(fingerprint: dict[str, Any]) -> tuple[frozenset[str], frozenset[str]] | None:
    """Names of the part that a fingerprint was taken of, and of what was held out; None where they are not kept."""
    contents = _contents(fingerprint)
    return None if contents is None else (frozenset(contents), frozenset(fingerprint["held_out"]))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
