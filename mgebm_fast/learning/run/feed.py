"""The order that images are shown in: a function of (seed, update), so that a resumed run sees what it would have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ... import noise, ops
from ...data import Clips, ImageData


class Order:
    """Which images the batch of an update holds: places iteration·B … iteration·B + B − 1 of the epochs' shuffles.

    Epoch e is `noise.permutation(n, seed, step=e)`. No image is left out of an epoch, and a set smaller than a batch
    still fills it.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._orders: dict[tuple[int, int], Tensor] = {}

    @property
    def per_epoch(self) -> int:
        """Updates in which every image is seen."""
        return -(-self.n // self.batch_size)

    def indices(self, iteration: int, other: int = 0) -> Tensor:  # (B,) int64
        """Which images batch `iteration` holds, over all ranks; `other` counts other orders, for other images."""
        place, parts, left = iteration * self.batch_size, [], self.batch_size
        while left:
            epoch, offset = divmod(place, self.n)
            part = self._order(epoch, other)[offset : offset + left]
            parts.append(part)
            place, left = place + len(part), left - len(part)
        return torch.cat(parts)

    def _order(self, epoch: int, other: int) -> Tensor:
        if (epoch, other) not in self._orders:
            stream = noise.stream(noise.Purpose.DATA_ORDER, other)
            self._orders = {(epoch, other): noise.permutation(self.n, seed=self.seed, step=epoch, stream=stream)}
        return self._orders[epoch, other]


class Batches:
    """Batch `iteration` of a data set, in the order of `Order`.

    With `flips` a bit of the AUGMENTATION stream mirrors each image along its last dimension; with `shifts` each is
    moved by up to so many pixels along the last two (`moved`). All ranks go through one order; `places` of a batch are
    the share that this one reads, by default the whole.

    With `labelled` a batch is labelled(images, labels), labels (len(places),) int64.

    With `ahead` a thread makes the next batch, in pinned memory, while the caller works on the one it has: a GPU then
    does not wait for it. A CPU that trains has no core to spare for that.
    """

    def __init__(
        self,
        data: ImageData | Clips,
        batch_size: int,
        *,
        seed: int,
        flips: bool = False,
        shifts: int = 0,
        places: range | None = None,
        ahead: bool = False,
        labelled: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.data, self.batch_size, self.seed, self.flips, self.shifts = data, batch_size, seed, flips, shifts
        self.places = range(batch_size) if places is None else places
        self._order, self._labelled = Order(len(data), batch_size, seed), labelled
        self._thread = ThreadPoolExecutor(1, "mgebm-batches") if ahead else None
        self._fingerprint: Mapping[str, Any] | None = None
        self._next: tuple[int, Future[Tensor]] | None = None

    def indices(self, iteration: int, other: int = 0) -> Tensor:  # (B,) int64
        """Which images batch `iteration` holds, over all ranks."""
        return self._order.indices(iteration, other)

    def fingerprint(self) -> Mapping[str, Any]:
        """What tells these data from others (`data.fingerprint`); taken once, since it reads all of them."""
        if self._fingerprint is None:
            self._fingerprint = self.data.fingerprint()
        return self._fingerprint

    def batch(self, iteration: int, other: int = 0) -> Tensor:  # (len(places), C, S, S) uint8, on the CPU
        """The images at `places` of batch `iteration`, or of another draw for it (`Order.indices`)."""
        if self._thread is None:
            return self._read(iteration, other)
        if other:
            return self._thread.submit(self._read, iteration, other).result()
        expected, coming = self._next or (None, None)
        # One thread, so that what it makes now is done before it is asked for another batch.
        images = (coming if coming and expected == iteration else self._thread.submit(self._read, iteration)).result()
        self._next = iteration + 1, self._thread.submit(self._read, iteration + 1)
        return images

    def _read(self, iteration: int, other: int = 0) -> Tensor:
        indices = self.indices(iteration, other)[self.places.start : self.places.stop]
        images = self.data.batch(indices)
        if self.flips:
            draw = self._draw(iteration, len(images), 1, 0)
            images = torch.where(draw.reshape(-1, *[1] * (images.dim() - 1)) > 0.5, images.flip(-1), images)
        if self.shifts:
            draw = self._draw(iteration, len(images), 2, 1)
            images = moved(images, (draw * (2 * self.shifts + 1)).ceil().long() - 1 - self.shifts)
        if self._labelled is not None:
            assert isinstance(self.data, ImageData) and self.data.labels is not None
            images = self._labelled(images, torch.from_numpy(self.data.labels)[indices])
        return images.pin_memory() if self._thread is not None and torch.cuda.is_available() else images

    def _draw(self, iteration: int, n: int, numbers: int, index: int) -> Tensor:  # (n, numbers) in (0, 1]
        return ops.noise(
            (n, numbers), seed=self.seed, step=iteration, first_sample=self.places.start,
            stream=noise.stream(noise.Purpose.AUGMENTATION, index), distribution="uniform",
        )  # fmt: skip


def moved(images: Tensor, by: Tensor) -> Tensor:  # (N, C, H, W), (N, 2) int64 -> (N, C, H, W)
    """Each image moved by (down, right) pixels, less than its sides; where it left, it is mirrored at its border."""
    index = []
    for length, steps in zip(images.shape[2:], by.unbind(1), strict=True):
        place = torch.arange(length) - steps[:, None]
        place = torch.where(place < 0, -1 - place, place)
        index.append(torch.where(place >= length, 2 * length - 1 - place, place))
    rows, columns = index
    first = torch.arange(len(images))[:, None, None]
    return images[first, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
