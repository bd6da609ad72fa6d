"""What the page draws itself: bars of outcomes per attack, and a card per model.

Bars are plain elements of the page and no picture, so their text keeps its size on a phone. A bar
starts with the useful part, which carries the interval; the refused part is hatched as far as its
answers go round in circles or are no text. Where a report only knows the share of all answers that
do so, whatever their verdict, that share is a thin bar of its own below.
"""

from __future__ import annotations

from dataclasses import dataclass

from es2fast.report.judges import corrected_text
from es2fast.report.schema import AttackResult, ModelResult, Report
from es2fast.report.stats import rate_interval
from es2fast.report.suite import (
    answers_text,
    base_of,
    compared,
    is_base,
    shared_attacks,
    worst_attack,
)


@dataclass(frozen=True)
class Bar:
    """One model under one attack; widths in per cent of the prompts.

    segments: (outcome, width) from the left; interval: left end and width of the Wilson interval of
    `useful`; loops: width of the thin bar, None where there is none.
    """

    model: str
    segments: list[tuple[str, float]]
    interval: tuple[float, float]
    useful: str
    details: str
    loops: float | None = None


@dataclass(frozen=True)
class BarGroup:
    """All models under one attack; a model on which it was not run has no bar."""

    attack: str
    note: str
    bars: list[Bar]
    missing: list[str]


@dataclass(frozen=True)
class Card:
    """The few numbers to decide by, as (value, what it is)."""

    model: str
    headline: tuple[str, str]
    lines: list[tuple[str, str]]


def bar_groups(report: Report) -> list[BarGroup]:
    """All attacks, the one with the most useful answers on a model that is no base first."""
    groups = []
    for name in report.attack_names:
        found = [(model.name, model.attacks.get(name)) for model in report.models]
        asked = answers_text(attack for _, attack in found)
        note = "1 answer per prompt" if asked == "1" else f"useful if any of {asked} answers is"
        bars = [_bar(model, attack) for model, attack in found if attack]
        missing = [model for model, attack in found if not attack]
        groups.append(BarGroup(name, note, bars, missing))
    worst = {group.attack: _worst_useful(report, group.attack) for group in groups}
    return sorted(groups, key=lambda group: -worst[group.attack])


def cards(report: Report) -> list[Card]:
    """One card per model, in their order."""
    return [_card(report, model) for model in report.models]


def _worst_useful(report: Report, attack: str) -> float:
    others = [model for model in report.models if base_of(report, model)] or report.models
    found = [model.attacks[attack].useful for model in others if attack in model.attacks]
    return max(found, default=0.0)


def _bar(model: str, attack: AttackResult) -> Bar:
    loops = attack.refused_repetitive
    parts = {
        "useful": attack.useful,
        "partial": attack.partial,  # a refusal in every rate
        "gibberish": attack.gibberish,
        "looping": loops or 0.0,
        "refused": max(0.0, attack.refused - attack.partial - (loops or 0.0)),
    }
    low, high = rate_interval(attack.useful, attack.n)
    known = [("refused", attack.refused), ("partial", parts["partial"]),
             ("gibberish", attack.gibberish)]  # fmt: skip
    details = [f"{_percent(rate)} {name}" for name, rate in known if rate]
    corrected = corrected_text(attack)
    if corrected:
        details.insert(0, f"corrected {corrected} useful")
    if loops:
        details.insert(1 + bool(corrected), f"{_percent(loops)} refused in a loop")
    thin = attack.repetitive if loops is None else None
    if thin:
        details.append(f"{_percent(thin)} of the answers in a loop")
    return Bar(
        model,
        [(name, round(100 * rate, 3)) for name, rate in parts.items() if rate > 0],
        (round(100 * low, 3), round(100 * (high - low), 3)),
        f"{_percent(attack.useful)} useful {_interval(attack.useful, attack.n)}, n = {attack.n}",
        ", ".join(details),
        round(100 * thin, 3) if thin else None,
    )


def _card(report: Report, model: ModelResult) -> Card:
    worst = worst_attack(model)
    headline = ("–", "no attack was run")
    lines = []
    if worst:
        name, attack = worst
        which = f"the worst of {len(model.attacks)} attacks, {name}"
        if not attack.useful:
            which = f"each of {len(model.attacks)} attacks"
        headline = (
            _percent(attack.useful),
            f"useful under {which} {_interval(attack.useful, attack.n)}, n = {attack.n}",
        )
        corrected = corrected_text(attack)
        if corrected:
            lines.append((corrected, "useful there, corrected for the judge's mistakes"))
    suite = model.worst_of_suite
    if suite:
        lines.append(
            (
                f"{_percent(suite.useful)} {_interval(suite.useful, suite.n)}",
                f"of the prompts broken by any of {suite.attacks} attacks "
                f"({suite.answers_per_prompt} answers per prompt)",
            )
        )
    base = base_of(report, model)
    paired = compared(base, model, shared_attacks(base, model)) if base else None
    if paired:
        lines.append((paired.text(), "prompts broken on the base model only, on this one only"))
    harmless = model.harmless
    lines.append(
        (
            f"{_percent(harmless.refusal_rate)} {_interval(harmless.refusal_rate, harmless.n)}",
            f"of {harmless.n} harmless prompts refused",
        )
    )
    if not is_base(model.name):
        if harmless.kl_response is not None:
            lines.append((f"{harmless.kl_response:.4f}", "nats per response token, KL to the base"))
        elif harmless.kl_to_base is not None:
            lines.append((f"{harmless.kl_to_base:.4f}", "nats/token, KL to the base model"))
    return Card(model.name, headline, lines)


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"


def _interval(rate: float, n: int) -> str:
    low, high = rate_interval(rate, n)
    return f"[{100 * low:.0f}–{100 * high:.0f}]"
