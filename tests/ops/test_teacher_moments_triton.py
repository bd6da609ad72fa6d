"""The teacher moments' Triton kernel, on the CPU: test_teacher_moments.py in the interpreter.

Triton decides at import whether kernels are compiled or interpreted, so a process of its own is
started with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")
ROOT = Path(__file__).resolve().parents[2]


def test_matrix_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-W", "ignore"]
    command += ["-p", "no:cacheprovider", "tests/ops/test_teacher_moments.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-6000:]
