"""How far is the memory that `es2fast plan` announces from what a training takes on a CPU?

    python bench/plan.py --model DIR --dtype bf16 --trainable lora       # or --shape toy
    python bench/plan.py --report                                     # the table of bench/README.md

The run of bench/step.py (one rank, a few steps and the export behind them) in a process of its own;
its peak is VmHWM, of which `libraries` were there before anything was loaded. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench._harness import Rows, conditions, status_bytes  # noqa: E402
from bench._step_workload import SHAPES, configuration, model_folder  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "plan.jsonl"


def main() -> None:
    arguments = parse()
    if arguments.report:
        print(table(arguments.out))
        return
    if arguments.worker is not None:
        print(json.dumps(trained(json.loads(arguments.worker))))
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.model or model_folder(arguments.shape, arguments.work)
    raw = configuration(
        model, arguments.work, rows=arguments.rows, steps=arguments.steps, dtype=arguments.dtype,
        device="cpu", trainable=arguments.trainable, teacher=arguments.teacher, overwrite=True,
        gradient_checkpointing=arguments.checkpointing, packing=not arguments.padded,
    )  # fmt: skip
    rows = Rows(arguments.out, conditions("cpu") | {"threads": 1})
    rows.add(
        model=model.resolve().name, dtype=arguments.dtype, trainable=arguments.trainable,
        teacher=arguments.teacher, rows=f"{arguments.rows}+{arguments.rows}",
        packing=not arguments.padded, checkpointing=arguments.checkpointing,
        **planned(raw, arguments.work), **measured(raw),
    )  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a chat model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in its place")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--trainable", choices=("lora", "blocks", "all"), default="lora")
    parser.add_argument("--teacher", choices=("auto", "twin", "cache"), default="auto")
    parser.add_argument("--checkpointing", action="store_true", help="of the activations")
    parser.add_argument("--padded", action="store_true", help="train.packing: false")
    parser.add_argument("--rows", type=int, default=4, help="of each group per step")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "plan")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.report or arguments.worker or arguments.model or arguments.shape):
        parser.error("name a --model or a --shape")
    return arguments


def planned(raw: dict[str, Any], work: Path) -> dict[str, Any]:
    """The estimate for one rank: its parts and their sum, bytes."""
    run, out = work / "plan.yaml", work / "plan.json"
    run.write_text(json.dumps(raw))
    command = [sys.executable, "-m", "es2fast.cli", "plan", str(run), "--gpu", "cpu"]
    _told([*command, "--gpus", "1", "--json", str(out)])
    (found,) = json.loads(out.read_text())["ranks"]
    return {"planned": found["memory_bytes"], "stage": found["zero_stage"]}


def measured(raw: dict[str, Any]) -> dict[str, Any]:
    """What `trained` says in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", json.dumps(raw)]
    return json.loads(_told(command).splitlines()[-1])


def _told(command: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"plan: {(done.stderr.strip().splitlines() or ['it failed'])[-1]}")
    return done.stdout


def trained(raw: dict[str, Any]) -> dict[str, Any]:
    """Trains; bytes in use before, at the highest during the steps, at the highest of all."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    from es2fast.config import parse_config
    from es2fast.training.run import run

    libraries = status_bytes("VmRSS")
    finished = run(parse_config(raw))
    assert finished is not None
    metrics = finished[0].folder.metrics.read_text().splitlines()
    return {
        "libraries": libraries,
        "steps_peak": json.loads(metrics[-1])["peak_memory_bytes"],
        "peak": status_bytes("VmHWM"),
    }


def table(path: Path) -> str:
    """The latest row of every run."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        keys = ("model", "dtype", "trainable", "teacher", "rows", "packing", "checkpointing")
        latest[tuple(row[key] for key in keys)] = row
    lines = [
        "| model, dtype | trained | rows | stage | planned GB | peak GB | planned / peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in latest.values():
        total, peak = row["planned"]["total"], row["peak"]
        more = ", padded" * (not row["packing"]) + ", checkpointing" * row["checkpointing"]
        lines.append(
            f"| {row['model']}, {row['dtype']} | {row['trainable']} | {row['rows']}{more} | "
            f"{row['stage']} | {total / 1e9:.2f} | {peak / 1e9:.2f} | {total / peak:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
