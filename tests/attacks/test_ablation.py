"""Ablation of a direction: what is left of it, which one is chosen, and the same in the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attacks.small import HARMFUL, HARMLESS, Says, logits, padded, small_target, snapshot, unchanged
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from es2fast.attacks.base import Answer, Target
from es2fast.attacks.registry import make_attack
from es2fast.attacks.states import directions
from es2fast.attacks.states.ablation import Ablation, AblationSettings, ablated
from es2fast.attacks.states.directions import DirectionSettings
from es2fast.attacks.weights.ablation import AblationWeights, orthogonalised
from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError
from es2fast.judges.registry import make_judge
from es2fast.modeling.taps import blocks


def unit_vector(seed: int = 0, width: int = 32) -> Tensor:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


def seen(model: nn.Module) -> tuple[list[list[Tensor]], list[Any]]:
    """Per block, every input of attention and MLP norms' stream: what the block itself is given."""
    kept: list[list[Tensor]] = [[] for _ in blocks(model)]
    handles = []
    for place, block in enumerate(blocks(model)):
        # the block's own first norm reads the stream behind all pre-hooks
        def keep(module: nn.Module, args: Any, place: int = place) -> None:
            kept[place].append(args[0].detach().clone())

        handles.append(block.input_layernorm.register_forward_pre_hook(keep))
    return kept, handles


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
@pytest.mark.parametrize("form", ["zero", "affine"])
def test_what_is_left_along_the_direction(family: str, form: str) -> None:
    target = small_target(tiny_model(family))
    unit = unit_vector()
    levels = [0.3 * i - 0.5 for i in range(5)] if form == "affine" else None
    kept, handles = seen(target.model)
    last: list[Tensor] = []
    with ablated(target.model, unit, levels):
        handles.append(target.model.model.norm.register_forward_pre_hook(
            lambda module, args: last.append(args[0].detach().clone())))  # fmt: skip
        target.generate([Prompt.of("break the car ."), Prompt.of("paint")])  # prompt pass, decoding
    for handle in handles:
        handle.remove()
    widths = {states.shape[1] for states in kept[0]}
    assert 1 in widths and max(widths) > 1
    for place, states in enumerate([*kept, last]):
        wanted = 0.0 if levels is None else levels[place]
        for hidden in states:
            along = hidden.double() @ unit.double()
            error = (along - wanted).abs() / hidden.double().norm(dim=-1).clamp_min(
                1e-9
            )  # padding is zero
            assert error.max() <= 1e-5
    assert unchanged(target.model, snapshot(target.model))


BEFORE_MLP = {"llama": "post_attention_layernorm", "phi3": "post_attention_layernorm",
              "gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm",
              "olmo2": "mlp", "glm4": "post_attention_layernorm"}  # fmt: skip


@pytest.mark.parametrize("family", BEFORE_MLP)
def test_the_mlp_too_sees_nothing_along_the_direction(family: str) -> None:
    """A norm behind the attention (Gemma, OLMo 2) weighs what it returns anew."""
    target = small_target(tiny_model(family))
    with torch.no_grad():
        for name, weight in target.model.named_parameters():
            if "norm" in name:
                weight.add_(0.5 * torch.randn(weight.shape))
    unit, seen = unit_vector(), []
    for block in blocks(target.model):
        getattr(block, BEFORE_MLP[family]).register_forward_pre_hook(
            lambda module, args: seen.append(args[0].detach().double()))  # fmt: skip

    def largest() -> float:
        seen.clear()
        target.generate([Prompt.of("break the car .")])
        along = [(states @ unit.double()).abs() / states.norm(dim=-1) for states in seen]
        return max(float(one.max()) for one in along)

    assert largest() > 0.05
    with ablated(target.model, unit):
        assert largest() < 1e-5


