"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without spills, with tensor cores.

All configurations in use but those float16 ones that cost the same as bfloat16's
(bench/compile_report.py says which, and compiles them too without --distinct).
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need triton")
ROOT = Path(__file__).resolve().parents[2]


CAPABILITIES = (80, 90, 100)


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[int, tuple[int, list[dict], str]]:
    """Per capability: exit status, rows, errors. Side by side, each in a process of its own: this
    one may run the kernels in the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    folder, running = tmp_path_factory.mktemp("reports"), {}
    for capability in CAPABILITIES:
        rows = folder / f"{capability}.jsonl"
        command = [sys.executable, "-W", "ignore", str(ROOT / "bench/compile_report.py")]
        command += ["--sm", str(capability), "--distinct", "--json", str(rows)]
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        running[capability] = (process, rows)
    found = {}
    for capability, (process, rows) in running.items():
        errors = process.communicate()[1]
        text = rows.read_text() if rows.exists() else ""
        found[capability] = (process.returncode, [*map(json.loads, text.splitlines())], errors)
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_configurations_in_use(reports, capability):
    status, rows, errors = reports[capability]
    kinds = {"row", "moments", "fused", "separation"}
    assert {r["label"].split()[0] for r in rows} == kinds, errors[-3000:]
    problems = [f"{r['label']}: {r['problem']}" for r in rows if r["problem"]]
    assert not problems and status == 0, "\n".join(problems)
    assert all(r["tensor_core"] for r in rows if r["label"].startswith("fused"))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_configuration_in_use_is_there(reports, capability):
    """Directions, types, heads, alignments; float16 where it differs from bfloat16."""
    labels = {r["label"] for r in reports[capability][1]}
    for direction, dtype in itertools.product(("forward", "reverse", "jsd"), ("bf16", "fp32")):
        for head, grad in itertools.product(("", " bias+softcap odd-V"), ("", " no-grad")):
            assert f"row {direction} {dtype}{head}{grad}" in labels
    assert {"row reverse fp16", "row jsd fp16 bias+softcap"} <= labels
    for dtype, features in (("bf16", 5), ("fp16", 2)):
        fused = [x for x in labels if x.startswith("fused") and dtype in x]
        assert len(fused) == 2 * 2 * features  # direction, head


def test_a_spill_is_seen():
    """The check itself: cuobjdump's line is read as registers and spilled bytes."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench/compile_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    text = " Function k:\n  REG:255 STACK:768 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0"
    assert module.parse_resources(text) == (255, 768)
