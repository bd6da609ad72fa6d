"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from es2fast.demo.toy import build_toy


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small aligned chat model with seed 0, built once per test session (a minute or two), by
    the first of several test processes that wants it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # what the processes share
    with FileLock(root / "toy-seed-0.lock"):
        return build_toy(root / "toy-seed-0", seed=0, progress=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start launchers or are slow come first, so that no process ends long after the
    others."""
    slow = {
        item.path
        for item in items
        if any(mark.name in ("launcher", "slow") for mark in item.iter_markers())
    }
    items.sort(key=lambda item: item.path not in slow)
