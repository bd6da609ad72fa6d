"""The geometry at more tokens than the last, against passes of one prompt at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from data.chat_tokenizers import CHAT, NO_SYSTEM, PLAIN, chat_tokenizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from tiny_models import tiny_model, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.evaluation.positions import more_positions

LONG_TAIL = CHAT.replace("%}<bot>{% else", "%}<bot> sure end{% else")


def prompts(verb: str, count: int) -> list[Prompt]:
    """Several lengths, so that rows are padded."""
    return [Prompt.of(f"{verb} w{i} w{(3 * i) % 17}" + " w5" * (i % 3)) for i in range(count)]


GROUPS = {"harmful": prompts("w40", 6), "harmless": prompts("w41", 5)}
FIT = (prompts("w40 w1", 12), prompts("w41 w2", 11))


def states(model: Any, formatter: Formatter, some: list[Prompt], tail: int) -> list[np.ndarray]:
    """Of blocks 0 to 2: [(n, 2, H)], last instruction token and mean over the template's."""
    found = []
    for prompt in some:
        ids = torch.tensor([formatter.prompt_ids(prompt)])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[1:4]
        rows = [h[0].double().numpy() for h in hidden]
        found.append([[r[-1 - tail], r[len(r) - tail :].mean(0)] for r in rows])
    return list(np.array(found).transpose(1, 0, 2, 3))


@pytest.mark.parametrize("memory", [1, 2 << 30])
def test_figures_are_those_of_single_prompts(memory: int) -> None:
    words = chat_tokenizer(LONG_TAIL)
    model, formatter = tiny_model("llama", vocab_size=len(words)), Formatter(words, DataConfig())
    tail = words("<end> <bot> sure end", add_special_tokens=False)["input_ids"]
    assert formatter.prompt_ids(GROUPS["harmful"][0])[-4:] == tail
    found = more_positions(model, formatter, GROUPS, FIT, None, memory)
    assert list(found) == ["0", "1", "2", "3"]
    sides = [states(model, formatter, some, 4) for some in (*GROUPS.values(), *FIT)]
    for layer in range(3):
        a, b, fit_a, fit_b = (side[layer] for side in sides)
        for place, name in enumerate(("instruction", "template")):
            row = found[str(layer)][name]
            pairs = [np.linalg.norm(x - y) for x in a[:, place] for y in b[:, place]]
            assert row["distance"] == pytest.approx(np.mean(pairs), rel=1e-4)
            assert row["distance_over_base"] == 1.0
            accuracy = plain_accuracy(fit_a[:, place], fit_b[:, place])
            assert row["probe_accuracy"] == pytest.approx(accuracy, abs=1 / 23 + 1e-9)
            low, high = row["probe_interval"]
            assert 0 <= low <= row["probe_accuracy"] <= high <= 1


def plain_accuracy(a: np.ndarray, b: np.ndarray) -> float:
    """Cross-validated, by scikit-learn, all rows scaled alike."""
    x, y = np.concatenate([a, b]), np.array([1] * len(a) + [0] * len(b))
    x = x / np.sqrt(((x - x.mean(0)) ** 2).sum() / len(x))
    cv = StratifiedKFold(5, shuffle=True, random_state=0)
    return float((cross_val_predict(LogisticRegression(max_iter=1000), x, y, cv=cv) == y).mean())


def test_distances_are_in_units_of_the_base_model_s_at_the_same_token() -> None:
    words = chat_tokenizer(LONG_TAIL)
    formatter = Formatter(words, DataConfig())
    base, tuned = (tiny_model("llama", vocab_size=len(words), seed=seed) for seed in (0, 1))
    before = {
        layer: {"distance": 1.0, "positions": rows}
        for layer, rows in more_positions(base, formatter, GROUPS, FIT, None).items()
    }
    found = more_positions(tuned, formatter, GROUPS, FIT, before)
    for layer, rows in found.items():
        for name, row in rows.items():
            wanted = row["distance"] / before[layer]["positions"][name]["distance"]
            assert row["distance_over_base"] == pytest.approx(wanted) and wanted != 1
    bare = more_positions(tuned, formatter, GROUPS, FIT, {"0": {"distance": 1.0}})
    assert bare["0"]["instruction"]["distance_over_base"] is None


def test_one_template_token_is_the_last_prompt_token_and_has_no_mean() -> None:
    model, formatter = tiny_model("llama"), Formatter(tokenizer(), DataConfig())
    some = {"harmful": [Prompt.of("break the car")] * 3, "harmless": [Prompt.of("draw a car")] * 3}
    found = more_positions(model, formatter, some, (some["harmful"], some["harmless"]), None)
    assert all(list(rows) == ["instruction"] for rows in found.values())


@pytest.mark.parametrize(
    "template, tail",
    [(CHAT, 2), (PLAIN, 1), (NO_SYSTEM + CHAT, 2), (LONG_TAIL, 4),
     ("{{ messages[-1]['content'] }}", 0)],
)  # fmt: skip
@pytest.mark.parametrize("system", [None, "be kind"])
def test_the_template_s_tail(template: str, tail: int, system: str | None) -> None:
    formatter = Formatter(chat_tokenizer(template), DataConfig(system_prompt=system))
    assert formatter.template_tail() == tail


def test_a_tokenizer_that_joins_the_words_with_the_template() -> None:
    """ "?" and the template's line break become one token after some prompts and not after others:
    what no wording changes is what follows."""
    letters = sorted(set("abcdefghijklmnopqrstuvwxyzABCT0123456789 .,?:\n"))
    vocabulary = {letter: i for i, letter in enumerate([*letters, "?\n"])}
    raw = Tokenizer(models.BPE(vocabulary, [("?", "\n")]))
    raw.pre_tokenizer = pre_tokenizers.Split("zzz", "isolated")
    words = PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template="{{ messages[-1]['content'] }}\nA:"
    )
    formatter = Formatter(words, DataConfig())
    ids = formatter.prompt_ids(Prompt.of("why?"))
    assert words.convert_ids_to_tokens(ids) == ["w", "h", "y", "?\n", "A", ":"]
    assert formatter.template_tail() == 2
