"""bench/generate.py: it runs end to end, and its table is the documents'."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_models import save_tiny

from bench.generate import RESULTS, main, table


def test_both_loops_answer_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = save_tiny(tmp_path / "model"), tmp_path / "rows"
    command = ["generate.py", "--model", str(model), "--dtype", "fp32", "--prompts", "6"]
    monkeypatch.setattr(
        "sys.argv", [*command, "--tokens", "5", "--batch", "4", "--rounds", "1", "--out", str(out)]
    )
    main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["name"] for row in rows] == ["transformers", "es2fast"]
    assert all(row["answers_equal"] and row["floor_s"] > 0 for row in rows)
    assert rows[1]["rows_computed"] == rows[1]["tokens_written"] <= rows[0]["rows_computed"]
    assert "| model, fp32 | 6 × 5, 4 | 1 | es2fast |" in table(out)


def test_the_readme_holds_the_table_of_the_rows() -> None:
    readme = RESULTS.parents[1] / "README.md"
    assert table(RESULTS) in readme.read_text(encoding="utf-8"), "run bench/generate.py --report"
