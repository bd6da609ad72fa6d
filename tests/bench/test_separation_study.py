"""The study's bookkeeping, and that its document says what its rows say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench.studies.separation_cells import LAYERS, LOSSES, ROWS, Cell, cells, key_of, read_rows
from bench.studies.separation_report import DOCUMENT, fill, plots, select, summary, tables
from bench.studies.separation_study import settings


def row(cell: Cell, value: float) -> dict:
    attack = dict(refused=1.0, useful=value, gibberish=0.0, repetitive=0.0, relative_push=value)
    return dict(
        cell=json.loads(cell.key), n=10, kl=value, intact=1.0, distance_over_base=value,
        norm_ratio=1.0, shift_rank=None, separation={"margin": 6.0}, seconds=1.0, commit="x",
        torch="2", python="3", cpu="c", threads=1, time="2026-01-01T00:00:00Z",
        attacks={name: attack for name in ("direct", "scav", "mean_difference")},
    )  # fmt: skip


def test_cells_are_distinct_and_whole_seeds_come_first() -> None:
    found = cells()
    assert len({cell.key for cell in found}) == len(found)
    core = [c for c in found if c.loss != "base" and c.robust is c.margin is c.steps is None]
    core = core[: 8 * 3 * 2 * 3]
    assert {c.loss for c in core} == set(LOSSES) and {c.layers for c in core} == set(LAYERS)
    assert sum(cell.robust is not None for cell in found) == 2 * 2 * 3
    seeds = [cell.seed for cell in core]
    assert seeds == sorted(seeds)


def test_a_row_is_recognised_as_its_cell_after_a_trip_through_json(tmp_path: Path) -> None:
    for cell in cells():
        assert key_of(json.loads(json.dumps({"cell": dataclasses.asdict(cell)}))) == cell.key
    assert read_rows(tmp_path / "none.jsonl") == []


def test_every_cell_is_a_valid_configuration(tmp_path: Path) -> None:
    for cell in cells():
        config = settings(cell, tmp_path / "toy", tmp_path / "out", 100)
        assert cell.loss in ("base", config.separation.loss)
        assert (config.kl.budget is not None) == (cell.control == "budget")
        assert config.train.steps == (cell.steps or 80)
        bounded = cell.loss in ("base", "hinge", "softplus", "fisher")
        rest = 0.0 if cell.loss == "cosine" else None
        assert config.separation.margin == (cell.margin or 6.0 if bounded else rest)
        assert config.separation.robust.attacks == [cell.robust or "mean_difference"]


def test_a_cell_of_a_table_is_mean_and_range() -> None:
    cell = Cell("hinge", (2, 4), "weight", 0)
    rows = [row(dataclasses.replace(cell, seed=i), v) for i, v in enumerate((0.0, 0.25, 0.5))]
    rows.append(row(dataclasses.replace(cell, margin=2.0), 9.0))
    rows.append({"cell": json.loads(dataclasses.replace(cell, loss="l2").key), "stopped": "x"})
    found = select(rows, loss="hinge", layers=(2, 4), control="weight")
    assert len(found) == 3
    assert summary(found, lambda r: r["kl"], ".2f") == "0.25 (0.00–0.50)"
    assert summary(found[:1], lambda r: r["kl"], ".2f") == "0.00"
    assert summary(rows[-1:], lambda r: r["kl"], ".2f") == "–"
    text = "a\n<!-- table: margin -->\nold\n<!-- end -->\nb\n"
    filled = fill(text, rows[:4])
    assert "\n| 6, 2+4 | 3 | 0.25 (0–0.5) |" in filled
    assert "old" not in filled and filled.endswith("<!-- end -->\nb\n")


@pytest.mark.skipif(not ROWS.exists(), reason="no rows")
def test_the_document_shows_the_rows() -> None:
    rows, text = read_rows(ROWS), DOCUMENT.read_text()
    assert fill(text, rows) == text, "run python bench/studies/separation_study.py --report"
    assert all(f"<!-- table: {name} -->" in text for name in tables(rows))
    assert set(plots(rows)) == {"losses", "margin"}
