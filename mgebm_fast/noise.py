"""Counter-based noise: Philox4x32-10 (Salmon et al., SC 2011) in plain torch, and the table of streams.

One call of Philox turns a counter (c0, c1, c2, c3) and a key (k0, k1) into four 32-bit words:

    key     = (seed low 32 bits, seed high 32 bits)             0 <= seed < 2**64
    counter = (quad, sample id, step, stream)                   quad = element // 4 in logical C, H, W order
    u       = fma(float32(word), 2**-32, 2**-33)                in (0, 1], float32
    normals = sqrt(-2 ln u0) * (cos, sin)(2 pi u1), and the same of (u2, u3)      (Box and Muller)

So a number depends on (seed, sample id, step, stream, pixel) and on nothing else. The functions here are the
reference: integer arithmetic in int64, normals in float64 from the float32 `u`. `mgebm_fast.ops.noise` is the fast
form.
"""

from __future__ import annotations

import enum
import math
import threading

import torch
from torch import Tensor

from .checks import is_int, number
from .errors import Refused

WORD = 0xFFFFFFFF
MAX_INTEGER = 2**31
MAX_ATTEMPT = 255

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


class Purpose(enum.IntEnum):
    """What a draw is for, below 256. No two uses share a number, so no counter is ever used twice for two things."""

    USER = 0
    TRAINING_CHAIN = 1
    SAMPLING = 2
    DATA_NOISE = 3
    COLOUR_DRAW = 4
    BANK_DRAW = 5
    LATENT = 6
    MOMENTUM = 7
    ACCEPTANCE = 8
    DATA_ORDER = 9
    AUGMENTATION = 10
    INITIAL_STATE = 11
    BANK_RESTART = 12
    SAMPLING_STATE = 13
    SAMPLING_BANK = 14
    SIMULATED_DATA = 15
    OCCLUSION = 16
    PROBE = 17


def stream(purpose: Purpose | int, grid: int = 0) -> int:
    """The stream word: `purpose << 16 | grid`, with `grid` the index in `sizes`."""
    if not 0 <= int(purpose) < 1 << 16:
        raise ValueError(f"stream: purpose must be in [0, 65536), got {purpose}")
    if not 0 <= grid < 1 << 16:
        raise ValueError(f"stream: grid must be in [0, 65536), got {grid}")
    return int(purpose) << 16 | grid


def retried(purpose: Purpose, attempt: int) -> int:
    """The purpose of the same draw in attempt number `attempt` of a run, 0 … 255: `attempt << 8 | purpose`.

    Purposes are below 256, so that the stream word is `attempt << 24 | purpose << 16 | grid`, and a run that goes back
    and tries again never draws what it drew before.
    """
    if not 0 <= attempt <= MAX_ATTEMPT:
        raise ValueError(f"retried: attempt must be in [0, {MAX_ATTEMPT}], got {attempt}")
    return attempt << 8 | int(purpose)


def check_seed(seed: int, where: str) -> int:
    """`seed` as an int when it is one in [0, 2**64), else an error."""
    seed = number(seed)
    if not is_int(seed):
        raise TypeError(f"{where}: seed must be an int or an int64 tensor, got {type(seed).__name__}")
    if not 0 <= seed < 1 << 64:
        raise Refused("seed", "be in [0, 2**64)", seed, where)
    return seed


def is_eager() -> bool:
    """Whether torch's calls run as they are written: no compiler, dispatch mode or transform takes them up."""
    compiled = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    return not compiled and torch._C._functorch.peek_interpreter_stack() is None


