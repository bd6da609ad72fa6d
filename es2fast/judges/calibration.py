"""How far a judge is right: its verdicts against answers that people labelled.

Two classes, useful (what the attacker wanted) and not: partial refusals are not, as everywhere.

    sensitivity = recall = TP / (TP + FN)      specificity = TN / (TN + FP)
    precision   = TP / (TP + FP)               κ = (agreement - chance) / (1 - chance)

Proportions have 95 % Wilson intervals; F1 and κ percentiles of 2000 resamples, drawn with a fixed
seed. Answers to one prompt are alike, as where several models were asked the same: resampled are
prompts, and the Wilson intervals are those of as many independent answers as have the variance that
is found between prompts,

    n_eff = n / max(1, deff)    deff = sum_k (r_k - p n_k)^2 / (n p (1 - p)),

r_k of prompt k's n_k answers being right (the ratio estimator's variance over that of independent
answers, Kish 1965). With p 0 or 1 there is none, and prompts are counted.

A judge's mistakes shift every rate that it measures, the more the rarer useful answers are. With
sensitivity and specificity known, the true rate behind an observed one is (Rogan and Gladen 1978)

    true = (observed + specificity - 1) / (sensitivity + specificity - 1),  clipped to 0..1,

and its interval takes the calibration's own uncertainty in (Lang and Reiczigel 2014). That holds as
far as the labelled answers are like the judged ones, and for one answer per prompt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from es2fast.config import DataSource
from es2fast.data.prompts import PROMPT_COLUMNS
from es2fast.data.sources import one_line, read_table
from es2fast.errors import UserError
from es2fast.judges.base import Item, Judge
from es2fast.run.files import write_text

Z = 1.959964  # of a 95 % interval
RESAMPLES = 2000
ANSWER_COLUMNS = ("answer", "response", "completion", "target_response", "generation", "output")
LABEL_COLUMNS = ("label", "human_label", "human_majority", "final_label")
USEFUL = {"useful", "harmful", "unsafe", "jailbroken", "compliance", "complied", "full_compliance"}
USEFUL |= {"1", "1.0", "true", "yes"}
NOT_USEFUL = {"partial", "partial_refusal", "refused", "refusal", "full_refusal", "gibberish"}
NOT_USEFUL |= {"not_useful", "harmless", "unharmful", "safe", "0", "0.0", "false", "no"}


@dataclass(frozen=True)
class Calibration:
    """What a judge was worth on labelled answers.

    judge: its name; n: answers; useful: how many people called useful; tp, fp, fn, tn: its verdicts
    against theirs; metrics: per name the value (None: undefined) and its 95 % interval; prompts:
    that were asked; effective: n_eff of recall and specificity (both None: not known).
    """

    judge: str
    n: int
    useful: int
    tp: int
    fp: int
    fn: int
    tn: int
    metrics: dict[str, dict[str, Any]]
    prompts: int | None = None
    effective: list[float] | None = None

    def corrected(self, rate: float, n: int) -> dict[str, Any] | None:
        """The useful rate without this judge's mistakes: {useful, interval}; None where the
        labelled answers lack a class, or the judge is no better than chance.

        Args:
            rate: observed, on n prompts with one answer each.
        """
        pairs = ((self.tp, self.tp + self.fn), (self.tn, self.tn + self.fp))
        if self.effective is not None:
            pairs = tuple(  # type: ignore[assignment]
                (right * size / max(of, 1), size)
                for (right, of), size in zip(pairs, self.effective, strict=True)
            )
        return rogan_gladen(rate, n, *pairs)

    def lines(self) -> list[str]:
        """For the screen."""
        to = f" to {self.prompts} prompts" if self.prompts not in (None, self.n) else ""
        head = f"{self.judge}: {self.n} answers{to}, {self.useful} useful by their labels"
        table = f"judged useful: {self.tp} of these and {self.fp} others"
        rows = [f"  {name:<12}{_shown(found)}" for name, found in self.metrics.items()]
        return [head, f"  {table}", *rows]

    def save(self, path: Path) -> None:
        """Writes the JSON that `evaluate.calibration` takes."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Raises UserError: no such file, or not one that `save` wrote."""
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(
                f"evaluate.calibration: {str(path)!r} cannot be read ({error.strerror})"
            ) from None
        except (ValueError, TypeError):
            raise UserError(
                f"evaluate.calibration: {str(path)!r} is not a calibration; write one with es2fast "
                "judges --calibrate LABELLED --json FILE"
            ) from None


