"""Metrics: one line a record, no line doubled after a resume, torn lines dropped."""

from __future__ import annotations

from contextlib import closing

import pytest
from helpers.runs import board
from tensorboard.summary.writer import event_file_writer

from mgebm_fast.learning.run import records


def test_resumed_records_are_not_doubled(tmp_path, monkeypatch):
    # TensorBoard reads files by name, and of one second and process number 10 comes before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with closing(records.Recorder(tmp_path, 0)) as recorder:
        for step in range(1, 6):
            recorder.add(step, {"gap": step / 2})
    with open(tmp_path / records.METRICS, "a") as file:
        file.write('{"step": 6, "ga')  # the process was killed here
    with closing(records.Recorder(tmp_path, 3)) as recorder:
        for step in range(4, 8):
            recorder.add(step, {"gap": float(step)})
    expected = [(1, 0.5), (2, 1.0), (3, 1.5), (4, 4.0), (5, 5.0), (6, 6.0), (7, 7.0)]
    assert [(r["step"], r["gap"]) for r in records.read(tmp_path / records.METRICS)] == expected
    assert board(tmp_path) == expected


@pytest.mark.parametrize("tail", ["", '{"step": 9', "nonsense\n", '{"step": 9, "gap": 1}\n'])
def test_truncation(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    records.truncate(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    records.truncate(path, 0)
    assert path.read_text() == ""
    records.truncate(tmp_path / "none", 3)
