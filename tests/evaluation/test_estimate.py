"""The announced time: attacks need what they say, and what is known takes no time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attacks.small import HARMFUL, HARMLESS, Says, small_target
from tiny_models import tiny_model, tokenizer

from es2fast.attacks.base import Target
from es2fast.attacks.registry import make_attack
from es2fast.config import DataConfig, EvaluateConfig
from es2fast.data import Formatter
from es2fast.evaluation.answering import EvaluationPrompts, Subject
from es2fast.evaluation.estimate import Missing, Speed, line, measured, seconds
from es2fast.evaluation.run import evaluate_models
from es2fast.run.folder import RunFolder

ASKED = HARMFUL[:3]


@contextmanager
def counted(target: Target) -> Iterator[list[int]]:
    """Rows for which the model generates, one number per call."""
    rows: list[int] = []
    real: Any = target.model.generate

    def generate(*args: Any, **options: Any) -> Any:
        given = options.get("input_ids", options.get("inputs_embeds"))
        rows.append(len(given))
        return real(*args, **options)

    target.model.generate = generate  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        del target.model.generate


EXACT = [
    "direct",
    {"name": "prefill", "tokens": [0, 2, 4]},
    "roleplay",
    {"name": "scav", "strengths": [1e-4], "blocks": ["all"]},
    {"name": "mean_difference", "layers": [0, 1, 2], "search": "grid", "trial_prompts": 5},
    {"name": "replacement", "trial_prompts": 4},
    {"name": "soft_prompt", "steps": 2, "inits": 2, "generations": 2, "tokens": 3},
    {"name": "latent_pgd", "steps": 1, "epsilons": [0.1, 0.3], "candidates": 2},
    {"name": "finetune", "steps": [1, 2], "pairs": 4},
]


@pytest.mark.parametrize("entry", EXACT, ids=str)
def test_an_attack_needs_the_answers_that_it_announces(entry: Any) -> None:
    target, attack = small_target(), make_attack(entry)
    announced = attack.cost(target, len(ASKED))
    with counted(target) as rows:
        attack.prepare(target)
        attack.answers(target, ASKED)
    assert sum(rows) == announced.answers + announced.trials
    assert announced.answers >= len(ASKED)


@pytest.mark.parametrize("entry", ["scav", "mean_difference", "ablation", "template"])
def test_a_search_needs_no_more_than_announced(entry: str) -> None:
    target, attack = small_target(judge=Says(lambda text: False)), make_attack(entry)
    announced = attack.cost(target, len(ASKED))
    with counted(target) as rows:
        attack.prepare(target)
        attack.answers(target, ASKED)
    assert len(ASKED) <= sum(rows) <= announced.answers + announced.trials


def test_the_sum() -> None:
    target = small_target(max_new_tokens=256)
    direct, prefill = make_attack("direct"), make_attack({"name": "prefill", "tokens": [0, 5, 9]})
    missing = [Missing([(direct, 10), (prefill, 4)], 2, 7), Missing([(direct, 0)], 0, 9)]
    speed = Speed(10.0, 0.5, 2.5)
    assert seconds(missing, target, speed) == (10 + 3 * 4 + 2) * 10.0 + 7 * 0.5
    assert line(missing, 10, target, speed) == (
        "about 4 min: 1 model x 2 attacks (prefill 3x), n = 10, 256 tokens "
        "(upper bound: answers may end early)"
    )


def test_trials_are_as_long_as_they_are_cut() -> None:
    target, speed = small_target(max_new_tokens=256), Speed(10.0, 0.5, 2.5)
    search = make_attack({"name": "replacement", "trial_prompts": 2})
    trials = 4 * min(2, len(target.harmful))
    missing = [Missing([(search, 8)], 0, 0)]
    assert seconds(missing, target, speed) == 8 * 10.0 + trials * 2.5 + len(target.harmless) * 0.5
    assert f"(replacement {1 + trials / 4 / 8:.3g}x)" in line(missing, 8, target, speed)


def test_the_speed_is_that_of_whole_answers() -> None:
    short, long = (measured(small_target(max_new_tokens=n)) for n in (5, 500))
    assert 0 < short.prompt < short.answer < long.answer / 10
    assert short.trial == short.answer and long.prompt < long.trial < long.answer / 4


def test_it_is_said_once_and_not_where_everything_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formatter = Formatter(tokenizer(), DataConfig())
    subjects = [Subject.of(f"m{i}", tiny_model("llama", seed=i), formatter) for i in range(2)]
    prompts = EvaluationPrompts(HARMFUL[:4], HARMLESS[:4], HARMFUL[4:], HARMLESS[4:])
    settings = EvaluateConfig(attacks=["direct", {"name": "prefill", "tokens": [0, 3]}],
                              max_new_tokens=3)  # fmt: skip
    evaluate_models(subjects, prompts, settings, RunFolder(tmp_path))
    said = [text for text in capsys.readouterr().out.splitlines() if text.startswith("about ")]
    assert len(said) == 1
    assert "2 models x 2 attacks (prefill 2x), n = 4, 3 tokens" in said[0]
    evaluate_models(subjects, prompts, settings, RunFolder(tmp_path))
    assert "about" not in capsys.readouterr().out
