"""Signals during training: the first asks for an orderly stop with a checkpoint, a second Ctrl-C or SIGTERM aborts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_ABORTING = (signal.SIGINT, signal.SIGTERM)
# A closed terminal, batch systems before they end a job, and a limit on CPU time. They come more than once.
_ASKING = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)


class StopRequests:
    """Inside, `requested` is True after the first signal; `announce` is called then, with the signal's name.

    Handlers can be set in the main thread only: in another one signals keep their meaning. A SIGHUP that is ignored,
    as under nohup, stays ignored.
    """

    def __init__(self, announce: Callable[[str], None]) -> None:
        self.requested = False
        self._may_abort = False
        self._announce = announce
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (*_ABORTING, *_ASKING):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number in _ABORTING:
            if self._may_abort:
                self._restore()
                raise KeyboardInterrupt
            self._may_abort = True
        if not self.requested:
            self.requested = True
            self._announce(signal.Signals(number).name)
