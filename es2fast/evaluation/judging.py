"""From logged answers to verdicts: every judge in turn reads the answers of all models.

One judge at a time is in memory, and it sees each attack's answers once, in large batches. The
first judge decides; of the others the report gives the rates and how far they agree with each
other (Cohen's κ over answers, useful or not: what judges of different kinds can be compared by).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from es2fast.data import Prompt
from es2fast.errors import UserError
from es2fast.evaluation.aggregate import attack_result, outcome, rates
from es2fast.evaluation.subject import AttackAnswers, ModelAnswers
from es2fast.judges.base import Judge, Verdict
from es2fast.judges.calibration import Calibration, kappa

Verdicts = list[list[Verdict]]  # per prompt, of each of its answers


def judged_attacks(
    judges: Sequence[Judge],
    outcomes: Mapping[str, ModelAnswers],
    prompts: Sequence[Prompt],
    calibration: Calibration | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Per model and attack its entry in the report.

    Args:
        judges: the first decides.
        outcomes: of each model, the answers to `prompts` under each attack.
        prompts: held-out harmful prompts.
        calibration: of the first judge.
    """
    found: dict[tuple[str, str], list[Verdicts]] = {}
    for judge in judges:
        try:
            for name, model in outcomes.items():
                for label, part in model.attacks.items():
                    found.setdefault((name, label), []).append(_verdicts(judge, prompts, part))
        finally:
            judge.close()
    return {
        name: {
            label: _entry(judges, prompts, part, found[name, label], calibration)
            for label, part in model.attacks.items()
        }
        for name, model in outcomes.items()
    }


def check_calibration(calibration: Calibration, judge: Judge) -> None:
    """UserError unless the calibration is of this judge."""
    if calibration.judge != judge.name:
        raise UserError(
            f"evaluate.calibration: it is of judge {calibration.judge!r}, and {judge.name!r} "
            "decides; calibrate that one, or name the other first in evaluate.judge"
        )


def _verdicts(judge: Judge, prompts: Sequence[Prompt], part: AttackAnswers) -> Verdicts:
    items = [
        (prompt.text, answer.text, prompt.response)
        for prompt, answers in zip(prompts, part.answers)
        for answer in answers
    ]
    flat = iter(judge.verdicts(items))
    return [[next(flat) for _ in answers] for answers in part.answers]


def _entry(
    judges: Sequence[Judge],
    prompts: Sequence[Prompt],
    part: AttackAnswers,
    verdicts: Sequence[Verdicts],
    calibration: Calibration | None,
) -> dict[str, Any]:
    result = attack_result(prompts, part.answers, verdicts[0], part.summary)
    if len(judges) > 1:
        result["judges"] = {
            judge.name: rates([outcome(found) for found in own])
            for judge, own in zip(judges, verdicts)
        }
        result["kappa"] = _agreement([judge.name for judge in judges], verdicts)
    if calibration is not None and result["answers_per_prompt"] == 1:  # it is about single answers
        result["corrected"] = calibration.corrected(result["useful"], result["n"])
    return result


def _agreement(names: Sequence[str], verdicts: Sequence[Verdicts]) -> dict[str, float | None]:
    useful = [[v == "useful" for found in own for v in found] for own in verdicts]
    pairs = combinations(range(len(names)), 2)
    return {f"{names[i]} | {names[j]}": kappa(useful[i], useful[j]) for i, j in pairs}
