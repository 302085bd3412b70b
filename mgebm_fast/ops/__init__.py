"""The ops: checks, schemas and the choice of backend. `backend.TABLE` says in which layers each op is written."""

from .backend import BACKENDS, TABLE, choose, unavailable
from .langevin_step import coefficients, langevin_step_
from .noise import noise
from .pyramid import pyramid
from .upsample import upsample

__all__ = [
    "BACKENDS",
    "TABLE",
    "choose",
    "coefficients",
    "langevin_step_",
    "noise",
    "pyramid",
    "unavailable",
    "upsample",
]
