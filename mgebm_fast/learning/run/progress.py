"""What a run shows: a bar with rate and time left on a terminal, one line now and then anywhere else."""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from rich.console import Console

_SILENCE = 5.0  # seconds after which a log file is told again what is being done


def _broken_pipe() -> None:
    raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class Voice:
    """Lines for the user on `console`; None says nothing. A console that cannot be written to any more is given up: a
    closed terminal or a pipe without a reader does not end a run."""

    def __init__(self, console: Console | None) -> None:
        self.console = console
        if console is not None:
            console.on_broken_pipe = _broken_pipe  # type: ignore[method-assign]  # rich's own ends the process

    def say(self, text: str) -> None:
        """A line as it is: no markup, no wrapping of paths and commands."""
        with self.surviving():
            if self.console is not None:
                self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_from_a_signal(self, text: str) -> None:
        """Not through rich: its lock may be held by the code that the signal interrupted."""
        if self.console is not None:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or no file at all
                os.write(sys.stderr.fileno(), f"\n{text}\n".encode())

    @contextlib.contextmanager
    def surviving(self) -> Any:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the file was closed
            self.console = None


class Progress:
    """Shows updates `start` … `total`, through a `Voice`; `cost` says what updates 0 … n cost together, in any unit.

    Rate and time left are those of the last minute: a run's updates take longer once its finest nets have joined.
    """

    RECENT = 60.0  # seconds

    def __init__(self, voice: Voice, start: int, total: int, cost: Callable[[int], float] = float) -> None:
        self._voice, self._start, self._total, self._cost = voice, start, total, cost
        self._bar: Any = None
        self._marks: collections.deque[tuple[int, float]] = collections.deque()  # updates done, and when; in a minute

    def __enter__(self) -> Progress:
        console = self._voice.console
        if console is not None and console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.fields[headline]}"),
                console=console,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=self._total, completed=self._start, rate="", left="", headline="")
            with self._voice.surviving():
                self._bar.start()
        self.restart(self._start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            with self._voice.surviving():
                self._bar.stop()

    def update(self, done: int, headline: str, *, logged: bool) -> None:
        """After update number `done`; `headline` says how training stands, `logged` whether it was recorded."""
        if self._bar is not None:
            rate, left = self._pace(done)
            with self._voice.surviving():
                self._bar.update(self._task, completed=done, rate=rate, left=left, headline=headline)
        elif logged:
            self._voice.say("  ".join((f"{done}/{self._total}", *self._pace(done), headline)))
        now = time.monotonic()  # one mark a second
        if now >= self._marks[-1][1] + 1:
            self._marks.append((done, now))
        while len(self._marks) > 1 and now > self._marks[1][1] + self.RECENT:
            self._marks.popleft()

    def restart(self, done: int) -> None:
        """The run is at `done` updates: the rate is that of those from here on."""
        self._marks = collections.deque([(done, time.monotonic())])

    def _pace(self, done: int) -> tuple[str, str]:
        """The rate, and the time left: as many seconds as of late for each unit of cost."""
        since, when = self._marks[0]
        seconds, (start, now, end) = time.monotonic() - when, map(self._cost, (since, done, self._total))
        each = seconds / max(1, done - since)
        rate = f"{1 / each:.1f} updates/s" if 0 < each < 1 else f"{each:.1f} s/update"
        return rate, f"{duration(seconds * (end - now) / max(now - start, 1e-9))} left"


class Pace:
    """Mean seconds an update since the last record."""

    def __init__(self) -> None:
        self._seconds, self._updates = 0.0, 0

    def add(self, seconds: float) -> None:
        self._seconds, self._updates = self._seconds + seconds, self._updates + 1

    def take(self) -> float:
        mean = self._seconds / max(1, self._updates)
        self._seconds, self._updates = 0.0, 0
        return mean


def duration(seconds: float) -> str:
    """3725 -> "1 h 2 min"; the two largest units, minutes and seconds below an hour."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Lines:
    """What is being done, for a log file: a line where that changes, and again where one thing takes long."""

    def __init__(self, head: str = "") -> None:
        self._voice = Voice(Console(stderr=True))
        self._head, self._times, self._last = head, collections.Counter[str](), 0.0

    def tell(self, text: str) -> None:
        self._times[text] += 1
        times, now = self._times[text], time.monotonic()
        if times == 1 or now - self._last > _SILENCE:
            self._voice.say(f"{self._head}{text}{'' if times == 1 else f', {times}'}")
            self._last = now


@contextlib.contextmanager
def working(words: str) -> Iterator[Callable[[str], None]]:
    """A spinner beside what is being done, on a terminal; lines in a log file. Gives what changes the words."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(words) as status:
            yield status.update
    else:
        lines = Lines()
        lines.tell(words)
        yield lines.tell
