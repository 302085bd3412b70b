"""Images for training and evaluation: `load` reads any source by one policy, `ImageData` holds the result."""

from .image_data import ImageData
from .loading import load

__all__ = ["ImageData", "load"]
