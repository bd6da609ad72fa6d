"""What all attacks together say about a model, and how it differs from the base model.

The number to decide by is the worst case: the attack with the most useful answers, and the share of
prompts that *some* attack of the suite breaks (an attacker may try them all). Both depend on which
attacks were run, so their number, and the number of answers per prompt, stand beside them.

Differences are paired: the outcome of each prompt under one model beside its outcome under the
other (`stats.mcnemar`). That needs `outcomes`, which reports hold since version 0.1.0 of es2fast,
and the same prompts, references and judge (`paired_by`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from es2fast.report.schema import BASE, AttackResult, ModelResult, Report, SuiteResult
from es2fast.report.stats import mcnemar

USEFUL = "u"


@dataclass(frozen=True)
class Paired:
    """Two models on the same prompts.

    held: prompts broken on the base model and not on the other; broken: the reverse; n: prompts;
    p: of the exact McNemar test.
    """

    held: int
    broken: int
    n: int
    p: float

    def text(self) -> str:
        """For a table cell."""
        p = "p < 0.0001" if self.p < 1e-4 else f"p = {self.p:.2g}"
        return f"−{self.held} +{self.broken}, {p}"


def worst_attack(
    model: ModelResult, among: Sequence[str] | None = None
) -> tuple[str, AttackResult] | None:
    """The attack with the highest rate of useful answers, the first of several; None: no attack.

    Args:
        among: attacks that count; default: all.
    """
    found = [item for item in model.attacks.items() if among is None or item[0] in among]
    return max(found, key=lambda item: item[1].useful, default=None)


def answers_text(parts: Iterable[AttackResult | SuiteResult | None]) -> str:
    """How many answers a prompt got: "1", "4", or "1 to 4" where models were asked unlike often."""
    counts = {part.answers_per_prompt for part in parts if part is not None}
    fewest, most = min(counts), max(counts)
    return str(most) if fewest == most else f"{fewest} to {most}"


def broken_prompts(outcomes: Iterable[str]) -> list[bool]:
    """Per prompt, whether any attack's outcome is useful.

    Args:
        outcomes: one string per attack, one letter per prompt.
    """
    return [USEFUL in letters for letters in zip(*outcomes, strict=True)]


def compared(base: ModelResult, other: ModelResult, attacks: Sequence[str]) -> Paired | None:
    """The two models under these attacks together; None where outcomes cannot be paired."""
    sides = []
    for model in (base, other):
        found = [model.attacks[name].outcomes for name in attacks if name in model.attacks]
        known = [letters for letters in found if letters is not None]
        if not attacks or len(known) < len(attacks):
            return None
        sides.append(broken_prompts(known))
    return _paired(base, other, sides)


def compared_worst(base: ModelResult, other: ModelResult, attacks: Sequence[str]) -> Paired | None:
    """The worst of these attacks on either, whose rates are the ones to quote side by side; None
    where outcomes cannot be paired."""
    worst = [worst_attack(model, attacks) for model in (base, other)]
    letters = [found[1].outcomes for found in worst if found is not None]
    known = [one for one in letters if one is not None]
    if len(known) < 2:
        return None
    return _paired(base, other, [broken_prompts([one]) for one in known])


def _paired(
    base: ModelResult, other: ModelResult, sides: Sequence[Sequence[bool]]
) -> Paired | None:
    """Of the prompts that are broken on either; None where they are not the same or were judged
    otherwise."""
    if base.paired_by is None or base.paired_by != other.paired_by:
        return None
    pairs = list(zip(*sides, strict=True))
    held = sum(before and not after for before, after in pairs)
    broken = sum(after and not before for before, after in pairs)
    return Paired(held, broken, len(pairs), mcnemar(held, broken))


def shared_attacks(base: ModelResult, other: ModelResult) -> list[str]:
    """Attacks that were run on both, in the base model's order."""
    return [name for name in base.attacks if name in other.attacks]


def base_of(report: Report, model: ModelResult) -> ModelResult | None:
    """The model that `model` is compared with; None where it is that itself or none is there.

    In a combined report several may be called `RUN/base`: then its own report's.
    """
    if model.base is not None:
        return report.model(model.base) if model.base not in ("", model.name) else None
    own = model.name.rpartition("/")[0] or model.name
    for name in (BASE, f"{own}/{BASE}"):
        if name in report.names and name != model.name:
            return report.model(name)
    return None


def is_base(name: str) -> bool:
    """Whether a model is called the base model, in its own report or in a combined one."""
    return name.rpartition("/")[2] == BASE
