"""What a benchmark says of memory."""

from __future__ import annotations

import sys

import pytest
import torch

from bench._harness import extra_memory
from bench._linear_kl_contestants import eager_loss, make_inputs
from es2fast import linear_kl_div
from es2fast.ops.tokens import CPU_CHUNK

N, H, V = 256, 32, 60_000
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_extra_memory_counts_gradients_and_kept_buffers() -> None:
    """Of calls that were made before: eager torch holds at least two float32 (N, V) and dW, ours
    dW and a chunk's two buffers of logits."""
    i = make_inputs((N, H, V), "trainable", "cpu", dtype=torch.float32)
    gradient = 4 * V * H / 1e6
    least = {"eager": 8 * N * V / 1e6 + gradient, "ours": 8 * min(CPU_CHUNK, N) * V / 1e6}
    for name, loss in (("eager", eager_loss(i)),
                       ("ours", lambda: linear_kl_div(i.x, i.w, i.x_t, i.w_t))):  # fmt: skip
        step = i.step(loss)
        step()
        found = extra_memory(step, "cpu", i.clear)
        assert found is not None and found > 0.95 * least[name], (name, found, least[name])
