"""The evaluation of one model, on models that have learnt next to nothing: its bookkeeping."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from es2fast.config import DataConfig, EvaluateConfig
from es2fast.data import Formatter, Prompt
from es2fast.demo.toy import Recipe, build_toy, split_rows
from es2fast.evaluation.measure import evaluate_model, kl_to_base
from es2fast.modeling.taps import blocks
from es2fast.report.schema import check_report

RECIPE = Recipe(hidden=16, ffn=16, depth=3, heads=2, answer_steps=2, align_steps=2,
                answer_batch=4, align_batch=4)  # fmt: skip
CONFIG = EvaluateConfig(max_new_tokens=4, batch_size=5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Formatter, dict[str, Any]]:
    folder = build_toy(tmp_path_factory.mktemp("small") / "toy", progress=False, recipe=RECIPE)
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    formatter = Formatter(AutoTokenizer.from_pretrained(folder / "model"), DataConfig())
    split = split_rows(0, RECIPE)
    prompts = {
        "harmful": [Prompt.of(row.prompt, row.answer) for row in split["eval_harmful"][:7]],
        "harmless": [Prompt.of(row.prompt, row.answer) for row in split["eval_harmless"][:7]],
        "fit_harmful": [Prompt.of(row.prompt) for row in split["harmful"][:20]],
        "fit_harmless": [Prompt.of(row.prompt, row.answer) for row in split["harmless"][:20]],
    }
    return model, formatter, prompts


def scaled(model: Any, factor: float) -> Any:
    """A copy whose block 1 writes `factor` times as much into the residual stream."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[1].mlp.down_proj.weight.mul_(factor)
    return tuned


def test_both_blocks_satisfy_the_schema(parts):
    model, formatter, prompts = parts
    settings = {**prompts, "layers": [0, 1], "config": CONFIG}
    base = evaluate_model(model, formatter, **settings)
    tuned = evaluate_model(
        scaled(model, 5.0), formatter, base=model, base_separation=base["separation"], **settings
    )
    check_report({"base": base, "tuned": tuned})
    assert base["harmless"]["kl_to_base"] == 0.0 < tuned["harmless"]["kl_to_base"]
    for row in base["separation"].values():
        assert row["distance_over_base"] == row["norm_ratio"] == 1.0
    assert tuned["separation"]["0"]["distance_over_base"] == pytest.approx(1.0)
    assert tuned["separation"]["1"]["distance_over_base"] != pytest.approx(1.0, abs=1e-3)
    for attack in base["attacks"].values():
        assert attack["refused"] + attack["useful"] + attack["gibberish"] == pytest.approx(1.0)
        assert attack["n"] == 7


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_as_it_was(parts, training):
    model, formatter, prompts = parts
    model = copy.deepcopy(model).train(training)
    before = copy.deepcopy(model.state_dict())
    evaluate_model(model, formatter, **prompts, layers=[1], config=CONFIG)
    assert model.training is training
    assert all(not block._forward_hooks for block in blocks(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_kl_is_the_mean_over_all_tokens_whatever_the_batches(parts):
    model, formatter, prompts = parts
    tuned, rows = scaled(model, 5.0), prompts["harmless"]
    responses = [prompt.response for prompt in rows]
    total, tokens = 0.0, 0
    with torch.no_grad():
        for prompt, response in zip(rows, responses):
            prompt_ids, response_ids = formatter.conversation_ids(prompt, response)
            ids = torch.tensor([[*prompt_ids, *response_ids]])
            p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (model, tuned))
            total += float((p.exp() * (p - q)).sum())
            tokens += ids.shape[1]
        for batch_size in (1, 3, 7):
            found = kl_to_base(tuned, model, formatter, rows, responses, batch_size)
            assert found == pytest.approx(total / tokens, rel=1e-4)


def test_without_a_response_the_base_model_s_own_answer_is_the_reference(parts):
    model, formatter, prompts = parts
    bare = {**prompts, "harmless": [Prompt.of(p.text) for p in prompts["harmless"]]}
    report = evaluate_model(model, formatter, **bare, layers=[1], config=CONFIG)
    assert report["harmless"]["intact_rate"] == 1.0
    tuned = evaluate_model(
        copy.deepcopy(model), formatter, **bare, layers=[1], config=CONFIG, base=model,
        base_separation=report["separation"],
    )  # fmt: skip
    assert tuned["harmless"]["intact_rate"] == 1.0
    assert tuned["harmless"]["kl_to_base"] == pytest.approx(0.0, abs=1e-6)