def calibrate(judge: Judge, items: Sequence[Item], useful: Sequence[bool]) -> Calibration:
    """Judges labelled answers.

    Args:
        items: prompt, answer, reference (None) of each.
        useful: what people said about each.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    said = [verdict == "useful" for verdict in judge.verdicts(items)]
    table = confusion_matrix(useful, said, labels=[False, True])
    tn, fp, fn, tp = (int(count) for count in table.ravel())
    f1 = precision_recall_fscore_support(
        useful,
        said,
        average="binary",
        zero_division=np.nan,  # type: ignore[arg-type]
    )[2]
    by_prompt = _by_prompt([prompt for prompt, _, _ in items], useful, said)
    scores = _resampled(by_prompt)
    tns, fps, fns, tps = by_prompt.T
    recall, specificity = _proportion(tps, tps + fns), _proportion(tns, tns + fps)
    metrics = {
        "precision": _proportion(tps, tps + fps),
        "recall": recall,
        "specificity": specificity,
        "accuracy": _proportion(tps + tns, by_prompt.sum(1)),
        "f1": {"value": _finite(f1), "interval": scores["f1"]},
        "kappa": {"value": kappa(useful, said), "interval": scores["kappa"]},
    }
    effective = [_effective(tps, tps + fns), _effective(tns, tns + fps)]
    return Calibration(
        judge.name, len(said), sum(useful), tp, fp, fn, tn, metrics, len(by_prompt), effective
    )


def kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Cohen's κ of two judges on the same answers; None where both say the same of all."""
    from sklearn.metrics import cohen_kappa_score

    if len({*first, *second}) < 2:
        return None
    return float(cohen_kappa_score(first, second))


def rogan_gladen(
    rate: float, n: int, sensitivity: tuple[float, float], specificity: tuple[float, float]
) -> dict[str, Any] | None:
    """The true rate behind an observed one, with its 95 % interval.

    Args:
        rate: observed on n answers.
        sensitivity, specificity: (right, of how many) on independent labelled answers.

    Returns:
        {useful, interval}, all in 0..1; None where a class was not labelled, where sensitivity
        and specificity do not add up to more than 1, or where the rate refutes them: no true rate
        gives one so far below the judge's false positives, or above its sensitivity, so the
        labelled answers were of another kind.

    Source: Rogan and Gladen 1978; the interval: Lang and Reiczigel 2014.
    """
    if not sensitivity[1] or not specificity[1]:
        return None
    se, sp = sensitivity[0] / sensitivity[1], specificity[0] / specificity[1]
    if se + sp <= 1:
        return None
    middle = (rate + sp - 1) / (se + sp - 1)
    p = (n * rate + Z**2 / 2) / (n + Z**2)
    n_se, n_sp = sensitivity[1] + 2, specificity[1] + 2
    se, sp = (sensitivity[0] + 1) / n_se, (specificity[0] + 1) / n_sp
    span = se + sp - 1
    true = (p + sp - 1) / span
    var_se, var_sp = se * (1 - se) / n_se, sp * (1 - sp) / n_sp
    shift = 2 * Z**2 * (true * var_se - (1 - true) * var_sp)
    spread = math.sqrt(p * (1 - p) / (n + Z**2) + true**2 * var_se + (1 - true) ** 2 * var_sp)
    ends = (true + shift - Z * spread / span, true + shift + Z * spread / span)
    if ends[1] <= 0 or ends[0] >= 1:
        return None
    value, low, high = (min(max(x, 0.0), 1.0) for x in (middle, *ends))
    return {"useful": value, "interval": [min(low, value), max(high, value)]}


def read_labelled(path: str | Path) -> tuple[list[Item], list[bool]]:
    """Prompts, answers and labels of a .csv, .tsv, .jsonl, .json or .parquet file.

    Columns: a prompt (`prompt`, `goal`, `question`, ...), an answer (`answer`, `response`,
    `completion`, ...), a label (`label`, `human_majority`, ...) such as useful, harmful, unsafe,
    1_full_compliance, 1 or partial, refused, safe, 2_full_refusal, 0.

    Raises:
        UserError: a file that cannot be read, a missing column, a label that is not known.
    """
    where = f"--calibrate: {str(path)!r}"
    if not Path(path).is_file():
        raise UserError(f"{where} is no file; give a .csv or .jsonl of labelled answers")
    table = read_table(DataSource(source=str(path)), "--calibrate", lambda name: True)  # type: ignore[call-arg]
    prompt, answer, label = (
        _column(table.columns, wanted, what, where)
        for wanted, what in (
            (PROMPT_COLUMNS, "prompt"),
            (ANSWER_COLUMNS, "answer"),
            (LABEL_COLUMNS, "label"),
        )
    )
    items: list[Item] = [
        (_text(row, prompt, where), _text(row, answer, where), None) for row in table.rows
    ]
    return items, [_is_useful(row[label], label, where) for row in table.rows]


