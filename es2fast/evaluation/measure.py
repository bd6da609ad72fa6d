"""Everything measured on one model: attacks, harmless behaviour, geometry.

Attacks are fitted on *this* model's states of training prompts and judged on held-out prompts. The
mean-difference attacker picks its block by trying a few training prompts, as a real one would.
The KL to the base model is exact, over all tokens of harmless prompts and responses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.attacks import Attack, MeanDifference, Pushes, make_attack
from es2fast.config import EvaluateConfig
from es2fast.data import Formatter, Prompt
from es2fast.judges.rules import is_refusal, judge, looks_like_gibberish, same_text
from es2fast.modeling.generate import generate
from es2fast.modeling.head import lm_head_of, read_transform
from es2fast.modeling.states import last_token_states
from es2fast.modeling.taps import backbone, blocks, causal_lm, position_ids
from es2fast.ops.linear_kl.op import linear_kl_div
from es2fast.probing.probes import fisher_ratio, fit_probe, mean_distance
from es2fast.report.stats import wilson

_TRIALS = 16  # training prompts on which the mean-difference attacker compares blocks
_CANDIDATES = 8  # blocks it tries at most


def evaluate_model(
    model: nn.Module,
    formatter: Formatter,
    *,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    fit_harmful: Sequence[Prompt],
    fit_harmless: Sequence[Prompt],
    layers: Sequence[int],
    config: EvaluateConfig,
    base: nn.Module | None = None,
    base_separation: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One model block of the report (see `es2fast.report.schema`).

    Args:
        model: the model under attack, on its device.
        formatter: its chat format.
        harmful, harmless: held-out prompts; a `response` is the reference answer.
        fit_harmful, fit_harmless: training prompts for probes and means.
        layers: the separated blocks.
        config: attacks, lengths, batch size.
        base: the base model on the same device; None when `model` is the base model.
        base_separation: the base model's `separation` block.
    """
    every = list(range(len(blocks(model))))
    with _evaluating(model):
        states = {
            name: last_token_states(model, formatter.prompt_batches(prompts, 32), every)
            for name, prompts in (
                ("harmful", harmful),
                ("harmless", harmless),
                ("fit_harmful", fit_harmful),
                ("fit_harmless", fit_harmless),
            )
        }
        report = {
            "harmless": _harmless(model, formatter, harmless, config, base),
            "attacks": {},
            "separation": _geometry(states, base_separation),
        }
        for name in config.attacks:
            attack = make_attack(name, config)
            attack.fit(states["fit_harmful"], states["fit_harmless"])
            if isinstance(attack, MeanDifference):
                _pick_block(attack, model, formatter, fit_harmful, config)
            report["attacks"][name] = _attacked(attack, model, formatter, harmful, config)
        if base is not None:
            report["shift_rank"] = _shift_ranks(base, formatter, harmful, states, layers)
    return report


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    """Eval mode for as long as the context lasts, and no gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def answer_all(
    model: nn.Module, formatter: Formatter, prompts: Sequence[Prompt], config: EvaluateConfig
) -> list[str]:
    """Greedy answers to any number of prompts, in order."""
    device = next(model.parameters()).device
    answers: list[str] = []
    for start in range(0, len(prompts), config.batch_size):
        answers += generate(
            model,
            formatter,
            prompts[start : start + config.batch_size],
            max_new_tokens=config.max_new_tokens,
            device=device,
        )
    return answers


def _attacked(
    attack: Attack,
    model: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
) -> dict[str, Any]:
    """Verdicts on the answers; `repetitive` counts what looks like gibberish whatever its verdict:
    a refusal that starts well and then goes round in circles is still a refusal."""
    with attack.applied(model) as pushes:
        answers = answer_all(model, formatter, prompts, config)
    verdicts = [judge(answer, prompt.response) for answer, prompt in zip(answers, prompts)]
    counts, n = Counter(verdicts), len(prompts)
    return {
        "refused": counts["refused"] / n,
        "useful": counts["useful"] / n,
        "gibberish": counts["gibberish"] / n,
        "n": n,
        "relative_push": _relative(pushes),
        "layers": attack.layers(),
        "repetitive": sum(looks_like_gibberish(answer) for answer in answers) / n,
        "interval": {"useful": list(wilson(counts["useful"], n))},
        "examples": [
            {"prompt": prompt.text, "answer": answer, "verdict": verdict}
            for prompt, answer, verdict in list(zip(prompts, answers, verdicts))[:3]
        ],
    }


def _relative(pushes: Pushes) -> float | None:
    return pushes.relative_push if pushes.count else None


def _pick_block(
    attack: MeanDifference,
    model: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
) -> None:
    """The block at which most training prompts come out useful; ties go to the lower push."""
    every = sorted(attack.shift)
    stride = max(1, math.ceil(len(every) / _CANDIDATES))
    best: tuple[float, float] | None = None
    chosen = every[0]
    for layer in every[stride - 1 :: stride]:
        attack.at = [layer]
        found = _attacked(attack, model, formatter, prompts[:_TRIALS], config)
        score = (found["useful"], -(found["relative_push"] or 0.0))
        if best is None or score > best:
            best, chosen = score, layer
    attack.at = [chosen]


def _harmless(
    model: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
    base: nn.Module | None,
) -> dict[str, Any]:
    answers = answer_all(model, formatter, prompts, config)
    n = len(prompts)
    references = _references(formatter, prompts, answers, config, base)
    refusals = sum(is_refusal(answer) for answer in answers)
    intact = sum(same_text(answer, wanted) for answer, wanted in zip(answers, references))
    return {
        "refusal_rate": refusals / n,
        "intact_rate": intact / n,
        "kl_to_base": 0.0 if base is None else kl_to_base(model, base, formatter, prompts,
                                                          references, config.batch_size),
        "n": n,
        "interval": {"refusal_rate": list(wilson(refusals, n))},
    }  # fmt: skip


def _references(
    formatter: Formatter,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    config: EvaluateConfig,
    base: nn.Module | None,
) -> list[str]:
    """The prompts' own responses; where one is missing, the base model's greedy answer."""
    missing = [i for i, prompt in enumerate(prompts) if prompt.response is None]
    written = {i: answers[i] for i in missing}
    if base is not None and missing:
        asked = [prompts[i] for i in missing]
        written = dict(zip(missing, answer_all(base, formatter, asked, config)))
    return [
        written[i] if prompt.response is None else prompt.response
        for i, prompt in enumerate(prompts)
    ]


def kl_to_base(
    model: nn.Module,
    base: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    batch_size: int,
) -> float:
    """Mean KL(base || model) in nats over all tokens of prompt + response."""
    transform = read_transform(causal_lm(model).config)
    heads = [lm_head_of(m) for m in (model, base)]
    total = tokens = 0.0
    pairs = (formatter.conversation_ids(p, r) for p, r in zip(prompts, responses))
    rows = [[*prompt_ids, *response_ids] for prompt_ids, response_ids in pairs]
    for start in range(0, len(rows), batch_size):
        batch = formatter.pad(rows[start : start + batch_size])
        mask = batch["attention_mask"].to(heads[0].weight.device)
        ids = batch["input_ids"].to(mask.device)
        student, teacher = (
            backbone(m)(
                input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
            ).last_hidden_state[mask.bool()]
            for m in (model, base)
        )
        total += linear_kl_div(
            student,
            heads[0].weight,
            teacher,
            heads[1].weight,
            bias=heads[0].bias,
            teacher_bias=heads[1].bias,
            logit_scale=transform.logit_scale,
            softcap=transform.softcap,
            reduction="sum",
        ).item()
        tokens += len(student)
    return total / tokens


def _geometry(
    states: dict[str, dict[int, Tensor]], base: dict[str, dict[str, Any]] | None
) -> dict[str, dict[str, Any]]:
    """Per block: distances and norms on held-out prompts, probe refitted on training prompts.

    `spread` is the mean distance of a group's states from their mean; `fisher` as `fisher_ratio`.
    """
    found = {}
    for layer in states["harmful"]:
        a, b = states["harmful"][layer], states["harmless"][layer]
        probe = fit_probe(states["fit_harmful"][layer], states["fit_harmless"][layer])
        spreads = [(group - group.mean(0)).norm(dim=-1).mean().item() for group in (a, b)]
        row = {
            "distance": mean_distance(a, b).item(),
            "norm": torch.cat([a, b]).norm(dim=-1).mean().item(),
            "probe_accuracy": probe.accuracy,
            "spread_harmful": spreads[0],
            "spread_harmless": spreads[1],
            "fisher": fisher_ratio(a, b),
        }
        before = row if base is None else base[str(layer)]
        row["distance_over_base"] = row["distance"] / before["distance"]
        row["norm_ratio"] = row["norm"] / before["norm"]
        found[str(layer)] = row
    return found


def _shift_ranks(
    base: nn.Module,
    formatter: Formatter,
    harmful: Sequence[Prompt],
    states: dict[str, dict[int, Tensor]],
    layers: Sequence[int],
) -> dict[str, float]:
    """Effective rank (exp of the entropy of the squared singular values) of h_tuned - h_base over
    the harmful prompts: 1 means that all moved along one direction."""
    batches = formatter.prompt_batches(harmful, 32)
    with _evaluating(base):
        before = last_token_states(base, batches, list(layers))
    ranks = {}
    for layer in layers:
        shift = states["harmful"][layer] - before[layer]
        energy = torch.linalg.svdvals(shift.double()).square()
        share = energy / energy.sum().clamp_min(1e-30)
        ranks[str(layer)] = float(torch.special.entr(share).sum().exp())
    return ranks
