"""What a run shows of its pace."""

from __future__ import annotations

import io
import time

from rich.console import Console

from mgebm_fast.learning.run.progress import Progress, Voice, duration


def test_rate_and_time_left_are_those_of_the_last_minute(monkeypatch):
    clock, said = [0.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    # 100 updates of 0.1 s, then 100 of 2 s and five times the cost
    with Progress(Voice(Console(file=said, width=200)), 0, 1000, lambda n: n + 4 * max(0, n - 100)) as progress:
        for done in range(1, 201):
            clock[0] += 0.1 if done <= 100 else 2.0
            progress.update(done, "gap", logged=done in (50, 100, 200))
        progress.restart(150)
        clock[0] += 4.0
        progress.update(152, "gap", logged=True)
    lines = [line.split("  ") for line in said.getvalue().splitlines()]
    assert lines[0] == ["50/1000", "10.0 updates/s", f"{duration(0.1 * (50 + 5 * 900))} left", "gap"]
    assert lines[1][1:3] == ["10.0 updates/s", f"{duration(0.1 * 5 * 900)} left"]
    assert lines[2][1:3] == ["2.0 s/update", f"{duration(2 * 800)} left"]
    assert lines[3][1:3] == ["2.0 s/update", f"{duration(2 * 848)} left"]
