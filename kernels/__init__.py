"""Triton kernels of mgebm_fast, one file an op; installed as `mgebm_fast.kernels`.

Launchers take checked arguments: shapes, dtypes and ranges are the business of `mgebm_fast/ops`, and nothing here is
registered with torch. Triton is imported by the op's own module, so importing this package needs no Triton.
"""
