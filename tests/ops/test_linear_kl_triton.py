"""The linear KL's Triton kernels, on the CPU: the matrix of test_linear_kl.py in the interpreter.

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


SHARDS = ("triton and sweep", "triton and not sweep")


def test_matrix_in_the_interpreter():
    """Two processes at a time: the interpreter is slow and has one thread."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    processes = []
    for shard in SHARDS:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", shard, "-W", "ignore"]
        command += ["-p", "no:cacheprovider", "tests/ops/test_linear_kl.py"]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and " passed" in output, output[-6000:]
