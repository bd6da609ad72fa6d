"""Tasks of lm-eval on the live model: the harness's own figures against plain ones, hooks and all.

The harness is an extra, so what needs it is skipped where it is not installed.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from attacks.small import HARMFUL, HARMLESS, hook_count, small_target
from tiny_models import OBJECTS, tiny_model, tokenizer

from es2fast.attacks.base import Attack, Target
from es2fast.attacks.registry import BUILT_IN, attack_class, make_attacks
from es2fast.config import DataConfig, EvaluateConfig, LmEvalConfig
from es2fast.data import Formatter
from es2fast.errors import UserError
from es2fast.evaluation.answering import EvaluationPrompts, Subject
from es2fast.evaluation.lm_tasks import check, task_files, task_scores
from es2fast.evaluation.run import evaluate_models
from es2fast.report.schema import BASE
from es2fast.report.table import table_markdown
from es2fast.run.folder import RunFolder

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm_eval is not installed (extra lm-eval)"
)
CHOICES = ["sure", "some text", "a lamp ."]
DOCS = [{"question": f"paint the {thing}", "answer": i % 3} for i, thing in enumerate(OBJECTS)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a multiple-choice and a generating task over the same documents."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "docs.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choose = shared | {
        "task": "choose",
        "output_type": "multiple_choice",
        "doc_to_choice": CHOICES,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    write = shared | {
        "task": "write",
        "output_type": "generate_until",
        "doc_to_target": "sure",
        "generation_kwargs": {"max_gen_toks": 3, "until": ["zzz"], "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choose, write):
        (folder / f"{task['task']}_task.yaml").write_text(yaml.safe_dump(task))
    return folder


@torch.no_grad()
def accuracy(target: Target) -> float:
    """Share of documents whose choice has the highest log-probability, choice by choice."""
    words, right = target.formatter.tokenizer, 0
    for doc in DOCS:
        ids = words(doc["question"])["input_ids"]
        scores = []
        for choice in CHOICES:
            more = words(choice, add_special_tokens=False)["input_ids"]
            logits = target.model(torch.tensor([[*ids, *more]])).logits[0].double()
            log_probs = logits.log_softmax(-1)[len(ids) - 1 : -1]
            scores.append(sum(float(log_probs[i, token]) for i, token in enumerate(more)))
        right += scores.index(max(scores)) == doc["answer"]
    return right / len(DOCS)


@needs_harness
@pytest.mark.parametrize("entry", [None, "ablation", "repe"])
def test_the_harness_sees_the_model_with_what_is_in_place(tasks: Path, entry: str | None) -> None:
    target = small_target(max_new_tokens=3)
    settings = LmEvalConfig(tasks=["choose", "write"], tasks_dir=str(tasks))
    under = None
    if entry is not None:
        (attack,) = make_attacks([entry])
        attack.prepare(target)

        def under() -> object:
            return attack.applied(target.model)

    scores = task_scores(target, settings, under)  # type: ignore[arg-type]
    assert hook_count(target.model) == 0
    score = scores["choose"]["acc"]
    if under is None:
        assert score["value"] == accuracy(target)
    else:
        with under():  # type: ignore[attr-defined]
            assert score["value"] == accuracy(target)
    assert score["n"] == len(DOCS) and score["stderr"] > 0
    assert 0 <= scores["write"]["exact_match"]["value"] <= 1


@needs_harness
def test_tasks_stand_in_the_report_beside_the_base_s_and_are_kept(
    tasks: Path, tmp_path: Path
) -> None:
    formatter = Formatter(tokenizer(), DataConfig())
    models = [tiny_model("llama", seed=seed) for seed in (0, 3)]
    subjects = [Subject.of(n, m, formatter) for n, m in zip((BASE, "tuned"), models)]
    prompts = EvaluationPrompts(HARMFUL[:4], HARMLESS[:4], HARMFUL[4:], HARMLESS[4:])
    settings = EvaluateConfig(
        attacks=["direct", "ablation"], max_new_tokens=3,
        lm_eval=LmEvalConfig(tasks=[str(tasks / "choose_task.yaml")], attacks=["ablation"]),
    )  # fmt: skip
    report = evaluate_models(subjects, prompts, settings, RunFolder(tmp_path))
    for name, model in zip((BASE, "tuned"), models):
        found = report.model(name).lm_eval
        assert list(found) == ["plain", "ablation"]
        plain = accuracy(Target(model, formatter, [], [], None))  # type: ignore[arg-type]
        assert found["plain"]["choose"]["acc"].value == plain
    text = table_markdown(report)
    assert "tasks of lm-eval under ablation" in text and "choose: acc" in text and "±" in text
    for subject in subjects:
        subject.load = None  # type: ignore[assignment]
    again = evaluate_models(subjects, prompts, settings, RunFolder(tmp_path))
    assert again.models == report.models


@needs_harness
def test_an_unknown_task_is_one_line(tasks: Path) -> None:
    target = small_target()
    with pytest.raises(UserError, match=r"evaluate\.lm_eval\.tasks: .* no YAML file with a `task`"):
        task_scores(target, LmEvalConfig(tasks=[str(tasks / "docs.yaml")]))


def test_mistakes_are_said_before_any_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = make_attacks(["direct", "ablation", "prefill"])
    check(LmEvalConfig(tasks=[], limit=3), attacks)  # off
    for alone in ({"attacks": ["direct"]}, {"tasks_dir": str(tmp_path)}):
        with pytest.raises(UserError, match=f"lm_eval.{next(iter(alone))}: .* is for tasks, and"):
            check(LmEvalConfig.model_validate(alone), attacks)
    monkeypatch.setattr("es2fast.evaluation.lm_tasks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'es2fast\[lm-eval\]'"):
        check(LmEvalConfig(tasks=["arc_easy"]), attacks)
    monkeypatch.setattr("es2fast.evaluation.lm_tasks.find_spec", lambda name: True)
    for wrong, words in (
        ({"attacks": ["scav"]}, "'scav' is not in evaluate.attacks"),
        ({"attacks": ["prefill"]}, "'prefill' changes what is asked"),
        ({"tasks_dir": str(tmp_path / "none")}, "tasks_dir: there is no folder"),
    ):
        with pytest.raises(UserError, match=words):
            check(LmEvalConfig(tasks=["arc_easy"], **wrong), attacks)


@needs_harness
def test_tasks_are_looked_for_before_any_model_is_loaded(
    tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attacks = make_attacks(["ablation"])
    with pytest.raises(UserError, match="lm-eval has no task 'chose'"):
        check(LmEvalConfig(tasks=["chose"], tasks_dir=str(tasks)), attacks)
    monkeypatch.chdir(tasks)
    check(LmEvalConfig(tasks=["choose_task.yaml"], attacks=["ablation"]), attacks)


def test_task_files_count_by_content(tmp_path: Path) -> None:
    one, other = tmp_path / "one.yaml", tmp_path / "own" / "other.yaml"
    other.parent.mkdir()
    one.write_text("task: one")
    other.write_text("task: other")
    assert task_files(LmEvalConfig(tasks=["arc_easy"])) == []
    by_path = LmEvalConfig(tasks=[str(one)])
    by_folder = LmEvalConfig(tasks=["other"], tasks_dir=str(other.parent))
    for settings, file in ((by_path, one), (by_folder, other)):
        before = task_files(settings)
        file.write_text(file.read_text() + "\n# changed")
        assert before and task_files(settings) != before


def test_which_attacks_can_be_in_place() -> None:
    found = {name for name in BUILT_IN if attack_class(name).applied is not Attack.applied}
    assert found == {"scav", "mean_difference", "repe", "replacement", "ablation",
                     "ablation_weights", "finetune", "splice"}  # fmt: skip
