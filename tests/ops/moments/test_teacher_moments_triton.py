"""The teacher moments' Triton kernel, on the CPU: its tests in the interpreter."""

from __future__ import annotations

import pytest

from tests.ops.interpreter import check_in_interpreter

pytest.importorskip("triton", reason="the kernels need triton")


@pytest.mark.slow
def test_matrix_in_the_interpreter():
    check_in_interpreter("tests/ops/moments/test_teacher_moments.py", "triton")
