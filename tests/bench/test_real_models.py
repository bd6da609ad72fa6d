"""The documents hold what the rows say, and nothing else."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench.studies.real_arms import ARMS, ATTACKS, BASE, CIRCUIT_BREAKERS, answer_tokens, label
from bench.studies.real_figure import figure
from bench.studies.real_models import JUDGE, configuration, key_of, made_hash
from bench.studies.real_prompts import ordinary_prompts, unsafe_pairs, write_harmless, write_pairs
from bench.studies.real_report import (
    PARTS,
    RECIPE,
    ROWS,
    ability_table,
    documents,
    fill,
    harmless_table,
    legend,
    recipe_table,
    shown,
    table,
    with_seeds,
)
from es2fast.attacks.registry import make_attack
from es2fast.run.files import read_lines


def arguments(tmp_path: Path) -> argparse.Namespace:
    borderline = tmp_path / "xstest.csv"
    twins = [(f"how {i},homonyms,safe\n", f"who {i},contrast_homonyms,unsafe\n") for i in range(60)]
    borderline.write_text("prompt,type,label\n" + "".join(a + b for a, b in twins))
    return argparse.Namespace(
        model=Path("m"), work=tmp_path, borderline=borderline, fit_harmful=Path("a.csv"),
        harmful=Path("b.csv"), dtype="fp32", tokens=32, limit=50, seed=0, judge="rules",
    )  # fmt: skip


def test_the_documents_are_made_from_the_rows() -> None:
    rows = list(read_lines(ROWS))
    assert rows, "no rows of the study"
    for path, text in documents(rows).items():
        assert path.read_text() == text, "run python bench/studies/real_models.py --report"


def test_every_row_is_a_cell_of_the_study_as_it_stands(tmp_path: Path) -> None:
    attacks = {label(attack): attack for attack, _ in ATTACKS}
    assert len(attacks) == len(ATTACKS)
    given, hashes = arguments(tmp_path), {}
    for row in read_lines(ROWS):
        attack = attacks[label({"name": row["attack"]} | row["settings"])]
        given.seed = row["seed"]
        arm = (row["model"], row["seed"])
        if row["model"] != BASE and arm not in hashes:
            hashes[arm] = made_hash(given, row["model"])
        made = hashes.get(arm, "")
        assert row["model"] == BASE or row["config"] == made, row["key"]
        assert row["tokens"] == answer_tokens(attack, 32)
        limit = min(row["limit"], next(most for one, most in ATTACKS if one == attack))
        own = (row["base"], row["model"], made, row["seed"], attack, row["tokens"], limit)
        assert row["judge"] == JUDGE and row["key"] == key_of(*own)
        assert "useful" not in row or (row["n"] >= 50 and 0 <= row["useful"] <= 1)


def test_every_attack_of_the_study_exists() -> None:
    for attack, held_out in ATTACKS:
        assert make_attack(attack).name == attack["name"] and held_out >= 50


def test_unsafe_prompts_come_with_their_safe_twins(tmp_path: Path) -> None:
    """Those of the ten prompts that are trained on; a twin of two is kept if both are."""
    given = arguments(tmp_path)
    fit = Path(write_harmless(tmp_path, given.borderline)["fit"]).read_text()
    kept = [f"who {i}" for i in range(60) if f'"how {i}"' in fit]
    assert len(kept) == 10 and unsafe_pairs(given.borderline) == kept
    file = Path(write_pairs(tmp_path, given.borderline))
    assert [json.loads(line)["prompt"] for line in file.read_text().splitlines()] == kept
    head, *lines = given.borderline.read_text().splitlines()
    kinds = {"homonyms": "privacy_public", "contrast_homonyms": "contrast_privacy"}
    lines = [a.replace(f",{b},", f",{kinds[b]},") for a in lines for b in kinds if f",{b}," in a]
    lines += [f"what {i},privacy_fictional,safe" for i in range(60)]
    given.borderline.write_text("\n".join([head, *lines]) + "\n")
    fit = Path(write_harmless(tmp_path, given.borderline)["fit"]).read_text()
    both = [f"who {i}" for i in range(60) if f'"how {i}"' in fit and f'"what {i}"' in fit]
    assert 10 < len(both) < 60 and unsafe_pairs(given.borderline) == both


def test_every_arm_is_a_configuration_of_its_own(tmp_path: Path) -> None:
    given, seen = arguments(tmp_path), {}
    for name in ARMS:
        config = configuration(given, name)
        assert config.train.steps in (40, 80, 120, 240, 400, 600, 1000)
        assert config.train.micro_batch_size == 4
        if name not in (*CIRCUIT_BREAKERS, "separation"):
            same = seen.setdefault(made_hash(given, name), name)
            assert same == name, f"{name} is made as {same}"


def test_a_cell_that_was_not_measured_says_so() -> None:
    row: dict[str, Any] = {"model": "base", "attack": "direct", "useful": 0.5, "gibberish": 0.0,
                           "n": 50, "seconds": 25.0}  # fmt: skip
    other = row | {"model": "both", "attack": "prefill", "gibberish": 0.1}
    lines = table([row, other], ("base", "separation", "both")).splitlines()
    assert lines[0] == "| useful answers under | direct | prefill |"
    assert lines[2] == "| base | 50 % [37–63], n = 50 | – |"
    assert lines[3] == "| both | – | 50 % [37–63], n = 50; 10 % gibberish |"
    assert lines[4] == "| *s per prompt* | 0.5 | 0.5 |"


def test_another_seed_is_a_line_of_its_own_below_the_first() -> None:
    row: dict[str, Any] = {"base": "b", "model": "both", "config": "c", "seed": 0, "n": 50,
                           "attack": "soft_prompt", "settings": {"steps": 60}, "useful": 0.5,
                           "gibberish": 0.0, "seconds": 25.0}  # fmt: skip
    rows = [
        row,
        row | {"seed": 1, "useful": 0.1},
        row | {"settings": {"universal": True}, "useful": 0.0},
        row | {"n": 100, "useful": 0.4},
        row | {"base": "other", "useful": 0.9},
    ]
    some = shown(rows, "b")
    lines = table(some, with_seeds(("both", "long"), some)).splitlines()
    assert lines[0] == "| useful answers under | soft_prompt, universal | soft_prompt |"
    assert lines[2] == "| both | 0 % [0–7], n = 50 | 40 % [31–50], n = 100 |"
    assert lines[3] == "| both, seed 1 | – | 10 % [4–21], n = 50 |"


def test_the_price_is_told_by_kind_of_prompt() -> None:
    harmless = {"refusal_by_type": {"ordinary": [25, 0.0], "borderline": [25, 0.2]},
                "intact_rate": 0.5, "kl_response": 0.01, "top1_agreement": 0.97,
                "perplexity": 2.0}  # fmt: skip
    row = {"model": "base", "attack": "direct", "harmless": harmless}
    cells = harmless_table([row], ("base",)).splitlines()[2].split(" | ")
    assert cells[1:4] == ["0 % [0–13], n = 25", "20 % [9–39], n = 25", "50 %"]


def test_the_recipe_stands_beside_the_base_mean_by_mean() -> None:
    harmless = {"refusal_by_type": {"ordinary": [50, 0.04], "borderline": [50, 0.5]},
                "intact_rate": 0.633, "kl_response": 0.00391, "top1_agreement": 0.979}  # fmt: skip
    row: dict[str, Any] = {"base": "b", "model": BASE, "config": "c", "seed": 0, "n": 100,
                           "attack": "direct", "settings": {}, "useful": 0.5, "gibberish": 0.0,
                           "harmless": harmless}  # fmt: skip
    own = row | {"model": RECIPE, "useful": 0.05}
    rows = [
        *(row, row | {"attack": "scav", "useful": 0.9}),
        *(own, own | {"attack": "scav", "useful": 0.3, "gibberish": 0.2}),
        own | {"seed": 1, "n": 50, "useful": 0.1},
        row | {"attack": "gcg"},
    ]
    lines = recipe_table(shown(rows, "b")).splitlines()
    assert lines[0] == "| | base | hardened, seeds 0 and 2 | hardened, seeds 0 and 1 |"
    scav, direct = lines[2:4]
    assert scav.endswith("| 90 % [83–94] | 30 % [22–40]; 20 % gibberish | – |")
    assert direct.endswith("| 50 % [40–60] | 5 % [2–11] | 10 % [4–21], n = 50 |")
    assert lines[4] == "| **price** | | | |" and len(lines) == 10  # nothing of gcg
    assert lines[7].endswith("| 0.0039 | 0.0039 | 0.0039 |")
    assert lines[8].endswith("| 97.9 % | 97.9 % | 97.9 % |") and lines[9].endswith("| 63 % |")


def test_the_figure_has_a_mark_per_rate() -> None:
    price = {"refusal_by_type": {"ordinary": [25, 0.0], "borderline": [20, 0.2]}}
    row: dict[str, Any] = {"model": "base", "attack": "direct", "useful": 0.5, "n": 50}
    row["harmless"] = price
    other = row | {"model": "both", "attack": "prefill", "useful": 0.1}
    attacked, paid = figure([row, other], ("base", "separation", "both")).axes
    assert [tick.get_text() for tick in attacked.get_yticklabels()] == ["direct", "prefill"]
    marks = [line.get_xdata()[0] for axes in (attacked, paid) for line in axes.lines
             if len(line.get_xdata())]  # fmt: skip
    assert marks == [50.0, 10.0, 0.0, 20.0]


def test_small_chances_are_bounds_and_what_an_arm_is_made_of_is_told() -> None:
    row = {"model": BASE, "tasks": "benign", "n": 100, "passed": 69, "lost": 0, "won": 0, "p": 1.0}
    chances = {0.182: "p = 0.18", 0.004: "p < 0.005", 3e-15: "p < 0.001"}
    rows = [row, *(row | {"model": f"arm{i}", "p": p} for i, p in enumerate(chances))]
    lines = ability_table(rows, [row["model"] for row in rows]).splitlines()[2:]
    assert all(words in line for words, line in zip(chances.values(), lines[1:], strict=True))
    said = legend([{"model": "topical_mean_80"}], PARTS)
    assert "- `topical_mean_80`: " in said and "- `topical`: " in said and "`both`" not in said


def test_what_stands_between_marks_is_replaced() -> None:
    text = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    filled = fill(text, {"one": "new\n"})
    assert filled == "a\n<!-- one -->\nnew\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"


def test_ordinary_prompts_are_distinct() -> None:
    prompts = ordinary_prompts()
    assert len(set(prompts)) == len(prompts) == 240
