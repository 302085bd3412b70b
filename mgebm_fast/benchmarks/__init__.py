"""Benchmarks of whole chains and training iterations against the loops that people write, and against other packages.

Every contender's gradient is compared with a float64 reference first; one that is wrong gets no figure. `mgebm bench`
is the way in; the benches of single ops are in the clone's bench/ops.
"""

from .cases import TABLES, cases
from .report import Row, console_table, write_csv
from .run import run_case
from .timing import ceilings, copy_bandwidth, device_name, device_slug, interleaved, matrix_rate

__all__ = [
    "TABLES",
    "Row",
    "cases",
    "ceilings",
    "console_table",
    "copy_bandwidth",
    "device_name",
    "device_slug",
    "interleaved",
    "matrix_rate",
    "run_case",
    "write_csv",
]
