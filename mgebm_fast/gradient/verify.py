"""A reading is trusted once its gradient was compared with autograd's, the first time that a net is read in this form.

What is compared is ∇E of four samples of noise: that of the stages by the chain rule, and that of the module's own code
by autograd, both in float32 and not TF32, by which they would differ by up to 6 %. They differ by rounding, and by the
few units whose input lies at the kink of a ReLU; another net differs by tenths.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.conv_chain import gradient_reference
from .autograd import AutogradPlan
from .conv import ConvPlan
from .exact import exact_cudnn
from .holding import frozen_parameters
from .stack import Stack, layout_of

# Largest ‖difference‖ / ‖gradient‖ of a reading that is trusted.
BOUND = 0.02
_SAMPLES = 4

# energy -> {the form of a reading: why it is not trusted, "" where it is}
_found: MutableMapping[nn.Module, dict[Hashable, str]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def why_not_trusted(energy: nn.Module, stack: Stack, x: Tensor) -> str:
    """Why the reading of an energy differs from its own code; an empty string where it does not, or cannot be asked
    now: while a graph is captured, or where a weight is not finite or was made in inference mode."""
    key = (*(layout_of(stage) for stage in stack.stages), stack.head.shape, x.device)
    with _lock:
        known = _found.setdefault(energy, {})
    if key not in known:
        with torch.inference_mode(False):  # whose tensors autograd refuses: the net would be distrusted for good
            reason = _compared(energy, stack, x)
        if reason is None:
            return ""
        known[key] = reason
    return known[key]


def _compared(energy: Any, stack: Stack, x: Tensor) -> str | None:
    if torch.compiler.is_compiling() or any(parameter.is_inference() for parameter in energy.parameters()):
        return None
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    generator = torch.Generator().manual_seed(0)
    shape = (_SAMPLES, stack.channels, *stack.size)
    probe = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(x.device)
    try:
        with frozen_parameters(energy), torch.autocast(x.device.type, enabled=False), exact_cudnn(x.device):
            own = AutogradPlan(energy, "plan").gradient(probe)
        if stack.has_shortcuts:
            read = gradient_reference(stack.stages, stack.head, probe).float()
        else:
            read = ConvPlan(stack, energy, "fp32").gradient(probe)
    except (MemoryError, torch.OutOfMemoryError):
        return None
    except Exception as error:  # what its own code refuses must not run
        return f"its own code raises {type(error).__name__}: {' '.join(str(error).split())}"
    apart, size = float((own - read).norm()), float(own.norm())
    if not torch.isfinite(torch.tensor([apart, size])).all():
        return None
    if apart <= BOUND * size or apart <= 1e-6 * probe.norm():
        return ""
    return f"its gradient is {apart / max(size, 1e-30):.2g} away from autograd's, more than {BOUND}"
