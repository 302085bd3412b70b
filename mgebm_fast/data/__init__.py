"""Images for training and evaluation: `load` reads any source by one policy, `ImageData` holds the result.

`Clips` are windows of a recording: `data.video`, `data.sound`. `data.fingerprint` says whether data are still the same.
"""

from . import fingerprint
from .clips import Clips
from .image_data import ImageData
from .loading import load

__all__ = ["Clips", "ImageData", "fingerprint", "load"]
