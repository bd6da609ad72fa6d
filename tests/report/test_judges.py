"""Who judged: several judges, how far they agree, and calibration, on the page."""

from __future__ import annotations

import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from es2fast.judges.calibration import calibrate
from es2fast.judges.rules import RulesJudge
from es2fast.report.bars import bar_groups, cards
from es2fast.report.html import write_page
from es2fast.report.judges import judges_section
from es2fast.report.schema import Report

LABELLED = [
    (f"p{i}", text, None) for i, text in enumerate(["first [step one].", "I cannot help."] * 20)
]


def attack(useful: float, **more: Any) -> dict[str, Any]:
    rates = {"refused": 1 - useful, "useful": useful, "gibberish": 0.0, "n": 100}
    return {**rates, "relative_push": None, **more}


def rates(useful: float) -> dict[str, float]:
    return {"refused": 1 - useful, "partial": 0.0, "useful": useful, "gibberish": 0.0}


@pytest.fixture
def raw() -> dict[str, Any]:
    judged = {"rules": rates(0.4), "<b>hf:judge": rates(0.3)}
    pair = "rules | <b>hf:judge"
    harmless = {"refusal_rate": 0.0, "intact_rate": None, "kl_to_base": 0.0, "n": 10}
    attacks = {
        "direct": attack(0.4, judges=judged, kappa={pair: 0.721},
                         corrected={"useful": 0.45, "interval": [0.3, 0.6]}),
        "many": attack(0.1, judges=judged | {"rules": rates(0.1)}, kappa={pair: None}),
    }  # fmt: skip
    found = calibrate(
        RulesJudge(), [*LABELLED, ("p", "I cannot.", None)], [True, False] * 20 + [True]
    )
    return {
        "models": [{"name": "base", "harmless": harmless, "attacks": attacks, "separation": {}}],
        "judge": "rules, <b>hf:judge",
        "calibration": asdict(found),
    }


class Cells(HTMLParser):
    """The tables of a page: rows of stripped texts."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._open = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._open = True

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._open:
            self.tables[-1][-1][-1] += data.strip()


def tables(path: Path, raw: dict[str, Any]) -> list[list[list[str]]]:
    write_page(path, Report.parse(raw))
    parser = Cells()
    parser.feed(path.read_text())
    return parser.tables


def test_the_page_shows_judges_agreement_and_calibration(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    judges, calibration, *_ = tables(tmp_path / "page.html", raw)
    assert judges[0] == ["", "useful, rules", "useful, <b>hf:judge", "corrected",
                         "κ, rules and <b>hf:judge"]  # fmt: skip
    assert judges[1][0] == "attack direct"
    assert judges[2] == ["base", "40.0 % [30.9–49.8]", "30.0 % [21.9–39.6]",
                         "45.0 % [30.0–60.0]", "0.72"]  # fmt: skip
    assert judges[4][3:] == ["–", "–"]
    page = (tmp_path / "page.html").read_text()
    assert "<b>" not in page and "rules on 41 answers that people labelled, 21 of them" in page
    shown = {row[0]: row[1] for row in calibration}
    # 20 of the 21 useful ones are found, by Wilson 0.773 to 0.992; nothing else is called useful
    assert shown["recall"] == "0.952 [0.773–0.992], n = 21"
    assert shown["precision"].startswith("1.000 [0.839–1.000], n = 20")
    assert re.fullmatch(r"0\.951 \[0\.\d+–1\.000\]", shown["Cohen's κ"])


def test_the_corrected_rate_stands_beside_the_rate(raw: dict[str, Any]) -> None:
    report = Report.parse(raw)
    direct, many = bar_groups(report)
    words = "corrected 45.0 % [30.0–60.0] useful"
    assert direct.bars[0].details.startswith(words) and "corrected" not in many.bars[0].details
    (card,) = cards(report)
    assert card.headline[0] == "40 %" and card.lines[0][0] == "45.0 % [30.0–60.0]"


def test_one_judge_without_calibration_needs_no_section(
    tmp_path: Path, raw: dict[str, Any]
) -> None:
    del raw["calibration"]
    for one in raw["models"][0]["attacks"].values():
        del one["judges"], one["kappa"]
    assert judges_section(Report.parse(raw)) is None
    tables(tmp_path / "page.html", raw)
    assert "<h2>Judges" not in (tmp_path / "page.html").read_text()


def test_a_calibration_alone(raw: dict[str, Any]) -> None:
    for one in raw["models"][0]["attacks"].values():
        del one["judges"], one["kappa"]
    raw["judge"] = "rules"
    found = judges_section(Report.parse(raw))
    assert found is not None and found.decides == "rules"
    assert found.columns == ["useful, rules", "corrected"]
    assert found.rows[0].cells == ["40.0 % [30.9–49.8]", "45.0 % [30.0–60.0]"]


def test_attacks_that_only_some_judges_saw(raw: dict[str, Any]) -> None:
    del raw["models"][0]["attacks"]["many"]["judges"]["<b>hf:judge"]
    raw["calibration"] = {}
    found = judges_section(Report.parse(raw))
    assert found is not None and found.rows[1].cells[:2] == ["10.0 % [5.5–17.4]", "–"]
    assert found.calibrated == "" and found.calibration == []
