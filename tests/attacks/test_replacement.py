"""Replacement: what stands at the replaced positions, and elsewhere, read back by other hooks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attacks.targets import HARMLESS, TEXTS, failing_head, prompts, state_of, tiny_target
from tiny_models import TEMPLATE, tokenizer
from torch import Tensor, nn

from es2fast.attacks.base import Answer, Target
from es2fast.attacks.registry import make_attack
from es2fast.attacks.states.replacement import Replacement
from es2fast.config import DataConfig
from es2fast.data import Formatter
from es2fast.errors import UserError
from es2fast.judges.base import Item, Judge, Verdict
from es2fast.modeling.taps import causal_lm

LONG_TAIL = TEMPLATE.replace("{{ m['content'] }} {% elif", "{{ m['content'] }} . </s> {% elif")
NO_TAIL = "<s>{% for m in messages %}<user> {{ m['content'] }}{% endfor %}"
M = {"last": 1, "template": 3}  # of LONG_TAIL: . </s> <bot>


def target_of(family: str = "llama", template: str = LONG_TAIL, **options: Any) -> Target:
    target = tiny_target(family, **options)
    words = tokenizer()
    words.chat_template = template
    target.formatter = Formatter(words, DataConfig(max_length=48))
    return target


def module(model: nn.Module, layer: int, what: str) -> nn.Module:
    block = causal_lm(model).model.layers[layer]
    return block if what == "block" else block.self_attn.v_proj


def tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class Sure(Judge):
    name = "sure"

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        return ["useful" if text.startswith("sure") else "refused" for _, text, _ in items]


def answers_by(good: Callable[[Any], int]) -> Any:
    """A recorder that knows every answer: how many are useful, by parameters."""

    def record(name: str, parameters: Any, some: Any, answer: Any) -> list[Answer]:
        useful = good(parameters)
        return [Answer("sure it is" if i < useful else "no") for i in range(len(some))]

    return record


@torch.no_grad()
def alone(target: Target, text: str, place: nn.Module) -> Tensor:
    """Output of a module for one prompt, not padded: (T, H)."""
    found: list[Tensor] = []
    handle = place.register_forward_hook(lambda m, a, output: found.append(tensor(output)[0]))
    target.model(input_ids=torch.tensor([target.formatter.prompt_ids(prompts(text)[0])]))
    handle.remove()
    return found[0]


def passes(target: Target, attack: Replacement, place: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Per pass of an attacked generation, a module's output before and after the attack's hook."""
    seen: list[list[Tensor]] = [[], []]

    def keep(which: int) -> Callable[..., None]:
        return lambda m, a, output: seen[which].append(tensor(output).detach().clone())

    before = place.register_forward_hook(keep(0))
    with attack.applied(target.model):
        after = place.register_forward_hook(keep(1))
        target.generate(prompts(*TEXTS))
    before.remove()
    after.remove()
    return list(zip(*seen))


@pytest.mark.parametrize("positions", ["last", "template"])
@pytest.mark.parametrize("what", ["block", "values"])
@pytest.mark.parametrize(("family", "lora"), [("llama", False), ("gemma2", False), ("qwen3", True)])
def test_only_the_template_positions_of_the_prompt_pass_become_the_harmless_mean(
    family: str, lora: bool, what: str, positions: str
) -> None:
    target, m = target_of(family, lora=lora), M[positions]
    clean = state_of(target.model)
    attack = make_attack({"name": "replacement", "what": what, "positions": positions})
    attack.prepare(target)
    layer = attack.at[0]
    assert attack.at == ([layer] if what == "block" else list(range(layer, 4)))
    # the highest: value vectors of block 0 are those of the token alone, the same in all prompts
    place = module(target.model, attack.at[-1], what)
    wanted = torch.stack([alone(target, text, place)[-m:] for text in HARMLESS]).mean(0)
    first, *steps = passes(target, attack, place)
    torch.testing.assert_close(first[1][:, -m:], wanted.expand(4, -1, -1), rtol=1e-4, atol=1e-4)
    assert (first[0][:, -m:] - first[1][:, -m:]).norm(dim=-1).min() > 0.01
    assert torch.equal(first[0][:, :-m], first[1][:, :-m])
    assert len(steps) > 1 and all(b.shape[1] == 1 and torch.equal(b, a) for b, a in steps)
    assert state_of(target.model) == clean


