"""One trial: a training in a folder of its own, an evaluation, and the two numbers of it.

    worst    rate of useful answers under the worst attack           (report.verdict.worst_useful)
    damage   rise of harmless refusals or of gibberish / 0.05, KL on responses / 0.02, whichever is
             most (report.verdict.damage)

The base model is the same in all trials, so what an earlier trial's evaluation asked of it is
copied; answers are kept under keys of all that they depend on, so nothing wrong can be reused.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from es2fast.config import Config, load_config, save_config
from es2fast.distributed.launch import launch_to_end, rank_count
from es2fast.errors import RunStopped, UserError
from es2fast.evaluation.run import TUNED, evaluate_run
from es2fast.report.schema import BASE, Report
from es2fast.report.suite import worst_attack
from es2fast.report.verdict import damage, worst_useful
from es2fast.run.files import append_line, read_lines
from es2fast.run.folder import RunFolder
from es2fast.training.plan import make_plan

LOG = "train.log"  # in the trial's folder: what the training printed
RECIPE = "trial.yaml"


@dataclass(frozen=True)
class Outcome:
    """What a trial is judged by, and what a reader wants to know of it."""

    worst: float
    damage: float
    attack: str  # the worst one
    n: int
    base_worst: float
    refused: float  # of the held-out harmless prompts
    base_refused: float
    kl: float | None  # nats per response token

    def attributes(self) -> dict[str, Any]:
        """For optuna's log."""
        return asdict(self)


def run_trial(config: Config, ranks: int | None, earlier: list[Path]) -> Outcome:
    """Trains and evaluates one configuration in `config.output_dir`, or goes on with that.

    Args:
        config: the trial's.
        ranks: processes of the training.
        earlier: folders of finished trials, whose base model's answers are taken over.

    Raises:
        UserError: the configuration cannot be trained or evaluated; the report has no finite KL.
        RunStopped: a safeguard ended the training.
    """
    folder = RunFolder(config.output_dir)
    if not (folder.finished and load_config(folder.config) == config):
        _train(folder, config, ranks)
    for other in earlier[:1]:
        take_base(RunFolder(other), folder)
    report = evaluate_run(folder.path)
    assert report is not None  # this is no rank of several
    return outcome(report)


def _train(folder: RunFolder, config: Config, ranks: int | None) -> None:
    make_plan(config, world_size=rank_count(ranks, config.train.device))
    folder.path.mkdir(parents=True, exist_ok=True)
    recipe, log = folder.path / RECIPE, folder.path / LOG
    save_config(config, recipe)
    try:
        launch_to_end(recipe, folder, ranks=ranks, device=config.train.device, log=log)
    except UserError as error:
        kind = RunStopped if isinstance(error, RunStopped) else UserError
        raise kind(_reason(log) or str(error)) from None


def outcome(report: Report) -> Outcome:
    """The numbers of a trial's report.

    Raises:
        UserError: an attack could not be run on the tuned model; the KL to the base model is not
            finite.
    """
    base, tuned = report.model(BASE), report.model(TUNED)
    if missing := [name for name in base.attacks if name not in tuned.attacks]:
        raise UserError(f"not run on the tuned model: {', '.join(missing)}; see the report")
    worst = worst_attack(tuned)
    price = damage(base, tuned)
    if worst is None or not math.isfinite(price):
        raise UserError("the tuned model's KL to the base model is not finite")
    return Outcome(
        worst=worst_useful(tuned),
        damage=price,
        attack=worst[0],
        n=worst[1].n,
        base_worst=worst_useful(base),
        refused=tuned.harmless.refusal_rate,
        base_refused=base.harmless.refusal_rate,
        kl=tuned.harmless.kl_response,
    )


def take_base(source: RunFolder, target: RunFolder) -> None:
    """Copies what an evaluation asked of the base model."""
    for line in read_lines(source.answers):
        if line.get("model") == BASE:
            append_line(target.answers, line)
    target.measured.mkdir(exist_ok=True)
    for path in source.measured.glob(f"{BASE}*"):
        copy = target.measured / path.name
        if path.is_dir():
            shutil.copytree(path, copy, dirs_exist_ok=True)
        else:
            shutil.copy(path, copy)


def _reason(log: Path) -> str | None:
    """The message that ended a training."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    said = [line.partition("error: ")[2] for line in lines if "error: " in line[:20]]
    return said[-1] if said else None


def describe(parameters: dict[str, Any]) -> str:
    """Parameters in one line."""
    words = [
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in parameters.items()
    ]
    return " ".join(words)