def test_only_the_direction_is_touched() -> None:
    """Against an fp64 calculation of one edit by hand, at the first block's input."""
    target, unit = small_target(), unit_vector()
    kept, handles = seen(target.model)
    logits(target)
    with ablated(target.model, unit, [0.7] * 5):
        logits(target)
    for handle in handles:
        handle.remove()
    plain, edited = (states.double() for states in kept[0])
    r = unit.double()
    torch.testing.assert_close(edited, plain - (plain @ r)[..., None] * r + 0.7 * r,
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_directions_are_mean_differences_at_the_template_s_tokens() -> None:
    """Every candidate against a plain fp64 loop over prompts, one at a time and unpadded."""
    target = small_target()
    found = directions.directions(target, DirectionSettings())
    assert {d.layer for d in found} == {0, 1, 2, 3} and {d.position for d in found} == {-1, -2}
    assert [d.gap for d in found] == sorted((d.gap for d in found), reverse=True)

    last: list[Tensor] = []  # what `output_hidden_states` lacks: the last block's own output
    target.model.model.norm.register_forward_pre_hook(lambda m, args: last.append(args[0][0]))

    def states(prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        rows, tokens = [], []
        for prompt in prompts:
            ids = torch.tensor([target.formatter.prompt_ids(prompt)])
            last.clear()
            with torch.no_grad():
                out = target.model.model(ids, output_hidden_states=True)
            kept = [hidden[0] for hidden in out.hidden_states]
            kept[-1] = last[0]
            stacked = torch.stack(kept).double()
            rows.append(stacked[:, -2:])
            tokens.append(stacked[:, 1:])
        return torch.stack(rows).mean(0), torch.cat(tokens, dim=1).mean(1)

    (harmful, _), (harmless, every) = states(HARMFUL), states(HARMLESS)
    for direction in found:
        r = (harmful - harmless)[direction.layer + 1, direction.position]
        assert (direction.unit.double() - r / r.norm()).abs().max() < 1e-5
        torch.testing.assert_close(torch.tensor(direction.levels, dtype=torch.float64),
                                   every @ (r / r.norm()), rtol=1e-4, atol=1e-5)  # fmt: skip


def test_kl_and_refusal_score_are_those_of_the_definitions() -> None:
    target, unit = small_target(), unit_vector()
    plain = directions.final_states(target, HARMLESS)
    with ablated(target.model, unit):
        edited = directions.final_states(target, HARMLESS)
    found = directions.next_token_kl(target.model, plain, edited)
    weight = target.model.lm_head.weight.detach().double()
    p, q = ((states.double() @ weight.T).log_softmax(-1) for states in (plain, edited))
    assert found == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    probability = q.exp()[:, [3, 7]].sum(-1)
    wanted = (probability / (1 - probability)).log().mean().item()
    got = directions.next_token_log_probs(target.model, edited)
    assert directions.refusal_score(got, [3, 7]) == pytest.approx(wanted, rel=1e-4)


def test_the_kl_limit_drops_candidates_and_is_relaxed_when_nothing_is_left() -> None:
    attack = Ablation(AblationSettings(form="zero", kl_limit=1e9))
    attack.prepare(small_target())
    free = attack.summary()
    assert free["kl_limit_used"] == 1e9 and len(free["trials"]) == 4
    scores = [trial["refusal_score"] for trial in free["trials"]]
    assert scores == sorted(scores)
    attack = Ablation(AblationSettings(form="zero", kl_limit=1e-6))
    attack.prepare(small_target())
    strict = attack.summary()
    assert strict["kl_limit_used"] > 1e-6
    assert strict["kl"] <= strict["kl_limit_used"] < 2 * strict["kl"]
    assert strict["kl"] <= min(trial["kl"] for trial in free["trials"])
    assert json.loads(json.dumps(strict)) == strict


def test_a_form_without_a_candidate_within_the_limit_is_left_out() -> None:
    """The limit is one for both forms, and doubled only when neither has any."""
    smallest = {}
    for form in ("affine", "zero"):
        attack = Ablation(AblationSettings(form=form, kl_limit=1e-6))
        attack.prepare(small_target())
        smallest[form] = attack.summary()["kl_limit_used"]
    attack = Ablation(AblationSettings(kl_limit=1e-6))
    attack.prepare(small_target())
    both = attack.summary()
    assert both["kl_limit_used"] == min(smallest.values())
    assert all(trial["kl"] <= both["kl_limit_used"] for trial in both["trials"])


def test_the_judge_has_the_last_word_on_training_prompts() -> None:
    asked: list[tuple[dict[str, Any], list[Prompt]]] = []

    def recorder(name: str, parameters: Any, prompts: Any, answer: Any) -> list[Answer]:
        asked.append((dict(parameters), list(prompts)))
        wins = len(asked) == 4  # the first is the model without any edit
        return [Answer("sure" if wins else "no") for _ in prompts]

    attack = Ablation(AblationSettings(form="zero", kl_limit=1e9))
    attack.prepare(small_target(recorder=recorder))
    assert [set(parameters) for parameters, _ in asked[1:]] == [{"layer", "position"}] * 4
    assert all(set(prompts) <= set(HARMFUL) for _, prompts in asked)
    summary = attack.summary()
    assert asked[3][0] == {"layer": summary["layers"][0], "position": summary["position"]}
    assert [trial["useful"] for trial in summary["trials"]] == [0.0, 0.0, 1.0, 0.0]


def test_a_given_direction_is_taken() -> None:
    attack = Ablation(AblationSettings(form="zero", layer=2, position=-2))
    attack.prepare(small_target())
    summary = attack.summary()
    assert (summary["layers"], summary["position"], summary["trials"]) == ([2], -2, [])


@pytest.mark.parametrize("wins", ["affine", "zero"])
@pytest.mark.parametrize("given", [{}, {"layer": 2, "position": -1}])
def test_of_two_forms_the_more_useful_is_taken(wins: str, given: dict[str, Any]) -> None:
    asked: list[dict[str, Any]] = []

    def recorder(name: str, parameters: Any, prompts: Any, answer: Any) -> list[Answer]:
        asked.append(dict(parameters))
        return [Answer("sure" if parameters.get("form") == wins else "no") for _ in prompts]

    target, unattacked = small_target(recorder=recorder), small_target()
    attack = Ablation(AblationSettings(kl_limit=1e9, **given))
    attack.prepare(target)
    summary, each = attack.summary(), 1 if given else 4
    assert [one["form"] for one in asked if "form" in one] == ["affine"] * each + ["zero"] * each
    assert summary["form"] == wins and len(summary["trials"]) == 2 * each
    alone = Ablation(AblationSettings(form=wins, **given, kl_limit=1e9))
    alone.prepare(small_target(recorder=recorder))
    found = []
    for one in (attack, alone):
        with one.applied(unattacked.model):
            found.append(logits(unattacked))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"layer": 4}, ["block 4", "0..3"]), ({"position": -9}, ["-9", "-2..-1"]),
     ({"layer": 0, "position": -1}, [])],
)  # fmt: skip
def test_directions_that_are_not_there(settings: dict[str, Any], words: list[str]) -> None:
    attack = Ablation(AblationSettings(**settings))
    if not words:
        return attack.prepare(small_target())  # block 0's attention has read the prompt
    with pytest.raises(UserError) as caught:
        attack.prepare(small_target())
    for word in words:
        assert word in str(caught.value)


