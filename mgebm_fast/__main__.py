"""`python -m mgebm_fast`: the doctor where nothing more is said, else the whole command line."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    main(sys.argv[1:] or ["doctor"])
