"""pytest-benchmark of the linear KL on a CPU: to compare two commits.

pytest bench/test_linear_kl_cpu.py --benchmark-autosave
pytest bench/test_linear_kl_cpu.py --benchmark-compare
"""

from __future__ import annotations

import pytest
import torch

from bench._linear_kl_contestants import make_inputs
from es2fast import linear_kl_div
from es2fast.ops.backends import choose_backend

SHAPE = (512, 512, 16000)


@pytest.mark.parametrize("mode", ("frozen", "trainable", "no-grad"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("backend", ("native", "torch"))
def test_linear_kl(benchmark, backend: str, dtype: torch.dtype, mode: str) -> None:
    try:
        choose_backend(backend, hidden=torch.empty(1, 1))
    except ValueError as error:
        pytest.skip(str(error))
    i = make_inputs(SHAPE, mode, "cpu", dtype=dtype)
    benchmark.group = f"{mode} {str(dtype)[6:]}"
    benchmark(i.step(lambda: linear_kl_div(i.x, i.w, i.x_t, i.w_t, backend=backend)))
