"""Pushes are swept: which trials are made, which is chosen, what is really pushed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import OBJECTS, VERBS, tiny_model, tokenizer
from torch import Tensor

from es2fast.attacks.base import Answer, Target
from es2fast.attacks.registry import make_attack
from es2fast.attacks.states.mean_difference import MeanDifference
from es2fast.attacks.states.pushes import PushSettings
from es2fast.attacks.states.repe import RepE, RepESettings
from es2fast.attacks.states.scav import Scav, ScavSettings
from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError
from es2fast.judges.base import Item, Judge, Verdict
from es2fast.probing.probes import fit_probe

NEW = 5  # tokens per answer
PLAIN = {"steps": "all", "repetition_penalty": 1.0}  # where the search of these is not the subject


def pushed_by(**given: Any) -> PushSettings:
    return PushSettings(**(PLAIN | given))


def scav_by(**given: Any) -> ScavSettings:
    return ScavSettings(**(PLAIN | given))


class Rigged(Judge):
    """The verdict is the answer's first word where that is one; else the parity of its letters."""

    name = "rigged"

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        known = {word: word for word in ("useful", "refused", "gibberish", "partial")}
        return [
            known.get(text.split(" ")[0], "useful" if len(text) % 2 else "refused")  # type: ignore[misc]
            for _, text, _ in items
        ]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def target(model: Any) -> Target:
    harmful = [Prompt.of(f"{v} the {o}") for v in VERBS[4:] for o in OBJECTS]
    harmless = [Prompt.of(f"please {v} a {o} .") for v in VERBS[:3] for o in OBJECTS]
    return Target(
        model, Formatter(tokenizer(), DataConfig()), harmful, harmless, Rigged(),
        max_new_tokens=NEW, batch_size=6,
    )  # fmt: skip


Outcome = Callable[[Mapping[str, Any]], tuple[int, float]]


def canned(outcome: Outcome, made: list[dict[str, Any]] | None = None) -> Any:
    """A recorder that knows every answer: (useful answers, relative push) by parameters."""

    def record(
        name: str, parameters: Mapping[str, Any], prompts: Sequence[Prompt], answer: Any
    ) -> list[Answer]:
        if made is not None:
            made.append(dict(parameters) | {"n": len(prompts)})
        useful, push = outcome(parameters)
        words = ["useful"] * useful + ["refused", *["gibberish"] * len(prompts)]
        sums = {"count": 1, "total": push, "relative": push}
        return [
            Answer(word, info={"pushes": sums} if place == 0 else {})
            for place, word in enumerate(words[: len(prompts)])
        ]

    return record


def prepared(attack: Any, target: Target, outcome: Outcome) -> list[dict[str, Any]]:
    """Prepares the attack on known answers; the trials made, in order."""
    made: list[dict[str, Any]] = []
    target.recorder = canned(outcome, made)
    attack.prepare(target)
    return made


def test_blocks_come_first_and_then_strengths_at_the_best_of_them(target: Target) -> None:
    attack = MeanDifference(pushed_by(trial_prompts=5))

    def outcome(parameters: Mapping[str, Any]) -> tuple[int, float]:
        useful = {0: 1, 1: 2, 2: 4, 3: 3}[parameters["layers"][0]]
        return useful + (parameters["strength"] == 1.5), parameters["strength"]

    made = prepared(attack, target, outcome)
    places = [(one["layers"], one["strength"]) for one in made]
    assert places == [([i], 1.0) for i in range(4)] + [([2], one) for one in (0.5, 1.5, 2.0)]
    assert all(one["n"] == 5 and one["steps"] == "all" for one in made)
    assert (attack.layers(), attack.strength) == ([2], 1.5)
    summary = attack.summary()
    assert {k: summary[k] for k in ("layers", "strength", "steps")} == {
        "layers": [2], "strength": 1.5, "steps": "all"}  # fmt: skip
    assert [(t["layers"], t["strength"]) for t in summary["trials"]] == places
    first, *_, last = summary["trials"]
    assert first == {
        "layers": [0], "steps": "all", "strength": 1.0, "n": 5, "useful": 0.2, "refused": 0.2,
        "gibberish": 0.6, "relative_push": 1.0,
    }  # fmt: skip
    assert last["useful"] == 0.8
    assert summary["minimal_push"] == 0.5  # 4 of 5 at half the strength; the best is 5 of 5
    json.dumps(summary)


