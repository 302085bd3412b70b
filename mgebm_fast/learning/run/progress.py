"""What a run shows: a bar with rate and time left on a terminal, one line now and then anywhere else."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console


class Progress:
    """Shows updates `start` … `total`. `console` None shows nothing at all."""

    def __init__(self, console: Console | None, start: int, total: int) -> None:
        self._console, self._start, self._total = console, start, total
        self._bar: Any = None
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        if self._console is not None and self._console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[headline]}"),
                console=self._console,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=self._total, completed=self._start, rate="", headline="")
        self._began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, headline: str, *, logged: bool) -> None:
        """After update number `done`; `headline` says how training stands, `logged` whether it was recorded."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=self._rate(done), headline=headline)
        elif logged and self._console is not None:
            left = (self._total - done) * self._seconds(done)
            self.say(f"{done}/{self._total}  {self._rate(done)}  {duration(left)} left  {headline}")

    def restart(self, done: int) -> None:
        """The run went back to `done` updates: the rate is that of those from here on."""
        self._start, self._began = done, time.monotonic()

    def say(self, text: str) -> None:
        """A line beside the bar, as it is: no markup, no wrapping of paths and commands."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _seconds(self, done: int) -> float:
        return (time.monotonic() - self._began) / max(1, done - self._start)

    def _rate(self, done: int) -> str:
        seconds = self._seconds(done)
        return f"{1 / seconds:.1f} updates/s" if seconds < 1 else f"{seconds:.1f} s/update"


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"; the two largest units, minutes and seconds below an hour."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"