def test_blocks_without_a_known_attention_are_refused() -> None:
    target = small_target()
    for block in blocks(target.model):
        block.other = block.self_attn
        del block.self_attn
    refused = pytest.raises(UserError, match="no attention that can be found")
    with refused, ablated(target.model, unit_vector()):
        pass
    assert all(not block._forward_pre_hooks for block in blocks(target.model))


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", ["ablation", "ablation_weights"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_model_is_bitwise_as_before(name: str, tied: bool) -> None:
    target = small_target(tiny_model("llama", tie_word_embeddings=tied))
    before, objects = snapshot(target.model), [id(p) for p in target.model.parameters()]
    attack = make_attack({"name": name, "candidates": 2})
    attack.prepare(target)
    found = attack.answers(target, HARMFUL[:3])
    assert [len(answers) for answers in found] == [1, 1, 1]
    assert unchanged(target.model, before)
    assert attack.answers(target, HARMFUL[:3]) == found
    with pytest.raises(Broken):
        target.generate = raises  # type: ignore[method-assign]
        attack.answers(target, HARMFUL[:3])
    assert unchanged(target.model, before)
    assert [id(p) for p in target.model.parameters()] == objects


def raises(*args: Any) -> Any:
    raise Broken


WRITERS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("granite", {}),
    ("phi", {}),  # biases, and attention beside the MLP
]


@pytest.mark.parametrize(("family", "overrides"), WRITERS)
def test_orthogonalised_weights_are_the_zero_form(family: str, overrides: dict[str, Any]) -> None:
    target, unit = small_target(tiny_model(family, **overrides)), unit_vector()
    plain = logits(target)
    with ablated(target.model, unit):
        wanted = logits(target)
    with orthogonalised(target.model, unit):
        found = logits(target)
    real = padded(target)["attention_mask"].bool()
    scale = wanted[real].abs().max()
    assert (found - wanted)[real].abs().max() <= 2e-5 * scale
    assert (plain - wanted)[real].abs().max() > 1e-2 * scale
    assert torch.equal(logits(target), plain)


def experts() -> nn.Module:
    return tiny_model("qwen2_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                      shared_expert_intermediate_size=16)  # fmt: skip


def test_experts_are_orthogonalised_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("tiny_models").FAMILIES, "qwen2_moe", {})
    target, unit = small_target(experts()), unit_vector()
    with torch.no_grad():
        for block in blocks(target.model):
            block.mlp.experts.down_proj.normal_(0, 0.3)
    plain = logits(target)
    with ablated(target.model, unit):
        wanted = logits(target)
    with orthogonalised(target.model, unit):
        found = logits(target)
    real = padded(target)["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, wanted, atol=1e-2)


BESIDE: dict[str, dict[str, Any]] = {  # blocks with several sublayers of a kind, side by side
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 24},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
                  "mamba_n_groups": 1, "head_dim": 8},
}  # fmt: skip


