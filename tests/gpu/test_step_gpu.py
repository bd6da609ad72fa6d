"""Optimizer steps on a real GPU: torch raises where the host waits for one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="steps are taken through its engine")

from training.step_worker import ran

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_host_waits_in_the_update_alone(tmp_path: Path, dtype: str) -> None:
    for alone, ahead in ran(tmp_path, ("zero0", "anchored"), "cuda", dtype).values():
        assert ahead["sums"] == [2, 1, 1, 1]
        for one, other in zip(alone["numbers"], ahead["numbers"], strict=True):
            assert other == pytest.approx(one, rel=1e-3) and all(map(math.isfinite, one.values()))
