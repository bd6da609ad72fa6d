"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from es2fast.demo.toy import build_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small aligned chat model with seed 0, built once per test session (a minute or two)."""
    return build_toy(tmp_path_factory.mktemp("toy") / "seed-0", seed=0, progress=False)
