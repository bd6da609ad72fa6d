"""Every Triton kernel compiles for sm_90 without spills, with tensor cores; where ES2FAST_LONG is
set for sm_80 and sm_100 too.

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


CAPABILITIES = (80, 90, 100) if "ES2FAST_LONG" in os.environ else (90,)  # two minutes each


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
    kinds = {"row", "sharded", "moments", "fused", "separation"}
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


@pytest.fixture
def report():
    """bench/compile_report.py as a module."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench/compile_report.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    return module


def test_a_spill_is_seen(report):
    """The check itself: cuobjdump's line is read as registers and spilled bytes."""
    text = " Function k:\n  REG:255 STACK:768 SHARED:1024 LOCAL:0 CONSTANT[0]:560 TEXTURE:0"
    assert report.parse_resources(text) == (255, 768)


# Bounds of (registers, instructions per logit), with a margin for other compilers; 16-bit inputs
# took 114, 97 and 345 instructions before they had a row kernel of their own.
ROW_BOUNDS = {"forward": (64, 60), "reverse": (64, 60), "jsd": (64, 100)}
ROW_BOUNDS |= {"forward softcap": (64, 100), "reverse softcap": (64, 100)}  # 240 by plain tanh
ROW_BOUNDS |= {"jsd softcap": (64, 170)}


@pytest.mark.parametrize("name", ROW_BOUNDS)
def test_row_kernels_of_16_bit_inputs_are_light(reports, name):
    direction, _, head = name.partition(" ")
    label = f"row {direction} bf16 {head}".rstrip()
    (row,) = [r for r in reports[90][1] if r["label"] == label]
    registers, instructions = ROW_BOUNDS[name]
    assert (row["kernel"], row["dtype"], row["direction"]) == (
        "light_row_kernel",
        "bf16",
        direction,
    )
    assert row["registers"] <= registers and row["spills"] == 0
    assert 20 < row["instructions_per_logit"] <= instructions
    assert row["barriers_per_tile"] <= 1


def test_instructions_are_counted_per_loop(report):
    """Inner loops are counted by themselves; a branch to itself is no loop."""
    code = {
        0x00: "MOV R1, R2", 0x10: "LDG.E R0, [R2]", 0x20: "FADD R0, R0, R1",
        0x30: "BAR.SYNC.DEFER_BLOCKING 0x0", 0x40: "@P0 BRA 0x20", 0x50: "FMUL R0, R0, R0",
        0x60: "@!P1 BRA 0x10", 0x70: "EXIT", 0x80: "BRA 0x80",
    }  # fmt: skip
    text = "".join(f"        /*{at:04x}*/    {line} ;   /* 0x0 */\n" for at, line in code.items())
    outer, inner = report.parse_loops(text)
    assert (outer.instructions, outer.barriers) == (3, 0)
    assert (inner.instructions, inner.barriers) == (3, 1)
