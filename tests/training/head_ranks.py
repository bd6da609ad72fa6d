"""Two real processes call the KL of a sharded head; started by test_stage.py."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from bench._harness import restart_peak, status_bytes
from es2fast.distributed.runtime import stop
from es2fast.ops.linear_kl.zero3 import zero3_linear_kl_div


def worker(rank: int, tokens: int, vocab: int, width: int, folder: str) -> None:
    """Bytes at the peak of a call and its backward, above those before, to FOLDER/peak-RANK."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2
    )
    torch.manual_seed(rank)
    head = torch.randn(vocab * width // 2) / width**0.5  # of this rank

    def call(count: int) -> None:
        hidden = torch.randn(count, width, requires_grad=True)
        zero3_linear_kl_div(hidden, head, vocab, torch.randn(count, width)).backward()

    call(2)  # what is loaded at the first call
    before = restart_peak()
    assert before is not None
    call(tokens)
    Path(f"{folder}/peak-{rank}").write_text(str(status_bytes("VmHWM") - before))
    stop()
