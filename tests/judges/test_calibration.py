"""How far a judge is right, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from es2fast.errors import UserError
from es2fast.judges.calibration import (
    Calibration,
    _proportion,
    calibrate,
    kappa,
    read_labelled,
    rogan_gladen,
)
from es2fast.judges.rules import RulesJudge
from es2fast.report.stats import wilson

ROOT = Path(__file__).resolve().parents[2]
READABLE = "first [step one], then [step two]."
# By the rules: useful where readable. tp 3, fn 1, fp 2, tn 4.
ROWS = [
    *[(READABLE, "useful")] * 3,
    ("I cannot help with that.", "1"),
    (READABLE, "refused"),
    (READABLE, "3_partial_refusal"),
    *[("I'm sorry, but no.", "0")] * 3,
    ("ThePromote" * 12, "gibberish"),
]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    lines = ["goal,response,label", *(f'p{i},"{a}",{label}' for i, (a, label) in enumerate(ROWS))]
    path = tmp_path / "labelled.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_numbers_by_hand(labelled: Path, tmp_path: Path) -> None:
    found = calibrate(RulesJudge(), *read_labelled(labelled))
    assert (found.tp, found.fn, found.fp, found.tn) == (3, 1, 2, 4)
    assert (found.n, found.useful) == (10, 4)
    values = {name: metric["value"] for name, metric in found.metrics.items()}
    chance = (5 * 4 + 5 * 6) / 100
    assert values == {
        "precision": pytest.approx(3 / 5),
        "recall": pytest.approx(3 / 4),
        "specificity": pytest.approx(4 / 6),
        "accuracy": pytest.approx(7 / 10),
        "f1": pytest.approx(2 * 3 / (2 * 3 + 2 + 1)),
        "kappa": pytest.approx((0.7 - chance) / (1 - chance)),
    }
    # Wilson by its formula: 3 of 5
    z, p, n = 1.959964, 3 / 5, 5
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    wanted = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert found.metrics["precision"]["interval"] == pytest.approx(wanted, abs=1e-5)
    assert found.metrics["precision"]["n"] == 5
    for name in ("f1", "kappa"):
        low, high = found.metrics[name]["interval"]
        assert low < values[name] < high
    found.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == found
    assert any("recall" in line and "of 4" in line for line in found.lines())


def test_answers_to_one_prompt_count_for_less(labelled: Path, tmp_path: Path) -> None:
    items, useful = read_labelled(labelled)
    once = calibrate(RulesJudge(), items, useful)
    thrice = calibrate(RulesJudge(), [*items] * 3, [*useful] * 3)
    apart = [(f"{prompt} {i}", answer, None) for i in range(3) for prompt, answer, _ in items]
    alone = calibrate(RulesJudge(), apart, [*useful] * 3)
    assert (once.n, once.prompts) == (10, 10) and (thrice.n, thrice.prompts) == (30, 10)
    assert thrice.lines()[0].startswith("rules: 30 answers to 10 prompts, 12 useful")
    assert once.effective == [4.0, 6.0] and alone.effective == [12.0, 18.0]
    assert thrice.effective == pytest.approx(once.effective)  # the same answer thrice is one
    for name in ("precision", "recall", "specificity", "accuracy", "f1", "kappa"):
        wide, narrow = (np.diff(one.metrics[name]["interval"])[0] for one in (thrice, alone))
        assert wide > 1.3 * narrow, name
    wide, narrow = (np.diff(one.corrected(0.5, 100)["interval"])[0] for one in (thrice, alone))
    assert wide > narrow
    thrice.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json") == thrice
    old = (tmp_path / "c.json").read_text().partition(',\n "prompts"')[0] + "}"
    (tmp_path / "old.json").write_text(old)
    before = Calibration.load(tmp_path / "old.json")
    assert before.corrected(0.5, 100) == alone.corrected(0.5, 100)


def test_the_effective_number_covers_the_truth() -> None:
    """Prompts of five answers each, right with a probability that is the prompt's own."""
    noise, hits, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        chance = noise.beta(1.2, 0.8, size=80)  # mean 0.6
        right, of = noise.binomial(5, chance), np.full(80, 5)
        low, high = _proportion(right, of)["interval"]
        hits += low < 0.6 < high
        low, high = wilson(int(right.sum()), 400)
        naive += low < 0.6 < high
    assert 0.92 < hits / 400 < 0.98 and naive / 400 < 0.85