def test_where_nothing_works_strengths_are_tried_where_refusals_give_way(target: Target) -> None:
    attack = MeanDifference(pushed_by(strengths=[1.0, 0.5], trial_prompts=8))
    made: list[dict[str, Any]] = []
    refused = {0: 8, 1: 5, 2: 3, 3: 5}

    def record(
        name: str, parameters: Mapping[str, Any], prompts: Sequence[Prompt], answer: Any
    ) -> list[Answer]:
        made.append(dict(parameters))
        (layer,), strength = parameters["layers"], parameters["strength"]
        words = ["refused"] * refused[layer] + ["gibberish"] * (8 - refused[layer])
        if (layer, strength) == (1, 0.5):
            words[-1] = "useful"
        push = {"count": 1, "total": 1.0, "relative": strength * (9 - layer)}
        return [Answer(word, info={"pushes": push} if i == 0 else {})
                for i, word in enumerate(words)]  # fmt: skip

    target.recorder = record
    attack.prepare(target)
    assert [one["layers"][0] for one in made] == [0, 1, 2, 3, 2, 3, 1]
    assert [one["strength"] for one in made] == [1.0] * 4 + [0.5] * 3
    assert (attack.at, attack.strength) == ([1], 0.5)


def test_a_grid_tries_every_pair(target: Target) -> None:
    attack = MeanDifference(pushed_by(search="grid", strengths=[2.0, 1.0], layers=[1, 3]))
    best = {"layers": [3], "strength": 2.0}
    made = prepared(attack, target, lambda p: (int(best.items() <= p.items()), 1.0))
    assert [(one["layers"], one["strength"]) for one in made] == [
        ([1], 1.0), ([1], 2.0), ([3], 1.0), ([3], 2.0)]  # fmt: skip
    assert (attack.at, attack.strength) == ([3], 2.0)


def test_ties_go_to_the_smaller_push_and_then_to_the_first(target: Target) -> None:
    attack = MeanDifference(pushed_by(strengths=[1.0]))
    prepared(attack, target, lambda p: (3, {0: 0.4, 1: 0.2, 2: 0.2, 3: 0.3}[p["layers"][0]]))
    assert attack.at == [1]
    attack = MeanDifference(pushed_by())
    made = prepared(attack, target, lambda p: (0, 1.0))
    assert (attack.at, attack.strength, len(made)) == ([0], 1.0, 4 + 3 * 3)
    assert attack.summary()["minimal_push"] is None
    attack = MeanDifference(pushed_by())
    prepared(attack, target, lambda p: (2, p["strength"]))
    assert (attack.at, attack.strength) == ([0], 0.5)


def test_where_nothing_works_a_choice_that_begins_to_work_is_taken(target: Target) -> None:
    """The smallest push would be the direct question."""
    refused = {0.5: 8, 1.0: 8, 1.5: 5, 2.0: 0}
    rest = ""

    def record(
        name: str, parameters: Mapping[str, Any], prompts: Sequence[Prompt], answer: Any
    ) -> list[Answer]:
        count = refused[parameters["strength"]]
        words = ["refused"] * count + [rest] * (8 - count)
        push = {"count": 1, "total": 1.0, "relative": parameters["strength"]}
        return [Answer(word, info={"pushes": push} if i == 0 else {})
                for i, word in enumerate(words)]  # fmt: skip

    target.recorder = record
    for word, strength in (("gibberish", 1.5), ("partial", 2.0)):
        rest = word
        attack = MeanDifference(pushed_by(layers=[1], trial_prompts=8))
        attack.prepare(target)
        assert attack.strength == strength


def test_no_block_to_push_at_is_a_mistake(target: Target) -> None:
    attack = Scav(scav_by(p1=0.999))
    target.__dict__["states"] = ({0: torch.randn(20, 8)}, {0: torch.randn(20, 8)})
    with pytest.raises(UserError, match=r"scav: no block to push at; the best probe is right for"):
        attack.prepare(target)
    del target.__dict__["states"]
    away = MeanDifference(pushed_by(layers=[0], blocks=["middle"]))
    with pytest.raises(UserError, match=r"blocks=\['middle'\] leaves none of \[0\]; add `single`"):
        away.prepare(target)


