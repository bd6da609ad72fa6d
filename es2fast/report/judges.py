"""What the page says about who judged the answers: several judges side by side, and calibration.

A rate is its judge's opinion. Where several judged, each one's useful rate stands beside the
others', with Cohen's κ of every pair over the same answers; where the deciding judge was calibrated
on answers that people labelled, so do its precision, recall and κ there, with intervals and counts,
and the useful rate without its mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from es2fast.report.schema import AttackResult, Report
from es2fast.report.stats import rate_interval

UNKNOWN = "–"
# name in the calibration, name on the page, what it is
METRICS = (
    ("precision", "precision", "of the answers it calls useful, people agree with"),
    ("recall", "recall", "of the answers people call useful, it finds"),
    ("specificity", "specificity", "of the answers people do not call useful, it agrees with"),
    ("kappa", "Cohen's κ", "agreement with people beyond chance, 1 at most"),
)


@dataclass(frozen=True)
class Judgement:
    """Useful rates of one model under one attack: one cell per judge, then the corrected rate where
    the page has that column, then κ of every pair."""

    attack: str
    model: str
    cells: list[str]


@dataclass(frozen=True)
class Judges:
    """The section: the columns beside attack and model, its rows, and the calibration as (name,
    value with interval, what it is), with a sentence before it ("" without a calibration)."""

    decides: str
    columns: list[str]
    rows: list[Judgement]
    calibrated: str
    calibration: list[tuple[str, str, str]]


def judges_section(report: Report) -> Judges | None:
    """None where one judge, not calibrated, decided alone: its name is among the facts."""
    found = [
        (name, model.name, model.attacks[name])
        for name in report.attack_names
        for model in report.models
        if name in model.attacks
    ]
    names = _keys(attack.judges for *_, attack in found)
    pairs = _keys(attack.kappa for *_, attack in found)
    corrected = any(attack.corrected for *_, attack in found)
    calibration = report.calibration or {}
    if not names and not calibration:
        return None
    first = _keys(list(attack.judges)[:1] for *_, attack in found if attack.judges)
    decides = " or ".join(first) or report.judge
    columns = [f"useful, {name}" for name in names or [decides]]
    columns += ["corrected"] if corrected else []
    columns += [f"κ, {' and '.join(pair.split(' | '))}" for pair in pairs]
    rows = [
        Judgement(attack, model, _cells(result, names, corrected, pairs))
        for attack, model, result in found
    ]
    return Judges(decides, columns, rows, _calibrated(calibration), _metrics(calibration))


def corrected_text(attack: AttackResult) -> str | None:
    """The useful rate without the judge's mistakes, with its interval; None where not known."""
    if attack.corrected is None:
        return None
    return _share(attack.corrected.useful, attack.corrected.interval)


def _keys(parts: Any) -> list[str]:
    """All keys of some mappings, which may be None, in the order in which they come."""
    return list(dict.fromkeys(key for part in parts for key in part or {}))


def _cells(result: AttackResult, names: list[str], corrected: bool, pairs: list[str]) -> list[str]:
    judged = result.judges or {}
    rates = [judged[name].useful if name in judged else None for name in names] or [result.useful]
    cells = [UNKNOWN if r is None else _share(r, rate_interval(r, result.n)) for r in rates]
    if corrected:
        cells.append(corrected_text(result) or UNKNOWN)
    agreement = [(result.kappa or {}).get(pair) for pair in pairs]
    return cells + [UNKNOWN if k is None else f"{k:.2f}" for k in agreement]


def _calibrated(calibration: Mapping[str, Any]) -> str:
    if not calibration:
        return ""
    judge, n = calibration.get("judge", "the judge"), calibration.get("n", "?")
    useful = calibration.get("useful", "?")
    return f"{judge} on {n} answers that people labelled, {useful} of them useful"


def _metrics(calibration: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for key, name, meaning in METRICS:
        part = (calibration.get("metrics") or {}).get(key)
        if not isinstance(part, Mapping):
            continue
        value, ends, n = part.get("value"), part.get("interval"), part.get("n")
        text = UNKNOWN if value is None else f"{value:.3f}"
        text += "" if not ends else f" [{ends[0]:.3f}–{ends[1]:.3f}]"
        found.append((name, text + ("" if n is None else f", n = {n}"), meaning))
    return found


def _share(rate: float, ends: Any) -> str:
    return f"{100 * rate:.1f} % [{100 * ends[0]:.1f}–{100 * ends[1]:.1f}]"
