"""Interpreted kernels whose programs wait for each other: each in a thread of its own, one at a time, in any order."""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
import types
from collections.abc import Iterator

MOST_SWITCHES = 1_000_000


class Programs:
    """The programs of a launch. The one that runs hands on at each atomic, to one that `order` picks."""

    def __init__(self, builder: object, body, order: random.Random) -> None:
        self.builder, self.body, self.order = builder, body, order
        self.calls: list[tuple[tuple[int, ...], dict[str, object]]] = []
        self.turn, self.alive, self.failed = threading.Condition(), set[int](), list[BaseException]()
        self.now, self.switches = -1, 0

    def gather(self, arguments: dict[str, object]) -> None:
        """Note a program; at the last one run them all."""
        self.calls.append((tuple(self.builder.grid_idx), arguments))
        x, y, z = self.builder.grid_dim
        if len(self.calls) < x * y * z:
            return
        self.alive = set(range(len(self.calls)))
        threads = [threading.Thread(target=self._run, args=(index,)) for index in self.alive]
        for thread in threads:
            thread.start()
        with self.turn:
            self._hand_on()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0]

    def _run(self, index: int) -> None:
        try:
            self._wait(index)
            if not self.failed:
                self.body(**self.calls[index][1])
        except BaseException as error:
            self.failed.append(error)
        with self.turn:
            self.alive.discard(index)
            self._hand_on()

    def _hand_on(self) -> None:
        if self.alive:
            self.now = self.order.choice(sorted(self.alive))
            self.turn.notify_all()

    def _wait(self, index: int) -> None:
        with self.turn:
            self.turn.wait_for(lambda: self.now == index)
        self.builder.set_grid_idx(*self.calls[index][0])

    def switch(self) -> None:
        """Let another program go on, or this one."""
        index = self.now
        self.switches += 1
        if self.switches > MOST_SWITCHES:
            raise RuntimeError("the programs wait for each other without end")
        with self.turn:
            self._hand_on()
        self._wait(index)
        if self.failed:
            raise RuntimeError("another program failed")


@contextlib.contextmanager
def cooperative(seed: int = 0) -> Iterator[None]:
    """Launches of interpreted kernels inside run their programs beside each other, in an order drawn from `seed`."""
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    launch, atomic, order, running = executor.__call__, builder.create_atomic_rmw, random.Random(seed), list[Programs]()

    def call(self, *args, **kwargs):
        body = self.fn
        programs = Programs(builder, body, order)

        def gather(**arguments):
            programs.gather(arguments)

        # The executor looks at its function's globals and signature.
        self.fn = types.FunctionType(gather.__code__, body.__globals__, closure=gather.__closure__)
        self.fn.__signature__ = inspect.signature(body)
        running.append(programs)
        try:
            return launch(self, *args, **kwargs)
        finally:
            running.pop()

    def create_atomic_rmw(*arguments):
        result = atomic(*arguments)
        running[-1].switch()
        return result

    executor.__call__, builder.create_atomic_rmw = call, create_atomic_rmw
    try:
        yield
    finally:
        executor.__call__ = launch
        del builder.create_atomic_rmw  # the class's own again
