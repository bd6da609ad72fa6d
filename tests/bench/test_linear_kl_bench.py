"""The benchmark of the linear KL: it tells right from wrong, and writes rows with conditions."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench._linear_kl_contestants import (
    CHECK_SHAPE,
    FAR,
    NEAR,
    Contestant,
    check,
    contestants,
    make_inputs,
)
from bench.linear_kl import FLOOR, MODES, floor_step, real_gradient, runs
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


def rows_of(folder: Path, file: str = "linear_kl.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def bench(folder: Path, *more: str) -> list[dict]:
    command = [sys.executable, "bench/linear_kl.py", "--device", "cpu", "--shape", "8", "16", "50"]
    command += ["--mode", "no-grad", "--out", str(folder), *more]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return rows_of(folder)


def test_rows(tmp_path):
    """A small run: everyone has a row with conditions; the installed ones have times and errors."""
    rows = bench(tmp_path)
    names = [r["name"] for r in rows]
    assert names == [FLOOR, *(c.name for c in contestants("no-grad", "cpu"))]
    for row in rows:
        assert row["torch"] == torch.__version__ and row["command"] and row["device"] == "cpu"
        assert (row["n"], row["h"], row["v"], row["dtype"]) == (8, 16, 50, "bfloat16")
        assert "error" in row or row["ms"] > 0
    ours = [r for r in rows if r["name"].startswith("es2fast")]
    assert len(ours) == 4 and all(r["value_error"] < 1e-3 and r["of_floor"] for r in ours)
    assert rows[0]["chunk"] == 8


def test_a_process_each_and_only_some(tmp_path):
    """As on a GPU; the floor of another process is found in the rows."""
    rows = bench(tmp_path, "--processes", "--only", "low memory")
    assert [r["name"] for r in rows] == [FLOOR, "es2fast forward, low memory"]
    assert rows[1]["floor_ms"] == rows[0]["ms"]


def test_ours_come_first():
    names = argparse.Namespace(mode=["trainable", "frozen"], device="cpu", only=[], skip=["JSD"])
    order = [name for _, name in runs(names)]
    ours = [name == FLOOR or name.startswith("es2fast") for name in order]
    assert ours == sorted(ours, reverse=True) and order.count(FLOOR) == 2


@pytest.mark.parametrize("mode", ("frozen", "trainable"))
@pytest.mark.parametrize("n", (7, 200))  # dW at once, and chunk by chunk
def test_the_floor_multiplies_a_real_gradient(mode, n):
    i = make_inputs((n, 16, 50), mode, "cpu")
    g = real_gradient(i, n)
    assert g.shape == (n, 50) and g.dtype == torch.bfloat16 and g.count_nonzero() > 0.9 * g.numel()
    floor_step(i, 64)()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", (7, 200))
def test_the_floor_is_all_products_of_the_mode(mode, n):
    """In float32: torch does not count `addmm_`, with which a bfloat16 dW is added up."""
    i = make_inputs((n, 16, 50), mode, "cpu", dtype=torch.float32)
    with FlopCounterMode(display=False) as counted:
        step = floor_step(i, 64)
        before = counted.get_total_flops()  # of the gradient it multiplies
        step()
    assert counted.get_total_flops() - before == MODES[mode] * n * 16 * 50


def test_the_first_run_on_a_gpu_is_rehearsed(tmp_path):
    """One part of it, with small shapes on a CPU; a part that is done is not done again."""
    environment = os.environ | {"REHEARSE": "1", "PYTHON": sys.executable}
    folder = tmp_path / "a folder"
    command = ["bench/first_gpu_run.sh", str(folder)]

    def call(*parts: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *parts], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    first = call("probe")
    assert first.returncode == 0 and "probe: status 0" in first.stdout, first.stdout
    rows = rows_of(folder, "gpu_probe.jsonl")
    assert {r["name"] for r in rows} >= {"logits, strided float32", "dX, doubled pitch"}
    assert all(r["ms"] > 0 and r["tflops"] > 0 for r in rows)
    assert call("probe").stdout == "probe: done before\n"
    assert len(rows_of(folder, "gpu_probe.jsonl")) == len(rows)
    wrong = call("probes")
    assert wrong.returncode == 2 and "no part probes" in wrong.stderr
