"""The batch size that is found: where it begins, and that running out of memory halves it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from attacks.small import HARMFUL, HARMLESS, hook_count, small_target
from tiny_models import tiny_model, tokenizer
from torch import nn

from es2fast.attacks.states.mean_difference import MeanDifference
from es2fast.attacks.states.pushes import PushSettings, total_of
from es2fast.config import DataConfig, EvaluateConfig
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError
from es2fast.evaluation.answering import EvaluationPrompts, Subject
from es2fast.evaluation.run import evaluate_models
from es2fast.modeling.batch_size import CPU_ROWS, rows_within, starting_rows
from es2fast.modeling.taps import blocks, hooks
from es2fast.run.folder import RunFolder


@contextmanager
def memory_for(model: nn.Module, rows: int, block: int = 2) -> Iterator[None]:
    """A pass with more rows fails in the middle, as it does when a GPU is full."""

    def full(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].shape[0] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with hooks([blocks(model)[block].register_forward_pre_hook(full)]):
        yield


def test_what_half_of_the_memory_holds() -> None:
    config = tiny_model("llama").config  # 4 blocks, 2 heads of keys and values, width 8, 31 words
    row = 2 * 4 * 2 * 8 * 2 * 100 + 4 * config.vocab_size
    assert rows_within(2 * 16 * row, config, 100, 2) == 16
    assert rows_within(2 * 31 * row, config, 100, 2) == 16
    assert rows_within(2 * 32 * row, config, 100, 2) == 32
    assert rows_within(10**12, config, 100, 2) == 256
    assert rows_within(0, config, 100, 2) == 1
    assert starting_rows(tiny_model("llama"), 100) == CPU_ROWS


def test_a_full_memory_halves_the_batch_and_the_answers_stay(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def attacked(rows: int | None) -> tuple[list[str], float, int]:
        target = small_target(batch_size=16, halves=True)
        attack = MeanDifference(PushSettings(layers=[1], trial_prompts=16))
        with memory_for(target.model, rows or 99):
            target.fitted(lambda: attack.prepare(target))
            found = target.fitted(lambda: attack.answers(target, HARMFUL))
        assert hook_count(target.model) == 0
        flat = [answer for one in found for answer in one]
        return [a.text for a in flat], total_of(flat).relative_push, target.batch_size

    texts, push, size = attacked(None)
    assert size == 16 and capsys.readouterr().out == ""
    again, same_push, size = attacked(5)
    assert again == texts and size == 4
    assert same_push == pytest.approx(push, rel=1e-4)  # a pass that failed counts for nothing
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"note: out of memory; going on with evaluate.batch_size={rows}" for rows in (8, 4)
    ]


def test_states_are_collected_in_smaller_batches_too() -> None:
    target, whole = small_target(batch_size=16, halves=True), small_target()
    with memory_for(target.model, 3):
        harmful, harmless = target.states
    for found, wanted in zip((harmful, harmless), whole.states):
        for layer in wanted:
            assert torch.allclose(found[layer], wanted[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("halves", "remedy"), [(False, "auto or a smaller"), (True, "device_map")])
def test_what_cannot_be_halved_is_said(halves: bool, remedy: str) -> None:
    target = small_target(batch_size=16, halves=halves)
    with memory_for(target.model, 0), pytest.raises(UserError, match=remedy):
        target.fitted(lambda: target.generate(HARMFUL))


def test_what_is_measured_fits_or_is_one_line(tmp_path: Path) -> None:
    """States at all positions come in halved batches; harmless tokens are not halved."""
    model, formatter = tiny_model("llama"), Formatter(tokenizer(), DataConfig())
    asked = [Prompt.of(prompt.text, "sure .") for prompt in HARMLESS]
    prompts = EvaluationPrompts(HARMFUL[:6], asked[:6], HARMFUL[6:], asked[6:])
    subjects = [Subject.of("model", model, formatter)]
    settings = EvaluateConfig(max_new_tokens=3, attacks=["direct"])
    with memory_for(model, 6):
        report = evaluate_models(subjects, prompts, settings, RunFolder(tmp_path / "six"))
    assert report.models[0].separation["1"].positions is not None
    with memory_for(model, 3), pytest.raises(UserError, match="out of memory with 8 rows; use"):
        evaluate_models(subjects, prompts, settings, RunFolder(tmp_path / "three"))