def test_both_steps_are_tried_where_asked_for(target: Target) -> None:
    attack = MeanDifference(pushed_by(steps="both", layers=[2], strengths=[1.0]))
    made = prepared(attack, target, lambda p: (int(p["steps"] == "prompt"), 1.0))
    assert [one["steps"] for one in made] == ["prompt", "all"]
    assert attack.summary()["steps"] == attack.steps == "prompt"


def test_the_strength_nearest_to_the_usual_one_comes_first(target: Target) -> None:
    attack = MeanDifference(pushed_by(strengths=[4.0, 0.2, 1.3]))
    assert attack.strength == 1.3
    assert Scav().strength == 1e-4 and Scav(scav_by(strengths=[1e-2, 1e-3])).strength == 1e-3
    assert Scav(scav_by(p0=0.2)).strength == 0.2
    assert Scav(scav_by(p0=0.2)).settings.strengths == [0.2]


def test_scav_may_push_fewer_blocks(target: Target) -> None:
    attack = Scav(scav_by(p1=0.5))
    made = prepared(attack, target, lambda p: (int(p["layers"] == [2]), 1.0))
    usable = attack.usable()
    assert usable == [0, 1, 2, 3]
    tried = [(one["layers"], one["strength"]) for one in made]
    # of four blocks only block 2 (2/4) lies in the middle third; it is listed once
    first = [(usable, 1e-4), (usable, 0.3), *(([i], 1e-4) for i in (2, 0, 1, 3))]
    assert tried == first + [([2], one) for one in (0.3, 0.05, 1e-2, 1e-3, 1e-5)]
    assert attack.layers() == [2]
    fixed = Scav(scav_by(p1=0.5, p0=1e-4, blocks=["all"]))
    assert prepared(fixed, target, lambda p: (0, 0.0)) == []  # nothing to choose
    assert fixed.layers() == usable and "trials" not in fixed.summary()


def test_several_blocks_are_compared_at_the_gentlest_strength_too(target: Target) -> None:
    """Their pushes add up: what breaks the text at the usual strength may serve best below it."""
    attack = Scav(scav_by(p1=0.5, strengths=[0.1, 1e-4, 1e-6], blocks=["all", "single"]))

    def outcome(parameters: Mapping[str, Any]) -> tuple[int, float]:
        if len(parameters["layers"]) == 1:
            return 3, 1.0
        return (6 if parameters["strength"] == 0.1 else 0), 1.0

    made = prepared(attack, target, outcome)
    every = [0, 1, 2, 3]
    assert [(one["layers"], one["strength"]) for one in made] == [
        (every, 1e-4), (every, 0.1), *(([i], 1e-4) for i in every), (every, 1e-6)]  # fmt: skip
    assert (attack.layers(), attack.strength) == (every, 0.1)
    by_gap = RepE(RepESettings(blocks=["middle", "single"], layers=[1, 2], strengths=[1.0, 0.25]))
    assert (by_gap.usual_strength, by_gap.gentlest_strength) == (1.0, 0.25)


def test_hopeless_blocks_are_tried_further_once_each(target: Target) -> None:
    """A choice of several blocks has two trials among which hopes are sought."""
    attack = Scav(scav_by(p1=0.5, strengths=[0.1, 1e-4, 1e-6], trial_prompts=4))
    made = prepared(attack, target, lambda p: (0, float(p["strength"])))
    later = [(one["layers"], one["strength"]) for one in made[6:]]
    assert later == [([0, 1, 2, 3], 1e-6), ([2], 0.1), ([2], 1e-6), ([0], 0.1), ([0], 1e-6)]


def test_penalties_are_tried_last_at_the_best_of_what_was_found(target: Target) -> None:
    settings = {"layers": [0, 2], "strengths": [1.0, 2.0], "repetition_penalty": [1.0, 5.0, 9.0]}
    attack = MeanDifference(pushed_by(**settings))

    def outcome(parameters: Mapping[str, Any]) -> tuple[int, float]:
        better = parameters["layers"] == [2]
        other = parameters.get("repetition_penalty") == 5.0
        return 2 + better + other, 0.5 if other else 1.0

    made = prepared(attack, target, outcome)
    assert ["repetition_penalty" in one for one in made] == [False] * 3 + [True] * 2
    assert [one["repetition_penalty"] for one in made[3:]] == [5.0, 9.0]
    assert all(one["layers"] == [2] and one["strength"] == 1.0 for one in made[3:])
    assert (attack.at, attack.penalty) == ([2], 5.0)
    assert attack.summary()["repetition_penalty"] == 5.0
    assert attack.summary()["minimal_push"] == 1.0  # of trials without another penalty
    target.recorder = None
    prompts = target.harmful[:6]
    with attack.applied(target.model):
        wanted, plain = (greedy(target, prompts, repetition_penalty=one) for one in (5.0, 1.0))
    assert [found[0].text for found in attack.answers(target, prompts)] == wanted != plain
    alone = MeanDifference(pushed_by(layers=[1], strengths=[1.0], repetition_penalty=[1.0, 5.0]))
    made = prepared(alone, target, lambda p: (3, 1.0))
    assert len(made) == 2 and alone.penalty == 1.0  # ties: the earlier one


