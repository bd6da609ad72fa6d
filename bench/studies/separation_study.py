"""Which separation loss, how many layers, fixed lambda or a KL budget? Measured on the toy.

    python bench/studies/separation_study.py               # every cell that has no row yet
    python bench/studies/separation_study.py --reverse     # a second process, from the other end
    python bench/studies/separation_study.py --shard 0/2   # half of them; the other half elsewhere
    python bench/studies/separation_study.py --report      # tables and plots of docs/separation.md

One row per run: every loss x {1, 2, 3} layers x {fixed lambda, KL budget} x seeds, training under a
simulated attack, the hinge's margin, l2 for four times as long, other blocks. Else it is the demo:
steps, learning rate, margin, lambda; one rank takes its two ranks' 2 x 4 pairs per step. The layer
sets are nested and end at the same block, so the same blocks train in all of them. A seed has its
own toy, split and batches; all attacks are refitted on the tuned model and judged on held-out
prompts.

The runs go through `es2fast.training.loop.train` in this process: one thread, ZeRO stage 0
(stages 2 and 3 gave the same figures to five digits at 1.4 and 2 times the time). A run takes about
20 s, of which training is 13. With a fixed lambda the collapse monitor is off, so that the table
shows what a loss does when nothing stops it; with a budget all safeguards are on. A run that stops
by itself is a row like any other: the last good weights are evaluated and `stopped` holds the
reason. Cells and rows: `separation_cells.py`; tables and plots: `separation_report.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import nn

from bench._harness import Rows, conditions
from bench.studies.separation_cells import (
    BOUNDED,
    BUDGET,
    LOSSES,
    PROBABILITY,
    ROWS,
    Cell,
    cells,
    key_of,
    read_rows,
)
from bench.studies.separation_report import write_report
from es2fast.config import Config, parse_config
from es2fast.data import Formatter, PromptGroups, load_groups
from es2fast.demo.run import demo_config
from es2fast.demo.toy import build_toy
from es2fast.distributed import runtime as runtimes
from es2fast.errors import UserError
from es2fast.evaluation.answering import EvaluationPrompts, Subject
from es2fast.evaluation.run import evaluate_models
from es2fast.modeling.load import free_memory, load_causal_lm, load_tokenizer
from es2fast.report.schema import ModelResult
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import read_metrics
from es2fast.training.loop import train
from es2fast.training.plan import make_plan


def settings(cell: Cell, toy: Path, out: Path, prompts: int) -> Config:
    """The demo's configuration with the cell's changes."""
    raw = demo_config(out, toy, seed=cell.seed, device="cpu").model_dump(mode="json")
    raw["layers"] = list(cell.layers or (2, 4))
    raw["deepspeed"] = {"zero_optimization": {"stage": 0}}
    raw["train"]["micro_batch_size"] = 8
    raw["evaluate"] |= {"limit": prompts, "batch_size": 100}
    if cell.loss != "base":
        margin = cell.margin or raw["separation"]["margin"]
        raw["separation"]["loss"] = cell.loss
        raw["separation"]["margin"] = margin if cell.loss in BOUNDED else None
    if cell.steps is not None:
        raw["train"]["steps"] = cell.steps
    if cell.robust is not None:
        raw["separation"]["robust"] |= {
            "attacks": [cell.robust],
            "probability": PROBABILITY,
        }
    if cell.control == "budget":
        raw["kl"]["budget"] = BUDGET
    else:
        raw["safeguards"] |= {"max_kl": None, "max_grad_growth": None}
    return parse_config(raw)


@dataclass
class Seed:
    """What all runs of a seed share: data, base model, its evaluation."""

    config: Config
    groups: PromptGroups
    formatter: Formatter
    base: nn.Module
    folder: Path  # answers of the base model and of every run

    @classmethod
    def load(cls, work: Path, seed: int, prompts: int) -> Seed:
        toy = build_toy(work / f"toy-{seed}", seed=seed)
        config = settings(Cell("base", (), "", seed), toy, work, prompts)
        groups = load_groups(config.data)
        formatter = Formatter(load_tokenizer(config.model), config.data)
        base = load_causal_lm(config.model, "fp32").eval()
        return cls(config, groups, formatter, base, work / f"evaluation-{seed}")

    def evaluate(self, tuned: nn.Module | None, layers: list[int]) -> ModelResult:
        """Refitted attacks and geometry on held-out prompts, of the base model without `tuned`.

        The base model's answers are kept, so each run adds only the tuned model's.
        """
        wanted, groups = self.config.evaluate, self.groups
        models = {"base": self.base} | ({} if tuned is None else {"tuned": tuned})
        subjects = [Subject.of(name, model, self.formatter) for name, model in models.items()]
        prompts = EvaluationPrompts(
            groups.eval_harmful[: wanted.limit],
            groups.eval_harmless[: wanted.limit],
            groups.harmful[: wanted.fit_limit],
            groups.harmless[: wanted.fit_limit],
        )
        folder = RunFolder(self.folder)
        report = evaluate_models(subjects, prompts, wanted, folder, layers=layers)
        return report.models[-1]


def run(cell: Cell, shared: Seed, work: Path, prompts: int, runtime: Any) -> dict[str, Any]:
    """Trains and evaluates one cell; returns the row's figures."""
    if cell.loss == "base":
        return figures(shared.evaluate(None, [2, 4]), [2, 4])
    out = work / f"run-{time.time_ns()}"
    config = settings(cell, work / f"toy-{cell.seed}", out, prompts)
    layers = list(cell.layers)
    separation = config.separation.model_dump(mode="json")
    row: dict[str, Any] = {"separation": separation, "kl_budget": config.kl.budget}
    out.mkdir()
    try:
        done = train(make_plan(config), runtime)
        row |= {"steps": done.steps, "train_seconds": done.seconds, "lambda": done.kl_weight}
        row |= {"train_kl": done.kl, "update_scale": done.scale}
    except UserError as error:
        row["stopped"] = str(error)
    row |= last_metrics(out, layers)
    folder = RunFolder(out)
    saved = next((f for f in (folder.model, folder.last_good) if f.is_dir()), None)
    if saved is not None:
        tuned = load_causal_lm(config.model.model_copy(update={"name": str(saved)}), "fp32").eval()
        row |= figures(shared.evaluate(tuned, layers), layers)
    shutil.rmtree(out)
    free_memory()
    return row


