"""Optimizer steps on a real GPU: torch raises where the host waits for one."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training.step_worker import ran

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


def test_the_host_waits_for_nothing_but_the_gradients_norm(tmp_path: Path) -> None:
    for alone, ahead in ran(tmp_path, ("zero0", "anchored"), "cuda", "bf16").values():
        assert ahead["sums"] == [2, 1, 1, 1]
        kl = [(one["numbers"][-1]["kl_sum"], one["numbers"][-1]["sep"]) for one in (alone, ahead)]
        assert kl[0] == pytest.approx(kl[1], rel=0.05) and all(map(math.isfinite, kl[0]))