def test_many_blocks_are_thinned_out_unless_they_are_named() -> None:
    attack = MeanDifference(pushed_by())
    attack.shift = {i: torch.zeros(1) for i in range(24)}
    assert attack.candidates(24) == [[i] for i in range(2, 24, 3)]
    attack = MeanDifference(pushed_by(layers=list(range(12)), blocks=["middle", "single"]))
    attack.shift = {i: torch.zeros(1) for i in range(24)}
    assert attack.candidates(24) == [[8, 9, 10, 11], *([i] for i in range(12))]


@pytest.mark.parametrize("name", ["scav", "mean_difference", "repe"])
def test_a_search_that_was_interrupted_goes_on_and_ends_the_same(name: str, target: Target) -> None:
    kept: dict[str, list[Answer]] = {}
    allowed = 1000

    def record(
        label: str, parameters: Mapping[str, Any], prompts: Sequence[Prompt], answer: Any
    ) -> list[Answer]:
        nonlocal allowed
        key = json.dumps([label, parameters], sort_keys=True)
        if key not in kept:
            allowed -= 1
            if allowed < 0:
                raise KeyboardInterrupt
            kept[key] = answer()
        return kept[key]

    entry = {"name": name, "strengths": [0.1, 0.2], "trial_prompts": 4,
             "blocks": ["all", "single"], "layers": [0, 2, 3]}  # fmt: skip
    whole = make_attack(entry)
    whole.prepare(target)
    target.recorder, allowed = record, 2
    with pytest.raises(KeyboardInterrupt):
        make_attack(entry).prepare(target)
    assert len(kept) == 2
    allowed = 1000
    again = make_attack(entry)
    again.prepare(target)
    assert again.summary() == whole.summary()
    assert len(again.summary()["trials"]) == len(kept) > 2
    allowed = 0  # everything is known: nothing is asked of the model
    last = make_attack(entry)
    last.prepare(target)
    assert last.summary() == whole.summary()
    held_out = target.harmful[5:9]
    assert last.answers(target, held_out) == whole.answers(target, held_out)


# By hand: what one strength and the same choice of blocks did before there were sweeps.