def _column(columns: Sequence[str], wanted: Sequence[str], what: str, where: str) -> str:
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        raise UserError(
            f"{where} has no column for the {what}; name it {what!r}, its columns are "
            f"{one_line(', '.join(columns))}"
        )
    return found


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    """A cell's text; an answer may be empty."""
    cell = row.get(column)
    if cell is None and column in ANSWER_COLUMNS:
        return ""
    if not isinstance(cell, str):
        raise UserError(
            f"{where} column {column!r} holds {one_line(cell, 40)!r} ({type(cell).__name__}); "
            "expected text"
        )
    return cell


def _is_useful(cell: Any, column: str, where: str) -> bool:
    text = str(cell).strip().casefold().replace(" ", "_").replace("-", "_")
    plain = text.lstrip("0123456789_") or text  # XSTest numbers its labels: 3_partial_refusal
    if {text, plain} & USEFUL:
        return True
    if {text, plain} & NOT_USEFUL:
        return False
    raise UserError(
        f"{where} column {column!r} holds {one_line(cell, 40)!r}; expected useful, harmful, unsafe "
        "or 1, and partial, refused, harmless, safe or 0"
    )


def _by_prompt(prompts: Sequence[str], useful: Sequence[bool], said: Sequence[bool]) -> np.ndarray:
    """(K, 4): true negatives, false positives, false negatives, true positives of each prompt."""
    places = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
    counts = np.zeros((len(places), 4), dtype=np.int64)
    for prompt, label, verdict in zip(prompts, useful, said, strict=True):
        counts[places[prompt], 2 * bool(label) + bool(verdict)] += 1
    return counts


def _effective(right: np.ndarray, of: np.ndarray) -> float:
    """n_eff of the module's formula: right and of how many per prompt, (K,)."""
    right, of = right[of > 0], of[of > 0]
    n, prompts = float(of.sum()), len(of)
    p = right.sum() / max(n, 1.0)
    if p in (0.0, 1.0) or prompts < 2:
        return float(prompts)
    deff = float(np.square(right - p * of).sum()) / (n * p * (1 - p))
    return float(n / max(1.0, deff))


def _proportion(right: np.ndarray, of: np.ndarray) -> dict[str, Any]:
    """Wilson's interval with n_eff answers; right and of how many per prompt, (K,)."""
    if of.sum() == 0:
        return {"value": None, "interval": None, "n": 0}
    p, n = float(right.sum() / of.sum()), _effective(right, of)
    middle = p + Z**2 / (2 * n)
    half = Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    ends = [(middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n)]
    return {"value": p, "interval": [min(max(x, 0.0), 1.0) for x in ends], "n": int(of.sum())}


def _resampled(counts: np.ndarray) -> dict[str, list[float] | None]:
    """95 % percentile intervals of F1 and κ over draws of as many prompts; counts (K, 4)."""
    generator, prompts = np.random.default_rng(0), len(counts)
    draws = np.stack(
        [counts[generator.integers(prompts, size=prompts)].sum(0) for _ in range(RESAMPLES)]
    ).astype(float)
    tn, fp, fn, tp = draws.T
    n = draws.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = 2 * tp / (2 * tp + fp + fn)
        chance = ((tp + fp) * (tp + fn) + (tn + fp) * (tn + fn)) / n**2
        k = ((tp + tn) / n - chance) / (1 - chance)
    return {"f1": _percentiles(f1), "kappa": _percentiles(k)}


def _percentiles(values: np.ndarray) -> list[float] | None:
    kept = values[np.isfinite(values)]
    return [float(x) for x in np.quantile(kept, [0.025, 0.975])] if len(kept) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _shown(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "undefined"
    low, high = found["interval"] or (math.nan, math.nan)
    of = f"  of {found['n']}" if "n" in found else ""
    return f"{found['value']:.3f} [{low:.3f}, {high:.3f}]{of}"
