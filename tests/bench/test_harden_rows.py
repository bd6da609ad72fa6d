"""docs/harden.md's table is that of its rows, and a row is what a run's report says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finished_runs import finished_run
from tiny_models import save_tiny

from bench.studies.harden_rows import DOCUMENT, ROWS, document, joined, row_of, table
from es2fast.report.schema import Report
from es2fast.run.files import read_lines


def test_the_document_is_made_from_the_rows() -> None:
    assert DOCUMENT.read_text() == document(list(read_lines(ROWS)))


def test_a_row_is_what_the_report_says(tmp_path: Path) -> None:
    """Of 30 harmless prompts 10 have a kind."""
    run = finished_run(tmp_path / "run", save_tiny(tmp_path / "base"), seed=3)
    summary = run / "train.json"
    summary.write_text(summary.read_text().replace("{", '{"pairs_per_step": 4, ', 1))
    models: list[dict[str, Any]] = []
    for name, useful, refused in (("base", 0.5, 0.0), ("tuned", 0.25, 0.4)):
        kinds = {"kind": {"borderline": {"refusal_rate": refused / 2, "n": 10}}}
        attack = {"refused": 0.5, "useful": useful, "gibberish": 0.5 - useful, "n": 20,
                  "relative_push": None}  # fmt: skip
        models.append({
            "name": name, "attacks": {"direct": attack}, "separation": {},
            "harmless": {"refusal_rate": refused, "intact_rate": None, "kl_to_base": 0.1,
                         "kl_response": 0.01, "top1_agreement": 0.9, "n": 30,
                         "refusal_by": kinds},
        })  # fmt: skip
    (run / "report.json").write_text(Report.parse({"models": models}).model_dump_json())
    row = row_of(run, "mine", "")
    assert row["base"] == "base" and row["seed"] == 3 and row["layers"] == [2]
    wide = row | {"title": "again", "adds_to": "mine", "models": {
        name: {"attacks": {"scav": {"n": 20, "useful": useful, "gibberish": 0.0}}}
        for name, useful in (("base", 1.0), ("tuned", 0.75))
    }}  # fmt: skip
    (both,) = joined([row, wide])
    assert "| SCAV, wide search | 100 % [84–100] | 75 % [53–89] |" in table([both]).splitlines()
    for wrong in ([row, row], [wide], [row, wide | {"base": "other"}]):
        with pytest.raises(ValueError, match=r"taken|no such row"):
            joined(wrong)
    lines = table(joined([row])).splitlines()
    assert lines[0] == "| | base | mine |"
    assert lines[2] == "| direct | 50 % [30–70] | 25 % [11–47]; 25 % gibberish |"
    assert "half refused (n = 20) | 0 % [0–16] | 50 % [30–70] |" in lines[3]
    assert "half refused (n = 10) | 0 % [0–28] | 20 % [6–51] |" in lines[4]