def last_metrics(out: Path, layers: list[int]) -> dict[str, Any]:
    """The last training step's distances and norms, also of runs that saved nothing."""
    rows = read_metrics(RunFolder(out).metrics)
    if not rows:
        return {}
    last = rows[-1]
    keys = ["step", "kl", *(f"{k}/{i}" for k in ("distance_over_base", "norm_ratio")
                            for i in layers)]  # fmt: skip
    return {"last_step": {key: last.get(key) for key in keys}}


def figures(result: ModelResult, layers: list[int]) -> dict[str, Any]:
    """What the tables show, out of one model's part of a report; means over the layers."""
    kept = ("refused", "useful", "gibberish", "repetitive", "relative_push")
    geometry = [result.separation[str(layer)] for layer in layers]
    means = {
        name: sum(getattr(row, name) for row in geometry) / len(geometry)
        for name in ("distance_over_base", "norm_ratio", "fisher", "probe_accuracy")
    }
    ranks = result.shift_rank or {}
    return {
        "n": result.harmless.n,
        "kl": result.harmless.kl_to_base,
        "intact": result.harmless.intact_rate,
        "refused_harmless": result.harmless.refusal_rate,
        **means,
        "shift_rank": sum(ranks.values()) / len(ranks) if ranks else None,
        "attacks": {
            name: {key: getattr(attack, key) for key in kept}
            for name, attack in result.attacks.items()
        },
    }


def pending(arguments: argparse.Namespace) -> list[Cell]:
    """Cells of this shard, with the losses asked for, that have no row."""
    own, shards = map(int, arguments.shard.split("/"))
    done = {key_of(row) for row in read_rows(arguments.out)}
    mine = [cell for index, cell in enumerate(cells()) if index % shards == own]
    wanted = arguments.losses.split(",") if arguments.losses else ["base", *LOSSES]
    left = [cell for cell in mine if cell.key not in done and cell.loss in wanted]
    return left[::-1] if arguments.reverse else left


def study(arguments: argparse.Namespace) -> None:
    """Runs what is pending; looks again before each run, so that two processes share the work."""
    torch.set_num_threads(1)
    work, rows = arguments.work, Rows(arguments.out, conditions("cpu"))
    shared: Seed | None = None
    runtime, current, count = None, None, 0
    while (waiting := pending(arguments)) and count != arguments.at_most:
        cell, began = waiting[0], time.perf_counter()
        if shared is None or cell.seed != current:
            shared, current = Seed.load(work, cell.seed, arguments.prompts), cell.seed
            runtime = runtime or runtimes.start(shared.config)
        found = run(cell, shared, work, arguments.prompts, runtime)
        if cell in pending(arguments):  # unless the other process was faster
            rows.add(cell=dataclasses.asdict(cell), **found, seconds=time.perf_counter() - began)
        count += 1
    runtimes.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROWS, help="rows are read from and added here")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="toys, scratch")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th cell, from the i-th")
    parser.add_argument("--losses", help="only these, separated by commas")
    parser.add_argument("--reverse", action="store_true", help="from the last cell to the first")
    parser.add_argument("--at-most", type=int, default=None, help="stop after so many runs")
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts per group")
    parser.add_argument("--report", action="store_true", help="write tables and plots, run nothing")
    parser.add_argument("--list", action="store_true", help="name the cells without a row")
    arguments = parser.parse_args()
    if arguments.report:
        write_report(read_rows(arguments.out))
    elif arguments.list:
        print(*pending(arguments), sep="\n")
    else:
        study(arguments)


if __name__ == "__main__":
    main()
