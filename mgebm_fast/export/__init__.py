"""Models for programs without mgebm_fast: plain PyTorch, TorchScript, ONNX, and a sampler in one file."""

from .formats import FORMATS, export

__all__ = ["FORMATS", "export"]
