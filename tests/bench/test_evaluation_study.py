"""The document holds what the rows say, and nothing else."""

from __future__ import annotations

from bench.studies.evaluation_study import (
    ATTACKS,
    DOCUMENT,
    ROWS,
    fill,
    key_of,
    ordinary_prompts,
    table,
)
from es2fast.attacks.registry import make_attack
from es2fast.run.files import read_lines


def test_the_document_is_made_from_the_rows() -> None:
    rows = list(read_lines(ROWS))
    assert rows, "no rows of the study"
    text = DOCUMENT.read_text()
    assert fill(text, rows) == text, "run python bench/studies/evaluation_study.py --report"


def test_every_row_is_a_cell_of_the_study() -> None:
    cells = {key_of(model, attack) for model in ("base",) for attack, _ in ATTACKS}
    for row in read_lines(ROWS):
        assert row["model"] != "base" or row["key"] in cells
        assert row["n"] >= 50 and 0 <= row["useful"] <= 1


def test_every_attack_of_the_study_exists() -> None:
    for attack, held_out in ATTACKS:
        assert make_attack(attack).name == attack["name"] and held_out >= 50


def test_a_cell_that_was_not_measured_says_so() -> None:
    row = {"model": "base", "attack": "direct", "useful": 0.5, "gibberish": 0.0, "n": 50,
           "seconds": 25.0}  # fmt: skip
    other = row | {"model": "es2_l2", "attack": "prefill", "gibberish": 0.1}
    lines = table([row, other]).splitlines()
    assert lines[2] == "| direct | 50 % [37–63], n = 50 | not measured | 0.5 |"
    assert "not measured | 50 % [37–63], n = 50; 10 % gibberish" in lines[3]


def test_ordinary_prompts_are_distinct() -> None:
    prompts = ordinary_prompts()
    assert len(set(prompts)) == len(prompts) == 240