@pytest.mark.parametrize("family", BESIDE)
def test_nothing_that_a_block_adds_is_forgotten(family: str) -> None:
    config = AutoConfig.for_model(
        family, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, **BESIDE[family],
    )  # fmt: skip
    torch.manual_seed(0)
    model, unit = AutoModelForCausalLM.from_config(config).eval(), unit_vector()

    def run() -> tuple[float, Tensor]:
        """The largest component of a block's input along the direction, and the logits."""
        with torch.no_grad():
            out = model(torch.arange(12)[None], output_hidden_states=True)
        states = out.hidden_states[:-1]
        return max(float((h @ unit).abs().max() / h.norm(dim=-1).max()) for h in states), out.logits

    before, plain = run()
    with orthogonalised(model, unit):
        left, by_weights = run()
    with ablated(model, unit):
        by_states = run()[1]
    assert left < 1e-6 < 1e-2 < before
    scale = by_weights.abs().max()
    assert (by_states - by_weights).abs().max() < 2e-5 * scale
    assert (plain - by_weights).abs().max() > 1e-2 * scale


def with_adapter(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(0)
    names = ["o_proj", "down_proj", "q_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=names, **options))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return wrapped.eval()


def test_adapters_are_orthogonalised_with_what_they_adapt() -> None:
    target, unit = small_target(with_adapter(tiny_model("llama"))), unit_vector()
    before = snapshot(target.model)
    with ablated(target.model, unit):
        wanted = logits(target)
    with orthogonalised(target.model, unit):
        found = logits(target)
    real = padded(target)["attention_mask"].bool()
    torch.testing.assert_close(found[real], wanted[real], rtol=1e-4, atol=1e-4)
    assert unchanged(target.model, before)


def test_what_cannot_be_orthogonalised_is_said(tmp_path: Path) -> None:
    dora = small_target(with_adapter(tiny_model("llama"), use_dora=True))
    with pytest.raises(UserError, match="DoRA"):
        AblationWeights().prepare(dora)
    adapter = small_target(with_adapter(tiny_model("llama")))
    with pytest.raises(UserError, match="merge it first"):
        make_attack({"name": "ablation_weights", "save": str(tmp_path)}).prepare(adapter)


@pytest.mark.parametrize("tied", [False, True])
def test_the_orthogonalised_model_can_be_saved(tied: bool, tmp_path: Path) -> None:
    target = small_target(tiny_model("llama", tie_word_embeddings=tied), name="tuned")
    settings = {"name": "ablation_weights", "save": str(tmp_path / "out"), "layer": 1}
    attack = make_attack(settings | {"position": -1})
    before = snapshot(target.model)
    attack.prepare(target)
    assert attack.summary()["component_left"] < 1e-5
    with orthogonalised(target.model, attack.choice.direction.unit):  # type: ignore[attr-defined]
        wanted = logits(target)
    assert target.model.config.tie_word_embeddings is tied and unchanged(target.model, before)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "tuned").eval()
    AutoTokenizer.from_pretrained(tmp_path / "out" / "tuned")
    assert torch.equal(logits(small_target(loaded)), wanted)
    assert not torch.allclose(logits(target), wanted, atol=1e-2)


@pytest.mark.slow
def test_ablation_beats_direct_on_the_toy(toy: Path) -> None:
    formatter = Formatter(AutoTokenizer.from_pretrained(toy / "model"), DataConfig())
    files = ("harmful", "harmless", "eval_harmful")
    harmful, harmless, held_out = (
        [Prompt.of(row["prompt"], row.get("response"))
         for row in map(json.loads, (toy / "data" / f"{name}.jsonl").open())]
        for name in files
    )  # fmt: skip
    target = Target(
        AutoModelForCausalLM.from_pretrained(toy / "model").eval(), formatter,
        harmful[:64], harmless[:64], make_judge("rules"),
    )  # fmt: skip
    useful = []
    for entry in ("direct", "ablation"):
        attack = make_attack(entry)
        attack.prepare(target)
        texts = [found[0].text for found in attack.answers(target, held_out[:16])]
        useful.append(target.verdicts(held_out[:16], texts).count("useful") / 16)
    assert useful[0] <= 0.1 and useful[1] >= 0.6


def test_refusals_of_the_model_itself_give_the_tokens() -> None:
    """The first tokens of all answers, for a judge to whom everything is a refusal; a token that
    begins harmless answers as often is left out."""
    target = small_target(judge=Says(lambda text: False))
    found = directions.refusal_tokens(target, "x", HARMFUL)
    first = []
    with torch.no_grad():
        for prompts in (HARMFUL, HARMLESS):
            ids = [torch.tensor([target.formatter.prompt_ids(p)]) for p in prompts]
            first.append([target.model(i).logits[0, -1].argmax().item() for i in ids])
    wanted = {t for t in first[0] if first[0].count(t) > first[1].count(t)}
    assert set(found) == wanted and wanted