@contextmanager
def pushed(model: Any, pushes: dict[int, Callable[[Tensor], Tensor]], sums: list[float]) -> Any:
    """Adds to the last position of block outputs at every pass; |push| / |e| goes to `sums`."""

    def hook(push: Callable[[Tensor], Tensor]) -> Any:
        def change(module: Any, args: Any, output: Tensor) -> Tensor:
            out = output.clone()
            added = push(out[:, -1])
            sums.extend((added.norm(dim=-1) / out[:, -1].norm(dim=-1)).tolist())
            out[:, -1] += added
            return out

        return change

    handles = [model.model.layers[i].register_forward_hook(hook(f)) for i, f in pushes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def last_states(target: Target, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Block outputs at the last prompt token, one (n, H) per block, in the library's batches."""
    batch = target.formatter.prompt_batches(prompts, 32)[0]
    kept: list[Tensor] = []
    handles = [
        block.register_forward_hook(lambda m, a, out: kept.append(out[:, -1].clone()))
        for block in target.model.model.layers  # type: ignore[union-attr]
    ]
    mask = batch["attention_mask"]
    with torch.no_grad():
        target.model(batch["input_ids"], attention_mask=mask, position_ids=positions(mask))
    for handle in handles:
        handle.remove()
    return kept


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def greedy(target: Target, prompts: Sequence[Prompt], **options: Any) -> list[str]:
    """Answers by `generate` itself, six prompts at a time."""
    texts: list[str] = []
    for start in range(0, len(prompts), 6):
        batch = target.formatter.prompt_batches(prompts[start : start + 6], 6)[0]
        mask = batch["attention_mask"]
        out = target.model.generate(  # type: ignore[operator]
            **batch, position_ids=positions(mask), max_new_tokens=NEW, do_sample=False,
            eos_token_id=target.formatter.stop_token_ids, pad_token_id=0, **options,
        )  # fmt: skip
        texts += [target.formatter.decode(row) for row in out[:, mask.shape[1] :]]
    return texts


def test_one_strength_is_the_mean_difference_by_hand_bit_for_bit(target: Target) -> None:
    attack = MeanDifference(pushed_by(strengths=[1.0]))
    attack.prepare(target)
    harmful, harmless = (last_states(target, p) for p in (target.harmful, target.harmless))
    shifts = [b.mean(0) - a.mean(0) for a, b in zip(harmful, harmless)]
    trials, found = [], []
    for i, shift in enumerate(shifts):
        sums: list[float] = []
        with pushed(target.model, {i: lambda e, s=shift: s.expand_as(e)}, sums):
            texts = greedy(target, target.harmful[:16])
            mean = sum(sums) / len(sums)
            found.append(greedy(target, target.harmful[3:14]))
        useful = Rigged().verdicts([("", text, None) for text in texts]).count("useful") / 16
        trials.append((useful, -mean))
    curve = attack.summary()["trials"]
    assert [one["useful"] for one in curve] == [useful for useful, _ in trials]
    pushes = [one["relative_push"] for one in curve]
    assert pushes == pytest.approx([-mean for _, mean in trials], rel=1e-5)
    chosen = attack.layers()[0]
    assert trials[chosen] == max(trials)
    assert torch.equal(attack.push(chosen, harmful[chosen])[0], shifts[chosen])
    answers = [text for batch in (target.harmful[3:9], target.harmful[9:14])
               for (text,) in attack.answers(target, batch)]  # fmt: skip
    assert [one.text for one in answers] == found[chosen]
    assert len({tuple(texts) for texts in found}) > 1  # blocks differ, so this can fail


def test_one_probability_is_scav_by_hand_bit_for_bit(target: Target) -> None:
    attack = Scav(scav_by(p0=1e-3, p1=0.5, blocks=["all"]))
    attack.prepare(target)
    pairs = zip(*(last_states(target, p) for p in (target.harmful, target.harmless)))
    probes = {i: fit_probe(a, b) for i, (a, b) in enumerate(pairs)}
    wanted = torch.tensor(1e-3, dtype=torch.float64).logit().item()

    def push(i: int, states: Tensor) -> Tensor:
        w = probes[i].weight
        eps = ((wanted - (states @ w + probes[i].bias)) / w.norm()).clamp_max(0.0)
        return eps[:, None] * w / w.norm()

    sums: list[float] = []
    prompts = target.harmful[:6]
    with pushed(target.model, {i: lambda e, i=i: push(i, e) for i in probes}, sums):
        texts = greedy(target, prompts)
    found = [answers[0] for answers in attack.answers(target, prompts)]
    assert [one.text for one in found] == texts != target.generate(prompts)
    used = [one for one in sums if one > 0]
    recorded = found[0].info["pushes"]
    assert recorded["count"] == len(used)
    assert recorded["relative"] == pytest.approx(sum(used), rel=1e-5)


@pytest.mark.parametrize("p0", ScavSettings().strengths)
def test_scav_reaches_every_probability_of_the_sweep(p0: float, target: Target) -> None:
    attack = Scav(scav_by(p1=0.5))
    attack.fit(*target.states)
    attack.strength = p0
    for layer in attack.layers():
        states = target.states[0][layer]
        states = states[torch.sigmoid(attack.probes[layer].logit(states)) > p0]
        reached = torch.sigmoid(attack.probes[layer].logit(states + attack.push(layer, states)))
        assert len(states) and torch.allclose(reached, torch.tensor(p0), rtol=1e-2, atol=0)


def test_strengths_scale_the_mean_difference(target: Target) -> None:
    attack = MeanDifference(pushed_by())
    attack.fit(*target.states)
    a, b = (group[2] for group in target.states)
    for strength in attack.settings.strengths:
        attack.strength = strength
        moved = (a + attack.push(2, a)).mean(0)
        torch.testing.assert_close(moved, a.mean(0) + strength * (b.mean(0) - a.mean(0)))


@pytest.mark.parametrize("where", ["last", "all"])
def test_the_positions_asked_for_are_pushed_and_padding_is_not(where: str, target: Target) -> None:
    attack = RepE(RepESettings(layers=[1], positions=where, repetition_penalty=1.0))
    attack.prepare(target)
    attack.strength = 3.0
    rows = [target.formatter.prompt_ids(p) for p in (target.harmful[0], target.harmless[0])]
    batch = target.formatter.pad(rows)
    mask, read = batch["attention_mask"].bool(), []
    assert not mask.all()
    # what block 2 is given is what block 1 put out, pushed or not
    above = target.model.model.layers[2]  # type: ignore[union-attr,index]
    handle = above.register_forward_pre_hook(lambda m, args: read.append(args[0].clone()))
    with torch.no_grad():
        target.model(**batch, position_ids=positions(mask.long()))
        with attack.applied(target.model) as pushes:
            target.model(**batch, position_ids=positions(mask.long()))
        target.model(**batch, position_ids=positions(mask.long()))
    handle.remove()
    clean, changed, after = read
    expected = torch.zeros_like(clean)
    one = attack.directions[1]
    expected[mask] = 3.0 * one.gap * one.vector
    if where == "last":
        expected[:, :-1] = 0
    torch.testing.assert_close(changed - clean, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal((changed != clean).any(-1), (expected != 0).any(-1))
    assert torch.equal(after, clean)
    assert pushes.count == (int(mask.sum()) if where == "all" else 2)


@pytest.mark.parametrize("steps", ["prompt", "all"])
@pytest.mark.parametrize("where", ["last", "all"])
def test_while_text_is_generated(where: str, steps: str, target: Target) -> None:
    attack = MeanDifference(pushed_by(positions=where, steps=steps, layers=[0], strengths=[2.0]))
    attack.prepare(target)
    prompts = [target.harmful[0], target.harmless[0]]
    passes = []
    embed = target.model.get_input_embeddings()  # type: ignore[operator]
    handle = embed.register_forward_hook(lambda m, args, out: passes.append(out.shape[1]))
    answers = attack.answers(target, prompts)
    handle.remove()
    tokens = sum(len(target.formatter.prompt_ids(prompt)) for prompt in prompts)
    decoding = 2 * (len(passes) - 1) if steps == "all" else 0
    count = answers[0][0].info["pushes"]["count"]
    assert len(passes) > 1 and set(passes[1:]) == {1}
    assert count == (tokens if where == "all" else 2) + decoding


def test_repetition_penalty_is_the_models_own(target: Target) -> None:
    attack = MeanDifference(pushed_by(repetition_penalty=5.0, layers=[1], strengths=[1.0]))
    attack.prepare(target)
    prompts = target.harmful[:6]
    with attack.applied(target.model):
        wanted = greedy(target, prompts, repetition_penalty=5.0)
        plain = greedy(target, prompts)
    assert [found[0].text for found in attack.answers(target, prompts)] == wanted != plain


MISTAKES = [
    ({"name": "repe", "strengths": []}, ["repe.strengths", "at least 1"]),
    ({"name": "mean_difference", "strengths": [1.0, -2.0]}, ["strengths.1", "found -2.0"]),
    ({"name": "scav", "strengths": [0.5]}, ["scav.strengths.0", "found 0.5"]),
    ({"name": "scav", "p0": 0.1, "strengths": [0.2]}, ["scav: p0 0.1 beside strengths"]),
    ({"name": "scav", "repetition_penalty": [1.0, 0.0]}, ["scav.repetition_penalty", "found 0.0"]),
    ({"name": "scav", "repetition_penalty": [[1.0]]}, ["scav.repetition_penalty.0", "number"]),
    ({"name": "scav", "repetition_penalty": []}, ["scav.repetition_penalty", "at least 1"]),
    ({"name": "repe", "blocks": ["some"]}, ["repe.blocks.0", "found 'some'"]),
]


@pytest.mark.parametrize(("entry", "words"), MISTAKES)
def test_mistakes_name_the_field(entry: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_attack(entry)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_block_the_model_does_not_have(target: Target) -> None:
    for name in ("repe", "scav", "mean_difference"):
        attack = make_attack({"name": name, "layers": [1, 4]})
        with pytest.raises(UserError, match=rf"{name}\.layers: block 4 .* 0\.\.3"):
            attack.prepare(target)
