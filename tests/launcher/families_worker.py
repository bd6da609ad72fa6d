"""Three real optimizer steps for each model family in one process; writes what a reload must equal.

`families_worker.py --out FILE --folder FOLDER FAMILY ...`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from tiny_models import save_tiny, write_prompts

from es2fast.config import parse_config
from es2fast.data import collate
from es2fast.distributed import runtime as runtimes
from es2fast.run.export import save_model
from es2fast.training.engine import build_engine
from es2fast.training.plan import make_plan
from es2fast.training.prepare import prepare
from es2fast.training.step import step_inputs, train_step

IDS = torch.tensor([[1, 4, 10, 16, 5, 23]])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("families", nargs="+")
    arguments = parser.parse_args()
    results = {f: run_family(f, arguments.folder / f) for f in arguments.families}
    torch.save(results, arguments.out)
    runtimes.stop()


def run_family(family: str, folder: Path) -> dict[str, Any]:
    model = save_tiny(folder / "model", family)
    config = parse_config(
        {
            "model": {"name": str(model), "dtype": "fp32"},
            "data": write_prompts(folder / "data") | {"cache_dir": str(folder / "cache")},
            "layers": [0, 2],
            "train": {
                "steps": 3, "micro_batch_size": 2, "lr": 1e-3, "schedule": "constant",
                "warmup_ratio": 0.0, "device": "cpu",
            },
            "deepspeed": "zero3",
        }
    )  # fmt: skip
    runtime = runtimes.start(config)
    plan = make_plan(config)
    groups, formatter, sampler = plan.groups, plan.formatter, plan.sampler(0)
    prepared, harmless, _ = prepare(plan, runtime)
    engine = build_engine(plan, prepared, runtime)
    steps = []
    for step in range(3):
        rows = [
            collate(formatter, [groups.harmful[i] for i in a], [harmless[i] for i in b], "all")
            for a, b in sampler.indices(step)
        ]
        inputs = step_inputs(engine, rows, runtime.device)
        steps.append(train_step(engine, inputs, 10.0, runtime)[0].wait())
    student = engine.module.student.eval()
    engine.module.taps.disarm()
    with deepspeed.zero.GatheredParameters(list(student.parameters())), torch.no_grad():
        logits = student(input_ids=IDS, use_cache=False).logits.clone()
    save_model(student, formatter.tokenizer, folder / "saved", main=True)
    engine.destroy()
    return {"steps": json.loads(json.dumps(steps)), "logits": logits, "d0": prepared.d0}


if __name__ == "__main__":
    main()
