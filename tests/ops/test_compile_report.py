"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without spills, with tensor cores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("capability", (80, 90, 100))
def test_configurations_in_use(capability, tmp_path):
    """In a process of its own: this one may run the kernels in the interpreter."""
    rows = tmp_path / "rows.jsonl"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", str(ROOT / "bench/compile_report.py")]
    command += ["--sm", str(capability), "--brief", "--json", str(rows)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert rows.exists(), done.stderr[-3000:]
    reports = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {r["label"].split()[0] for r in reports} == {"row", "fused"}
    problems = [f"{r['label']}: {r['problem']}" for r in reports if r["problem"]]
    assert not problems and done.returncode == 0, "\n".join(problems)


def test_a_spill_is_seen():
    """The check itself: cuobjdump's line is read as registers and spilled bytes."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench/compile_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    text = " Function k:\n  REG:255 STACK:768 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0"
    assert module.parse_resources(text) == (255, 768)
