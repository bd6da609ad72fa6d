"""Runs a test file with Triton's kernels in the interpreter, on the CPU.

Triton decides at import whether kernels are compiled or interpreted, so processes of their own are
started with TRITON_INTERPRET=1; side by side, since the interpreter is slow and has one thread.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def check_in_interpreter(file: str, *selections: str) -> None:
    """Asserts that the tests of ``file`` pass, one process per ``-k`` expression."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    environment["OMP_NUM_THREADS"] = "1"
    processes = []
    for selection in selections:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", selection, "-W", "ignore"]
        command += ["-p", "no:cacheprovider", file]
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0 and " passed" in output, output[-6000:]