class _Scratch(threading.local):
    """One number a thread: seeds are drawn in place, since making a tensor costs twice as much as the draw."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # a tensor of inference mode could not be written outside
            self.number = torch.empty((), dtype=torch.int64, device="cpu")


_scratch, _CPU = _Scratch(), torch.device("cpu")


def resolve_seed(
    seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device, where: str
) -> int | Tensor:
    """`seed` itself, or where it is None a fresh one in [0, 2**63 − 1), so that no two calls share their noise.

    It comes from `generator`, by default torch's global CPU generator, which `torch.manual_seed` seeds. In a call that
    is captured in a CUDA graph or compiled, a number would be a constant of the graph: there the seed is a tensor drawn
    on `device` by its own generator (which `torch.manual_seed` seeds too), and every replay draws another.
    """
    if seed is generator is None and device.type == "cpu" and is_eager():  # the usual case
        return int(_scratch.number.random_(2**63 - 1).item())  # the number that randint would draw
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{where}: generator must be a torch.Generator or None, got {type(generator).__name__}")
    if seed is not None:
        if generator is not None:
            raise ValueError(f"{where}: seed and generator exclude each other, got both")
        return seed
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    source = generator.device if generator is not None else device if captured else _CPU
    if captured and source.type != "cuda":
        raise ValueError(f"{where}: generator must be on {device} while a CUDA graph is captured, got {source}")
    on_cpu = source is _CPU or source.type == "cpu"
    if on_cpu and is_eager():
        return int(_scratch.number.random_(2**63 - 1, generator=generator).item())
    drawn = torch.randint(2**63 - 1, (), dtype=torch.int64, device=source, generator=generator)
    if on_cpu and not torch.compiler.is_compiling() and type(drawn) is Tensor:  # no fake tensor
        return int(drawn)
    return drawn.to(device)


def check_counter(value: int, name: str, where: str, *, last: int = 0) -> int:
    """`value` itself when `value … value + last` fit a 32-bit counter word, else an error: counters never wrap."""
    if not is_int(value):
        raise TypeError(f"{where}: {name} must be an int or an int64 tensor, got {type(value).__name__}")
    if value < 0 or value + last > WORD:
        reach = f"{value}" if last <= 0 else f"{value} … {value + last}"
        raise ValueError(f"{where}: {name} must stay in [0, 2**32), got {reach}")
    return value


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of `constant * word`: by 16-bit halves, since int64 cannot hold the whole product."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def philox(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int],
    key: tuple[Tensor | int, Tensor | int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four words (int64 tensors in [0, 2**32)) from broadcastable counter words and key words."""
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    c0, c1, c2, c3 = torch.broadcast_tensors(
        *(
            word.long() if isinstance(word, Tensor) else torch.full((), word, dtype=torch.int64, device=device)
            for word in counter
        )  # torch.full is a kernel; as_tensor of a number on a GPU would be a copy from the host, and wait for it
    )
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIER_0, c0)
        high1, low1 = _multiply(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL_0) & WORD, (k1 + _WEYL_1) & WORD
    return c0, c1, c2, c3


def words(
    n: int,
    elements: int,
    *,
    seed: int | Tensor,
    step: int | Tensor,
    first_sample: int | Tensor = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Philox words of `n` samples of `elements` each.

    Returns:
        words: (n, ceil(elements / 4), 4) int64 in [0, 2**32)
        valid: (n, 1, 1) bool, False where a counter held in a tensor does not fit 32 bits
    """
    quads = -(-elements // 4)
    quad = torch.arange(quads, device=device, dtype=torch.int64)[None, :]
    if isinstance(first_sample, Tensor) and first_sample.dim() == 1:
        sample = first_sample.to(device)
    else:
        sample = torch.arange(n, device=device, dtype=torch.int64) + first_sample
    sample = sample[:, None]
    step = step.to(device) if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)
    valid = (sample >> 32 == 0) & (step >> 32 == 0)
    key = (seed & WORD, (seed >> 32) & WORD)
    block = philox((quad, sample & WORD, step & WORD, stream), key)
    return torch.stack(block, dim=-1), valid[:, :, None]


def uniform(word: Tensor) -> Tensor:
    """`fma(float32(word), 2**-32, 2**-33)`: the product is exact, so one float32 addition is that fma."""
    return word.to(torch.float32) * 2.0**-32 + 2.0**-33


def normal(word: Tensor) -> Tensor:
    """Box–Muller on the last dimension (four words, four normals), float64 arithmetic from the float32 uniforms."""
    u = uniform(word).double()
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0::2]))
    angle = 2.0 * math.pi * u[..., 1::2]
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


def integers(
    high: int,
    n: int,
    *,
    seed: int,
    step: int,
    first_sample: int | Tensor = 0,
    stream: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """One integer in [0, high) a sample: `floor(w0 * high / 2**32)`, whose bias is below `high / 2**32`.

    Returns (n,) int64 on `device`. `high` must be in [1, 2**31].
    """
    if not 1 <= high <= MAX_INTEGER:
        raise ValueError(f"integers: high must be in [1, 2**31], got {high}")
    check_seed(seed, "integers")
    check_counter(step, "step", "integers")
    if not isinstance(first_sample, Tensor):
        check_counter(first_sample, "first_sample", "integers", last=n - 1)
    word, _ = words(n, 1, seed=seed, step=step, first_sample=first_sample, stream=stream, device=device)
    return word[:, 0, 0] * high >> 32


def permutation(n: int, *, seed: int, step: int, stream: int = 0) -> Tensor:
    """A shuffle of 0 … n − 1, a function of (seed, step, stream): the order of 63-bit Philox keys. (n,) int64."""
    check_seed(seed, "permutation")
    check_counter(step, "step", "permutation")
    word, _ = words(1, 2 * n, seed=seed, step=step, stream=stream)
    pair = word.reshape(-1)[: 2 * n].reshape(n, 2)
    return torch.argsort(pair[:, 0] << 31 | pair[:, 1] >> 1, stable=True)
