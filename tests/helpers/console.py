"""What commands print."""

from __future__ import annotations


def one_line(result, code=2):
    """The message of a command that failed as it should: one line, no traceback."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    return lines[0]
