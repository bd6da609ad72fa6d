"""Devices, precision and the locks that make a launch hang."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from es2fast.distributed.runtime import resolve_device, resolve_dtype, stale_locks
from es2fast.errors import UserError


def test_left_over_locks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert stale_locks() == []
    for folder in ("shm", "py311_cpu/adam"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "lock").touch()
    assert stale_locks() == [tmp_path / "py311_cpu/adam/lock", tmp_path / "shm/lock"]


def test_devices_and_precision() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_dtype("auto", "cpu") == "fp32"
    assert resolve_dtype("auto", "cuda") == "bf16"
    assert resolve_dtype("bf16", "cpu") == "bf16"
    if not torch.cuda.is_available():
        assert resolve_device("auto") == "cpu"
        with pytest.raises(UserError, match=r"train\.device"):
            resolve_device("cuda")
