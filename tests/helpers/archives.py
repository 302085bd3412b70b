"""Archives made in memory."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile

import numpy as np


def tar_bytes(files, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=tarfile.PAX_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def zip_bytes(files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def cifar_bytes():
    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, -1)
    batch = pickle.dumps({b"data": pixels, b"labels": [0, 1]}, protocol=2)
    meta = pickle.dumps({b"label_names": [b"cat", b"dog"]}, protocol=2)
    folder = "cifar-10-batches-py"
    return {f"{folder}/data_batch_1": batch, f"{folder}/test_batch": batch, f"{folder}/batches.meta": meta}
