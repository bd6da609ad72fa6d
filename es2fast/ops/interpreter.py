"""Triton kernels, one file per op. Import a file here only where its backend has been chosen."""

import triton

INTERPRETED = bool(triton.knobs.runtime.interpret)  # kernels run in Python, on the CPU
