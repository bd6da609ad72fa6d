"""What `variants` and `trials` of an attack hold, as curves: one number against another.

Both are lists of one entry per choice of parameters. A curve runs over the parameter with the most
different numeric values; where others vary too, the line takes the best entry of each place (an
attacker may choose), and all entries are kept as points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from es2fast.report.schema import AttackResult, Report

MEASURED = frozenset(
    {"useful", "refused", "gibberish", "partial", "relative_push", "n", "kl", "loss", "first_loss"}
    | {"refusal_score"}
)  # what comes out, where everything else is what was varied


@dataclass(frozen=True)
class Curve:
    """One model's line: `points` are (parameter, share of useful answers), ascending in it."""

    model: str
    points: list[tuple[float, float]]
    n: int | None  # prompts per point, where known and the same

    @property
    def best(self) -> list[tuple[float, float]]:
        """The highest point at each place."""
        found: dict[float, float] = {}
        for x, y in self.points:
            found[x] = max(y, found.get(x, 0.0))
        return sorted(found.items())


@dataclass(frozen=True)
class CurvePanel:
    """Curves of all models under one attack, over the same parameter."""

    attack: str
    kind: str  # "variants" (held-out prompts) or "trials" (training prompts)
    parameter: str
    curves: list[Curve]


def curve_panels(report: Report) -> list[CurvePanel]:
    """All curves that have at least two places, by attack; variants before trials."""
    panels = []
    for attack in report.attack_names:
        for kind in ("variants", "trials"):
            entries = {
                model.name: _entries(model.attacks[attack], kind)
                for model in report.models
                if attack in model.attacks
            }
            parameter = _parameter([entry for rows in entries.values() for entry in rows])
            if parameter is None:
                continue
            curves = [_curve(name, rows, parameter) for name, rows in entries.items()]
            curves = [curve for curve in curves if len(curve.best) > 1]
            if curves:
                panels.append(CurvePanel(attack, kind, parameter, curves))
    return panels


def _entries(attack: AttackResult, kind: str) -> list[dict[str, Any]]:
    """Parameters and results side by side; entries without a share of useful answers are left."""
    raw = (attack.variants if kind == "variants" else attack.trials) or []
    flat = [{**one, **one.get("parameters", {})} for one in raw]
    return [one for one in flat if _number(one.get("useful"))]


def _parameter(entries: Sequence[Mapping[str, Any]]) -> str | None:
    """The name with the most different numbers, at least two; the first of several."""
    values: defaultdict[str, set[float]] = defaultdict(set)
    for entry in entries:
        for name, value in entry.items():
            if name not in MEASURED and _number(value):
                values[name].add(value)
    chosen = max(values, key=lambda name: len(values[name]), default=None)
    return chosen if chosen is not None and len(values[chosen]) > 1 else None


def _curve(model: str, entries: Sequence[Mapping[str, Any]], parameter: str) -> Curve:
    kept = [entry for entry in entries if _number(entry.get(parameter))]
    counts = {entry.get("n") for entry in kept}
    n = counts.pop() if len(counts) == 1 else None
    points = sorted((float(entry[parameter]), float(entry["useful"])) for entry in kept)
    return Curve(model, points, n if isinstance(n, int) else None)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