def test_undefined_numbers(labelled: Path) -> None:
    items, _ = read_labelled(labelled)
    found = calibrate(RulesJudge(), items[3:4], [False])
    assert found.metrics["precision"]["value"] is found.metrics["recall"]["value"] is None
    assert found.metrics["kappa"] == {"value": None, "interval": None}
    assert found.metrics["f1"]["value"] is None
    assert found.corrected(0.5, 10) is None
    assert any("undefined" in line for line in found.lines())


def test_kappa_of_two_judges() -> None:
    assert kappa([True, True, False, False], [True, False, False, False]) == pytest.approx(0.5)
    assert kappa([True, False], [True, False]) == 1.0
    assert kappa([True, True], [True, True]) is None


def test_rogan_gladen_by_hand() -> None:
    found = rogan_gladen(0.3, 100, (80, 100), (90, 100))
    assert found is not None
    assert found["useful"] == pytest.approx((0.3 + 0.9 - 1) / (0.8 + 0.9 - 1))
    assert found["interval"][0] < found["useful"] < found["interval"][1]
    assert rogan_gladen(0.05, 100, (80, 100), (90, 100))["useful"] == 0.0  # clipped
    assert rogan_gladen(0.9, 100, (80, 100), (90, 100))["useful"] == 1.0
    assert rogan_gladen(0.5, 100, (5, 10), (5, 10)) is None  # no better than chance
    assert rogan_gladen(0.05, 100, (80, 100), (90, 100))["interval"][1] > 0.02
    exact = rogan_gladen(0.3, 100, (10**7, 10**7), (10**7, 10**7))
    assert exact["useful"] == pytest.approx(0.3) and exact["interval"][0] > 0.2


@pytest.mark.parametrize("n", [50, 500])
def test_a_rate_that_refutes_the_calibration_is_not_corrected(n: int) -> None:
    """Of answers that are not useful this judge calls 47 % so: no model gives it 4 %; and to one
    that is right about 26 of 50 useful ones none gives 100 %."""
    measured = Calibration.load(ROOT / "bench/results/rules_calibration.json")
    assert measured.corrected(0.04, n) is None and measured.corrected(0.5, n) is not None
    assert rogan_gladen(1.0, n, (26, 50), (48, 50)) is None


def test_the_interval_covers_the_truth() -> None:
    """95 % nominal; 2000 draws leave ±1 %."""
    rng, true, se, sp, inside = np.random.default_rng(0), 0.15, 0.9, 0.85, 0
    observed = rng.binomial(100, true * se + (1 - true) * (1 - sp), 2000) / 100
    right = zip(rng.binomial(60, se, 2000), rng.binomial(80, sp, 2000))
    for rate, (a, b) in zip(observed, right):
        found = rogan_gladen(float(rate), 100, (int(a), 60), (int(b), 80))
        inside += found["interval"][0] <= true <= found["interval"][1]
    assert 0.93 <= inside / 2000 <= 0.99


def test_jsonl_and_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"prompt": "p", "completion": "a", "human_majority": true}\n'
        '{"prompt": "p", "completion": null, "human_majority": false}\n'
    )
    assert read_labelled(path) == ([("p", "a", None), ("p", "", None)], [True, False])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,answer\np,a\n", "no column for the label"),
        ("answer,label\na,1\n", "no column for the prompt"),
        ("prompt,label\na,1\n", "no column for the answer"),
        ("prompt,answer,label\np,a,perhaps\n", "column 'label' holds 'perhaps'"),
    ],
)
def test_mistakes_in_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="--calibrate: ") as caught:
        read_labelled(path)
    assert words in str(caught.value)
    with pytest.raises(UserError, match="is no file"):
        read_labelled(tmp_path / "absent.csv")
    with pytest.raises(UserError, match=r"evaluate\.calibration: .*is not a calibration"):
        Calibration.load(path)
