"""What a trial takes over from an earlier one, and what it is judged by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from es2fast.errors import UserError
from es2fast.report.schema import Report
from es2fast.run.folder import RunFolder
from es2fast.tune.trial import LOG, _reason, describe, outcome, take_base


def test_only_what_concerns_the_base_model_is_taken_over(tmp_path: Path) -> None:
    source, target = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    source.measured.mkdir(parents=True)
    target.path.mkdir()
    lines = [{"key": str(i), "model": name} for i, name in enumerate(("base", "tuned", "base"))]
    source.answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("base.direct.json", "tuned.direct.json"):
        (source.measured / name).write_text(name)
    (source.measured / "base").mkdir()
    (source.measured / "base" / "x").write_text("1")
    take_base(source, target)
    found = [json.loads(line) for line in target.answers.read_text().splitlines()]
    assert found == [lines[0], lines[2]]
    assert sorted(path.name for path in target.measured.iterdir()) == ["base", "base.direct.json"]
    assert (target.measured / "base" / "x").read_text() == "1"


def test_the_last_error_of_a_log_is_the_reason(tmp_path: Path) -> None:
    log = tmp_path / LOG
    assert _reason(log) is None
    log.write_text("[rank 1] error: first\nnote: an error: inside\nerror: the one\nlast line\n")
    assert _reason(log) == "the one"


def report(kl: float | None) -> Report:
    def model(name: str, useful: float, refused: float) -> dict:
        attack = {"refused": 0.0, "useful": useful, "gibberish": 0.0, "n": 20,
                  "relative_push": None}  # fmt: skip
        harmless = {"refusal_rate": refused, "intact_rate": None, "kl_to_base": kl, "n": 40,
                    "kl_response": kl}  # fmt: skip
        return {"name": name, "harmless": harmless, "separation": {},
                "attacks": {"direct": attack | {"useful": 0.05}, "prefill": attack}}  # fmt: skip

    return Report.parse({"models": [model("base", 0.9, 0.1), model("tuned", 0.3, 0.2)]})


def test_two_numbers() -> None:
    found = outcome(report(0.01))
    assert (found.worst, found.attack, found.n, found.base_worst) == (0.3, "prefill", 20, 0.9)
    assert found.damage == pytest.approx(2.0)  # ten points of refusals; the KL alone would be 0.5
    with pytest.raises(UserError, match="not finite"):
        outcome(report(None))


def test_parameters_in_a_line() -> None:
    assert (
        describe({"train.lr": 1.23456e-4, "layers": "[1, 2]"}) == "train.lr=0.000123 layers=[1, 2]"
    )
