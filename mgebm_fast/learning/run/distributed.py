"""Several processes as one run: who takes which part of a batch, means in a fixed order, errors that end every rank.

A batch is `parts` equal parts. Each is run by itself, with its own batch statistics and the sample ids of its places
in the whole batch; what the parts give (gradients, energies, running statistics) is averaged as

    (part 0 + part 1 + … + part P − 1) / P              float32, added in this order

wherever they were run. So one process, or any number of ranks that divides P, makes the same run bit for bit, as far
as the parts themselves are equal (the same machine, build and threads a process). An all-reduce promises no order;
hence an all-gather of the parts and a sum on every rank: P copies of the gradients, small next to a chain's images.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import BackendError, CheckpointError, ConfigError, DataError, DivergenceError

Run = Callable[[Tensor, int], list[Tensor]]

_GOING, _STOP, _FAILED = 0, 1, 2
_TEXT_BYTES = 8192
_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        BackendError, CheckpointError, ConfigError, DataError, DivergenceError, FileExistsError, MemoryError, OSError,
        TypeError, ValueError,
    )
}  # fmt: skip
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class RankLost(ConnectionError):
    """Another rank ended, or cannot be reached, in the middle of a run."""


class Ranks:
    """The processes of one run. All hold the same weights, and call everything here in the same order.

    Rank 0 writes and speaks for all. A process by itself is rank 0 of 1, and communicates nothing.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.failed = False  # whether rank 0 reports the error that ends this one, so that this rank stays silent
        self._asked: Callable[[], bool] = lambda: False
        self._agreed_to_stop = False
        # Text and flags are exchanged in main memory, so that no GPU waits for them.
        self._host = None if size == 1 or "gloo" in str(dist.get_backend_config()) else dist.new_group(backend="gloo")

    @classmethod
    def present(cls) -> Ranks:
        """The ranks of torch.distributed's default group; a process by itself where there is none."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    # means over the parts of a batch

    def places(self, batch_size: int) -> range:
        """The places of the whole batch that this rank holds."""
        return range(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def mean(self, run: Run, batch: Tensor, parts: int, length: int) -> list[Tensor]:
        """The mean over all `parts` of what `run(images, place of the first in the whole batch)` gives.

        Args:
            run: gives float32 tensors, of the same shapes for every part and `length` entries in all.
            batch: (N, …), this rank's share of the whole batch.

        Raises what `run` raised on any rank, on all of them; RankLost; ValueError where no parts can be equal.
        """
        own = parts // self.size
        if parts % self.size or len(batch) % own:
            raise ValueError(
                f"training: a batch must divide into {parts} equal parts over {self.size} ranks, got {len(batch)} "
                "images a rank"
            )
        images, start = len(batch) // own, self.rank * len(batch)
        shares = [(batch[i : i + images], start + i) for i in range(0, len(batch), images)]
        if self.size > 1:
            return self._mean_over_ranks(run, shares, parts, length)
        total = run(*shares[0])
        for share in shares[1:]:
            torch._foreach_add_(total, run(*share))
        if parts > 1:
            torch._foreach_div_(total, parts)
        return total

    def _mean_over_ranks(self, run: Run, shares: list[tuple[Tensor, int]], parts: int, length: int) -> list[Tensor]:
        rows: list[Tensor] = []
        shapes: list[torch.Size] = []
        failure: Exception | None = None
        try:
            for share in shares:
                values = run(*share)
                shapes = [value.shape for value in values]
                rows.append(torch.cat([value.flatten() for value in values]))
        except RankLost:
            raise
        except Exception as error:
            failure = error
        # Whether a rank failed is the last entry of its rows: one exchange and one host sync per update.
        status = _FAILED if failure else _STOP if self._asked() else _GOING
        mine = torch.full((len(shares), length + 1), float(status), device=self._meeting_place())
        if failure is None:
            mine[:, :length] = torch.stack(rows)
        table = mine.new_empty((parts, length + 1))
        with self._reaching("another rank"):
            dist.all_gather(list(table.split(len(shares))), mine)
        states = [int(number) for number in table[:: len(shares), -1].tolist()]
        if _FAILED in states:
            self._fail(states.index(_FAILED), failure)
        self._agreed_to_stop = _STOP in states
        total = table[0, :length].clone()
        for row in table[1:]:
            total += row[:length]
        total /= parts
        # Copies, since kernels may add in another order where a tensor does not start at an aligned address.
        pieces = total.split([shape.numel() for shape in shapes])
        device = rows[0].device
        return [piece.to(device, copy=True).view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    # agreement

    def stop_when(self, asked: Callable[[], bool]) -> None:
        """`asked()`: whether this rank was told to stop; the ranks agree on it once an update."""
        self._asked, self._agreed_to_stop = asked, False

    def stops(self) -> bool:
        """Whether any rank was told to stop, as all knew in the last update; of a process by itself, now."""
        return self._asked() if self.size == 1 else self._agreed_to_stop

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work that a rank may fail at: on leaving, all wait for each other, and all raise what one of them raised."""
        failure: Exception | None = None
        try:
            yield
        except RankLost:
            raise
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        if self.size == 1:
            return
        states = self.gather(_FAILED if failure else _GOING)
        if _FAILED in states:
            self._fail(states.index(_FAILED), failure)

    def gather(self, number: int) -> list[int]:
        """The number of each rank; it must fit 64 bits."""
        if self.size == 1:
            return [number]
        numbers = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        with self._reaching("another rank"):
            dist.all_gather(numbers, torch.tensor([number]), group=self._host)
        return [int(n) for n in numbers]

    def tell(self, text: str, source: int = 0) -> str:
        """The text of rank `source`, on every rank; texts of the others are ignored. Cut at 8 KiB."""
        if self.size == 1:
            return text
        letters = torch.zeros(_TEXT_BYTES, dtype=torch.uint8)
        said = text.encode()[:_TEXT_BYTES]
        if self.rank == source:
            letters[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8) if said else 0
        with self._reaching(f"rank {source}"):
            dist.broadcast(letters, source, group=self._host)
        return bytes(letters.tolist()).rstrip(b"\0").decode(errors="ignore")

    def collect(self, own: Tensor, counts: list[int]) -> Tensor:
        """The rows of all ranks in the order of ranks, on the CPU; rank r has `counts[r]`."""
        pieces = []
        for rank, count in enumerate(counts):
            piece = (
                own.cpu().contiguous() if rank == self.rank else torch.empty((count, *own.shape[1:]), dtype=own.dtype)
            )
            if self.size > 1 and count:
                with self._reaching(f"rank {rank}"):
                    dist.broadcast(piece, rank, group=self._host)
            pieces.append(piece)
        return torch.cat(pieces)

    def follow_first_(self, tensors: list[Tensor]) -> None:
        """Give every rank the values of rank 0, in place."""
        for tensor in tensors if self.size > 1 else []:
            sent = tensor.detach().to(self._meeting_place()).contiguous()
            with self._reaching("rank 0"):
                dist.broadcast(sent, 0)
            tensor.detach().copy_(sent)

    def check_same(self, what: str, number: int) -> None:
        """ValueError unless every rank has the same number for `what`."""
        numbers = self.gather(number)
        other = next((rank for rank, found in enumerate(numbers) if found != numbers[0]), None)
        if other is not None:
            self.failed = self.rank > 0
            raise ValueError(f"torchrun: every rank must have the same {what}, got another on rank {other} than on 0")

    def _fail(self, rank: int, own: Exception | None) -> None:
        """Raise the error of `rank` here; every rank calls this, and rank 0 alone reports it."""
        words = self.tell(f"{type(own).__name__}\n{own}", source=rank)
        self.failed = self.rank > 0
        if own is not None:
            raise own
        name, _, message = words.partition("\n")
        kind = _ERRORS.get(name)
        raise kind(message) if kind else RuntimeError(f"rank {rank}: {name}: {message}")

    @contextlib.contextmanager
    def _reaching(self, whom: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.failed = self.rank > 1  # rank 0 may be the one that ended
            raise RankLost(f"torchrun: {whom} cannot be reached any more, a process of this run has ended") from error

    @staticmethod
    def _meeting_place() -> torch.device:
        """The device on which tensors are exchanged: the rank's GPU over NCCL, else main memory."""
        if "nccl" in str(dist.get_backend_config()):
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return all(name in os.environ for name in _TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def local_device(name: str = "auto") -> torch.device:
    """The device of this rank: with CUDA the GPU of its place on the host, LOCAL_RANK; else the CPU.

    ValueError where one GPU is named. BackendError where there are fewer than ranks.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"--device: must be auto, cpu or cuda under torchrun, where each rank has its GPU, got {name!r}"
        )
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    place, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if place >= count:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", "more")
        raise BackendError(f"torchrun: --nproc-per-node must be at most the {count} GPUs that torch finds, got {ranks}")
    return torch.device("cuda", place)


@contextlib.contextmanager
def joined(device: torch.device | None = None) -> Iterator[Ranks]:
    """The ranks that torchrun started this process among, or the default group's where one exists already.

    Exchanges go over NCCL for a CUDA device, else over gloo.
    """
    if dist.is_available() and dist.is_initialized() or not launched():
        yield Ranks.present()
        return
    device = local_device() if device is None else device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks.present()
    finally:
        dist.destroy_process_group()
