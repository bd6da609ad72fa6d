"""GCG on random models: the gradient against brute force, the cache, the tokenizer, the descent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from targets import TEXTS, failing_head, prompts, state_of, tiny_target
from tiny_models import WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from es2fast.attacks.base import Target
from es2fast.attacks.prompts.embeddings import Row, frozen, target_ids
from es2fast.attacks.prompts.gcg import (
    Gcg,
    GcgSettings,
    SuffixLoss,
    SuffixText,
    candidates,
    token_scores,
)
from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError

SMALL = {"steps": 6, "width": 24, "top_k": 8, "batch": 7, "target": "sure here is {prompt} ."}
SMALL |= {"initial": "please the a"}


def attack(**more: Any) -> Gcg:
    return Gcg(GcgSettings(**(SMALL | more)))


def losses_of(target: Target, text: SuffixText, batch: int = 7) -> SuffixLoss:
    wanted = target_ids(target.formatter, SMALL["target"], text.prompt)
    return SuffixLoss(target.model, Row(text.before, text.after, wanted), target.device, batch)


def full_loss(target: Target, ids: list[int], wanted: list[int]) -> Tensor:
    """The whole sequence through the model, without a cache, by its own logits."""
    logits = target.model(torch.tensor([[*ids, *wanted]]), use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(
        logits[len(ids) - 1 : -1].double(), torch.tensor(wanted)
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_losses_with_the_cache_are_those_of_full_passes(family: str) -> None:
    target = tiny_target(family)
    text = SuffixText(target.formatter, Prompt.of(TEXTS[1]), "please the a")
    noise = torch.Generator().manual_seed(0)
    drawn = torch.randint(6, 29, (16, 3), generator=noise)
    losses = losses_of(target, text)
    wanted = target_ids(target.formatter, SMALL["target"], text.prompt)
    with torch.no_grad():
        full = torch.stack([full_loss(target, text.whole(s), wanted) for s in drawn.tolist()])
    for _ in range(2):  # the cache is not used up
        torch.testing.assert_close(losses(drawn).double(), full, rtol=2e-5, atol=1e-5)


def test_scores_are_the_slopes_towards_each_token() -> None:
    """Central differences of the loss along every token's embedding, two passes per token.

    phi has plain layer norms: other families compute theirs in fp32 whatever the model's dtype.
    """
    target = tiny_target("phi", dtype=torch.float64)
    text = SuffixText(target.formatter, Prompt.of(TEXTS[0]), "please the a")
    losses, ids = losses_of(target, text), torch.tensor(text.initial)
    allowed = torch.arange(6, 29)
    with frozen(target.model):
        scores = token_scores(target.model, losses.gradient(ids), allowed)
    wanted = target_ids(target.formatter, SMALL["target"], text.prompt)
    table = target.model.get_input_embeddings()
    slopes = torch.zeros_like(scores)
    with torch.no_grad():
        clean = table(torch.tensor([[*text.whole(ids.tolist()), *wanted]]))
        for position in range(3):
            for column, token in enumerate(allowed.tolist()):
                ends = []
                for sign in (1, -1):
                    moved = clean.clone()
                    moved[0, len(text.before) + position] += sign * 1e-5 * table.weight[token]
                    logits = target.model(inputs_embeds=moved, use_cache=False).logits[0]
                    logits = logits[-len(wanted) - 1 : -1]
                    ends.append(
                        torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)).item()
                    )
                slopes[position, column] = (ends[0] - ends[1]) / 2e-5
    torch.testing.assert_close(scores, slopes, rtol=1e-4, atol=1e-6)
    best = scores.topk(5, largest=False).indices
    assert torch.equal(best, slopes.topk(5, largest=False).indices)


def test_candidates_differ_in_one_token_that_is_among_the_best() -> None:
    ids, best = torch.tensor([1, 2, 3]), torch.tensor([[1, 7], [8, 9], [3, 3]])
    drawn = candidates(ids, best, 64, torch.Generator().manual_seed(0))
    assert sorted(map(tuple, drawn.tolist())) == [(1, 8, 3), (1, 9, 3), (7, 2, 3)]


@pytest.mark.parametrize("lora", [False, True])
def test_loss_never_rises_and_is_that_of_the_suffix(lora: bool) -> None:
    target, one = tiny_target(lora=lora), attack()
    text = SuffixText(target.formatter, Prompt.of(TEXTS[0]), "please the a")
    with frozen(target.model):
        found = one.fit(target, text, one.allowed(target))
    assert len(found.curve) == 7
    assert all(after <= before for before, after in zip(found.curve, found.curve[1:]))
    assert found.curve[-1] == found.loss < found.curve[0]
    wanted = target_ids(target.formatter, SMALL["target"], text.prompt)
    whole = text.whole(found.ids.tolist())
    with torch.no_grad():
        assert float(full_loss(target, whole, wanted)) == pytest.approx(found.loss, rel=1e-4)
    assert text.fits(found.ids.tolist())
    words = target.formatter.decode(found.ids)
    assert target.formatter.prompt_ids(Prompt.of(f"{TEXTS[0]} {words}")) == whole


def test_it_finds_the_best_single_token_there_is() -> None:
    """With every token drawn, one step ends at the minimum over all replacements."""
    target, one = tiny_target(), attack(steps=1, top_k=99, width=2000)
    text = SuffixText(target.formatter, Prompt.of(TEXTS[0]), "please the a")
    wanted = target_ids(target.formatter, SMALL["target"], text.prompt)
    with frozen(target.model):
        found = one.fit(target, text, one.allowed(target))
        every = []
        for position in range(3):
            for token in range(6, 6 + len(WORDS)):
                ids = list(text.initial)
                ids[position] = token
                every.append(float(full_loss(target, text.whole(ids), wanted)))
    assert found.loss == pytest.approx(min(every), rel=1e-5)


def test_same_seed_same_answers_whatever_shares_the_batch() -> None:
    some = prompts(*TEXTS[:2])
    both = attack().answers(tiny_target(), some)
    torch.manual_seed(9)
    again = [attack().answers(tiny_target(), [prompt])[0] for prompt in some]
    assert both == again
    assert set(both[0][0].info) == {"first_loss", "loss", "steps", "surviving", "suffix"}


def test_it_stops_where_the_loss_is_low_enough() -> None:
    ((answer,),) = attack(stop=1e9).answers(tiny_target(), prompts(TEXTS[0]))
    assert answer.info["steps"] == 0 and answer.info["suffix"] == SMALL["initial"]


def merging_target() -> Target:
    """A tokenizer with merges, so that some pairs of tokens are never written apart."""
    letters = [*"abcdekprstuxy .", "\u0120", "\u00e9"]
    merges = [("a", "b"), ("\u0120", "x"), ("ab", "c")]
    names = ["<pad>", "<s>", "</s>", "<user>", "<bot>", *letters, *("".join(m) for m in merges)]
    raw = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<user>", "<bot>"],
        chat_template=(
            "<s>{% for m in messages %}<user>{{ m['content'] | trim }}{% endfor %}"
            "{% if add_generation_prompt %}<bot>{% endif %}"
        ),
    )
    target = tiny_target()
    target.formatter = Formatter(made, DataConfig(max_length=8))
    return target


def test_what_the_tokenizer_would_write_otherwise_is_dropped() -> None:
    target = merging_target()
    text = SuffixText(target.formatter, Prompt.of("tea"), "x x b c")
    ids = {name: i for name, i in target.formatter.tokenizer.get_vocab().items()}
    space_x, space = ids["\u0120x"], ids["\u0120"]
    assert text.initial == [space_x, space_x, space, ids["b"], space, ids["c"]]
    assert target.formatter.decode(text.initial) == " x x b c"
    merged = [space_x, space_x, ids["a"], ids["b"], space, ids["c"]]  # "ab" is one token
    ends = [space_x, space_x, space, ids["b"], ids["c"], space]  # the template trims the end
    joins = [ids["b"], *text.initial[1:]]  # "tea" + "b": merges with the prompt's text
    assert text.survivors([text.initial, merged, ends, joins]) == [True, False, True, True]
    assert [text.fits(s) for s in (text.initial, merged, ends, joins)] == [True] + 3 * [False]
    plain = attack().allowed(target).tolist()
    assert ids["\u00e9"] not in plain and ids["<bot>"] not in plain and ids["ab"] in plain
    assert ids["\u00e9"] in attack(ascii=False).allowed(target).tolist()


def test_a_suffix_found_under_merges_is_what_the_text_gives() -> None:
    target, one = merging_target(), attack(initial="x x b c", target="sure", steps=4)
    text = SuffixText(target.formatter, Prompt.of("tea"), "x x b c")
    with frozen(target.model):
        found = one.fit(target, text, one.allowed(target))
    assert 0 < found.kept < found.tried and found.loss < found.curve[0]
    wide = Formatter(target.formatter.tokenizer, DataConfig(max_length=64))
    words = target.formatter.decode(found.ids)
    assert wide.prompt_ids(Prompt.of(f"tea{words}")) == text.whole(found.ids.tolist())


def test_an_initial_suffix_that_is_lost_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"gcg\.initial: 'zebra'"):
        attack(initial="zebra").answers(tiny_target(), prompts(TEXTS[0]))


def test_model_is_left_as_it_was_also_after_an_exception() -> None:
    target = tiny_target()
    target.model.train()
    before = state_of(target.model)
    attack(steps=2).answers(target, prompts(TEXTS[0]))
    assert state_of(target.model) == before
    with failing_head(target.model), pytest.raises(RuntimeError, match="head"):
        attack().answers(target, prompts(TEXTS[0]))
    assert state_of(target.model) == before
