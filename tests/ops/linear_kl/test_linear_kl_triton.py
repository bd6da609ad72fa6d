"""The linear KL's Triton kernels, on the CPU: test_linear_kl.py in the interpreter."""

from __future__ import annotations

import pytest

from tests.ops.interpreter import check_in_interpreter

pytest.importorskip("triton", reason="the kernels need triton")


@pytest.mark.slow
def test_matrix_in_the_interpreter():
    check_in_interpreter(
        "tests/ops/linear_kl/test_linear_kl.py", "triton and sweep", "triton and not sweep"
    )


@pytest.mark.slow
def test_rules_in_the_interpreter():
    check_in_interpreter("tests/ops/linear_kl/test_linear_kl_rules.py", "triton")
