"""The benchmark of the linear KL: it tells right from wrong, and writes rows with conditions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench._linear_kl_contestants import (
    CHECK_SHAPE,
    FAR,
    NEAR,
    Contestant,
    check,
    contestants,
    make_inputs,
)
from es2fast import linear_kl_div
from es2fast.ops.reference import linear_kl_div_reference

ROOT = Path(__file__).resolve().parents[2]


def _ours(i, direction="forward"):
    return lambda: linear_kl_div(i.x, i.w, i.x_t, i.w_t, direction=direction)


MISTAKES = {
    "direction": lambda i: _ours(i, "reverse"),
    "heads swapped": lambda i: lambda: linear_kl_div(i.x, i.w_t, i.x_t, i.w),
    "sum": lambda i: lambda: i.x.shape[0] * _ours(i)(),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_contestant_is_not_timed(mistake):
    row = check(Contestant(mistake, "forward", MISTAKES[mistake]), "frozen", "cpu")
    assert row["error"].startswith("wrong value"), row


def test_right_contestants_pass_and_failing_ones_are_rows():
    def fails(i):
        raise RuntimeError("no such kernel")

    right = check(Contestant("right", "forward", _ours), "trainable", "cpu")
    assert right.keys() == {"value_error", "dx_error", "dw_error", "near_dx_error"}
    assert right["value_error"] < 1e-6 and max(right.values()) < 4e-3
    failed = check(Contestant("broken", "forward", fails), "frozen", "cpu")
    assert failed == {"error": "RuntimeError: no such kernel"}


@pytest.mark.parametrize(("distance", "kl"), ((FAR, 5), (NEAR, 2e-3)))
def test_the_check_is_made_where_it_says(distance, kl):
    i = make_inputs(CHECK_SHAPE, "no-grad", "cpu", distance)
    tensors = (t.double() for t in (i.x, i.w, i.x_t, i.w_t))
    assert float(linear_kl_div_reference(*tensors)) == pytest.approx(kl, rel=0.3)


def test_rows(tmp_path):
    """A small run: everyone has a row with conditions; the installed ones have times and errors."""
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, "bench/linear_kl.py", "--device", "cpu", "--shape", "8", "16", "50"]
    command += ["--mode", "no-grad", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = [r["name"] for r in rows]
    assert names == ["GEMMs alone (floor)", *(c.name for c in contestants("no-grad", "cpu"))]
    for row in rows:
        assert row["torch"] == torch.__version__ and row["command"] and row["device"] == "cpu"
        assert (row["n"], row["h"], row["v"], row["dtype"]) == (8, 16, 50, "bfloat16")
        assert "error" in row or row["ms"] > 0
    ours = [r for r in rows if r["name"].startswith("es2fast")]
    assert len(ours) == 4 and all(r["value_error"] < 1e-3 and r["of_floor"] for r in ours)