def test_nearest_takes_each_row_s_own_harmless_prompt_and_keeps_it_above() -> None:
    target = target_of()
    attack = make_attack(
        {"name": "replacement", "source": "nearest", "what": "values", "positions": "template"}
    )
    target.recorder, target.judge = answers_by(lambda one: one["layer"] == 1), Sure()
    attack.prepare(target)
    target.recorder = None
    assert attack.at == [1, 2, 3]
    places = {layer: module(target.model, layer, "values") for layer in attack.at}
    sources = {
        layer: torch.stack([alone(target, text, place)[-3:] for text in HARMLESS])
        for layer, place in places.items()
    }
    own = torch.stack([alone(target, text, places[1])[-1] for text in TEXTS])
    nearest = [int((sources[1][:, -1] - row).norm(dim=-1).argmin()) for row in own]
    assert len(set(nearest)) > 1
    for layer, place in places.items():
        first = passes(target, attack, place)[0]
        torch.testing.assert_close(first[1][:, -3:], sources[layer][nearest], rtol=1e-4, atol=1e-4)


def test_the_block_with_the_most_useful_answers_is_taken() -> None:
    target = target_of()
    attack = make_attack("replacement")
    attack.prepare(target)
    found = attack.summary()
    trials = found["trials"]
    assert [trial["layer"] for trial in trials] == [0, 1, 2, 3]
    most = max(trial["useful"] for trial in trials)
    least = min(trial["relative_push"] for trial in trials if trial["useful"] == most)
    (chosen,) = (trial["layer"] for trial in trials if trial["relative_push"] == least)
    assert found["layers"] == [chosen]


def test_other_positions_and_sources_are_tried_at_the_best_block() -> None:
    target = target_of()
    made: list[dict[str, Any]] = []

    def good(one: Any) -> int:
        made.append(dict(one))
        last = one["positions"] == "template" and one["source"] == "nearest"
        return (one["layer"] == 2) + last

    target.recorder, target.judge = answers_by(good), Sure()
    entry = {"name": "replacement", "what": ["block", "values"], "source": ["mean", "nearest"],
             "positions": ["last", "template"]}  # fmt: skip
    attack = make_attack(entry)
    attack.prepare(target)
    kinds = [("last", "mean"), ("last", "nearest"), ("template", "mean"), ("template", "nearest")]
    assert made == [
        {"what": what, "positions": p, "source": s, "layer": layer}
        for what in ("block", "values")
        for layers, some in (((0, 1, 2, 3), kinds[:1]), ((2,), kinds[1:]))
        for layer in layers
        for p, s in some
    ]
    found = attack.summary()
    assert {k: found[k] for k in ("layers", "what", "positions", "source")} == {
        "layers": [2], "what": "block", "positions": "template", "source": "nearest"}  # fmt: skip
    place = module(target.model, 2, "block")
    wanted = torch.stack([alone(target, text, place)[-3:] for text in HARMLESS])
    torch.testing.assert_close(attack.sources[2], wanted, rtol=1e-4, atol=1e-4)


def test_what_a_model_does_not_have_is_not_tried_where_there_is_something_else() -> None:
    target = target_of("phi3", NO_TAIL)
    attack = make_attack(
        {"name": "replacement", "what": ["values", "block"], "positions": ["template", "last"]}
    )
    attack.prepare(target)
    trials = attack.summary()["trials"]
    assert [(one["what"], one["layer"], one["positions"]) for one in trials] == [
        ("block", layer, "last") for layer in range(4)
    ]
    assert all(len(source) == 1 and source.shape[1] == 1 for source in attack.sources.values())


def test_the_report_s_push_is_the_distance_moved() -> None:
    target = target_of()
    attack = make_attack("replacement")
    attack.prepare(target)
    place = module(target.model, attack.at[0], "block")
    wanted = torch.stack([alone(target, text, place)[-1] for text in HARMLESS]).mean(0)
    own = torch.stack([alone(target, text, place)[-1] for text in TEXTS])
    found = attack.answers(target, prompts(*TEXTS))[0][0].info["pushes"]
    assert found["count"] == 4
    moved = ((wanted - own).norm(dim=-1) / own.norm(dim=-1)).sum()
    assert found["relative"] == pytest.approx(float(moved), rel=1e-4)


def test_hooks_are_gone_after_an_exception() -> None:
    target = target_of()
    attack = make_attack({"name": "replacement", "what": "values"})
    attack.prepare(target)
    clean = state_of(target.model)
    with failing_head(target.model), pytest.raises(RuntimeError, match="head"):
        attack.answers(target, prompts(*TEXTS))
    assert state_of(target.model) == clean


MISTAKES = [
    ({"what": "values"}, "phi3", LONG_TAIL, ["what: 'values'", "Phi3", "use what: block"]),
    ({"positions": "template"}, "llama", NO_TAIL, ["'template'", "use positions: last"]),
]


@pytest.mark.parametrize(("settings", "family", "template", "words"), MISTAKES)
def test_what_a_model_cannot_have_is_said(
    settings: dict[str, str], family: str, template: str, words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        make_attack({"name": "replacement", **settings}).prepare(target_of(family, template))
    assert all(word in str(caught.value) for word in words)
