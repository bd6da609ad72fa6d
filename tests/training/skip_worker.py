"""Steps of which one has numbers that are not finite: `skip_worker.py OUT CONFIG ...`, one rank.

Per configuration two runs, over the batches 0, 1, 2 with row 1 of batch 1 broken, and over 0 and 2.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from es2fast.config import Config, load_config
from es2fast.distributed import runtime as runtimes
from es2fast.distributed.runtime import Runtime
from es2fast.distributed.zero import full_state_dict
from es2fast.training.engine import build_engine
from es2fast.training.feed import Feed
from es2fast.training.plan import make_plan
from es2fast.training.prepare import Prepared
from es2fast.training.robust import SimulatedAttack
from es2fast.training.skipped import SkippedSteps
from es2fast.training.step import step_inputs, train_step

ROW = 1


def run(config: Config, runtime: Runtime, batches: list[int], broken: int | None) -> dict[str, Any]:
    layers = config.layers
    assert isinstance(layers, list)
    plan = make_plan(config, world_size=1)
    feed = Feed(plan, plan.groups.harmless, 0)
    prepared = Prepared(layers, dict.fromkeys(layers, 5.0), dict.fromkeys(layers, 10.0), "test")
    engine = build_engine(plan, prepared, runtime)
    skips = SkippedSteps(runtime, feed.names)
    simulated = SimulatedAttack(config, layers, runtime)
    breaks = [False]

    def embed(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not breaks[0]:
            return output
        rows = torch.arange(len(output)) == ROW
        return torch.where(rows[:, None, None], torch.nan, output)

    engine.module.student.get_input_embeddings().register_forward_hook(embed)
    skipped = []
    for batch in batches:
        breaks[0] = batch == broken
        numbers, _ = train_step(
            engine,
            step_inputs(engine, feed(batch), runtime.device),
            config.kl.weight,
            runtime,
            observe=simulated.observe,
            skipped=lambda finite, batch=batch: skips.add(batch, finite),
        )
        skipped.append(numbers.wait()["skipped"])
    digest = hashlib.sha256()
    for value in full_state_dict(engine.module.student, main=True).values():
        digest.update(value.contiguous().numpy().tobytes())
    kept = [*simulated.state_dict()["kept"].values(), *engine.module.bank.state_dict().values()]
    found = {
        "weights": digest.hexdigest(),
        "lr": engine.get_lr()[0],
        "kept": [float(rows.double().sum()) for pair in kept for rows in pair],
        "skipped": skipped,
        "words": skips.words(),
        "name": feed.names(1)[0][ROW],
    }
    engine.destroy()
    return found


def main() -> None:
    out, *paths = [item for item in sys.argv[1:] if not item.startswith("--local_rank")]
    runtime = runtimes.start(load_config(paths[0]))
    found = {}
    for path in paths:
        config = load_config(path)
        runs = (run(config, runtime, [0, 1, 2], 1), run(config, runtime, [0, 2], None))
        found[Path(path).stem] = runs
    Path(out).write_text(json.dumps(found))
    runtimes.stop()


if __name__ == "__main__":
    main()
