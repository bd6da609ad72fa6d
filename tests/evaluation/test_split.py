"""Which rows of a file are held out and which are the attacker's."""

from __future__ import annotations

from pathlib import Path

import pytest

from es2fast.config import Config, load_config, parse_config, save_config
from es2fast.data import load_groups
from es2fast.errors import UserError
from es2fast.evaluation.run import evaluate_paths
from es2fast.evaluation.split import (
    check_replaced,
    leave_out_learnt,
    replacing,
    split_prompts,
    without_learnt,
)
from es2fast.run.folder import RunFolder

# distinct words throughout, so that only what is meant to be similar is
THINGS = "violin ladder kettle canoe lantern anvil bridge iron drum falcon glacier harbor island"
VERBS = "polish mend carry sketch weigh photograph borrow wrap lift count sell hide measure"
THINGS += " jacket marble needle"
VERBS += " clean rent name"
ROWS = [
    f"where would someone {verb} one {thing}" for verb, thing in zip(VERBS.split(), THINGS.split())
]
NEAR = ["someone would polish one violin where?", "where would someone mend one ladder, someone"]


def config_of(folder: Path, rows: list[str], **data: object) -> Config:
    (folder / "harmful.txt").write_text("\n".join(rows) + "\n")
    harmless = [row.replace("where", "why") for row in ROWS]
    (folder / "harmless.txt").write_text("\n".join(harmless) + "\n")
    raw = {
        "model": {"name": str(folder / "none")},
        "data": {"eval_harmful": str(folder / "harmful.txt"),
                 "eval_harmless": str(folder / "harmless.txt"), **data},
        "evaluate": {"limit": 8, "fit_limit": 8},
    }  # fmt: skip
    return parse_config(raw)


def split(config: Config):
    groups = load_groups(config.data, need_train=False)
    return split_prompts(groups, config.evaluate, config.data.near_duplicates)


def test_rows_that_nearly_repeat_a_held_out_one_are_kept_from_the_attacker(tmp_path: Path) -> None:
    rows = [*ROWS[:8], NEAR[0], *ROWS[8:], NEAR[1]]
    prompts, (note,) = split(config_of(tmp_path, rows))
    assert [p.text for p in prompts.harmful] == ROWS[:8]
    assert [p.text for p in prompts.fit_harmful] == ROWS[8:]
    assert note.startswith("harmful: 2 of the 10 further rows nearly repeat a held-out one")
    assert repr(NEAR[0]) in note or repr(NEAR[1]) in note
    assert len(prompts.fit_harmless) == 8


def test_what_a_run_was_trained_on_is_not_held_out(tmp_path: Path) -> None:
    trained = {"harmful": ROWS[:4], "harmless": ["tell me about paris", "explain a sonnet"]}
    for name, rows in trained.items():
        (tmp_path / f"fit_{name}.txt").write_text("\n".join(rows) + "\n")
    sources = {name: str(tmp_path / f"fit_{name}.txt") for name in trained}
    run = config_of(tmp_path, ROWS[4:6], **sources)
    learnt = load_groups(run.data)
    assert len(learnt.harmful) == 4
    other = [ROWS[0], NEAR[0], ROWS[10], NEAR[1], ROWS[11]]
    (tmp_path / "other.txt").write_text("\n".join(other) + "\n")
    asked = run.model_copy(deep=True)
    asked.data.eval_harmful[0].source = str(tmp_path / "other.txt")
    groups = load_groups(asked.data)
    assert [p.text for p in groups.harmful] == ROWS[2:4]  # what overlaps has gone from the fit
    own, notes = without_learnt(groups, asked, run)
    assert own == learnt and without_learnt(learnt, run, run) == (learnt, [])
    assert [p.text for p in groups.eval_harmful] == ROWS[10:12]
    assert [p.text for p in groups.harmful] == ROWS[:4]  # and is back: it was learnt
    assert notes[0].startswith("data.eval_harmful: 3 of 5 prompts are left out, since the run was")
    (tmp_path / "other.txt").write_text("\n".join(ROWS[:3]) + "\n")
    with pytest.raises(UserError, match=r"eval_harmful: the run was trained on all 3 prompts"):
        leave_out_learnt(load_groups(asked.data), learnt, asked, run)
    gone = run.model_copy(deep=True)
    gone.data.harmful[0].source = str(tmp_path / "gone.txt")  # of another machine
    groups = load_groups(asked.data)
    own, (note,) = without_learnt(groups, asked, gone)
    assert own is None and note.startswith("whether the run was trained on held-out prompts is not")
    assert "gone.txt" in note and len(groups.eval_harmful) == 3


def test_of_any_model_that_es2fast_made_what_it_learnt_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"fit": ROWS[:3], "kind": ["tell me about paris"]}
    for name, rows in texts.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(rows) + "\n")
    sources = {name: str(tmp_path / f"{name}.txt") for name in texts}
    data = {"harmful": sources["fit"], "harmless": sources["kind"]}
    saved = parse_config({"model": {"name": "m"}, "data": data})
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    save_config(saved, tmp_path / "one" / "es2fast.yaml")
    asked = config_of(tmp_path, ROWS[1:])
    asked.data.system_prompt = "Be brief."
    with pytest.raises(UserError):  # neither is a model
        evaluate_paths([str(tmp_path / name) for name in ("one", "two")], asked,
                       RunFolder(tmp_path / "out"))  # fmt: skip
    told = capsys.readouterr().out
    assert "note: one: data.eval_harmful: 2 of 15 prompts are left out, since the run was" in told
    assert "one: it was trained with data.system_prompt=None and is asked with 'Be brief.'" in told
    assert "note: two" not in told


def test_without_near_duplicates_nothing_is_said(tmp_path: Path) -> None:
    prompts, notes = split(config_of(tmp_path, ROWS))
    assert notes == [] and [p.text for p in prompts.fit_harmful] == ROWS[8:]


def test_they_stay_where_only_equal_ones_are_to_go(tmp_path: Path) -> None:
    prompts, notes = split(config_of(tmp_path, [*ROWS[:8], *NEAR, *ROWS[8:]], near_duplicates=None))
    assert notes == [] and [p.text for p in prompts.fit_harmful][:2] == NEAR


def test_training_prompts_of_their_own_are_not_split(tmp_path: Path) -> None:
    (tmp_path / "fit.txt").write_text("\n".join(ROWS[8:]) + "\n")
    prompts, notes = split(config_of(tmp_path, ROWS[:8], harmful=str(tmp_path / "fit.txt")))
    assert notes == [] and len(prompts.harmful) == 8 and len(prompts.fit_harmful) == 8


def test_too_few_are_left(tmp_path: Path) -> None:
    rows = [*ROWS[:8], *NEAR, *ROWS[8:10]]
    config = config_of(tmp_path, rows)
    config.evaluate.fit_limit = 4
    with pytest.raises(UserError, match=r"8 prompts to measure and 2 for the attacker.*2 of the 4"):
        evaluate_paths(["none"], config, RunFolder(tmp_path / "out"))


def test_files_take_the_place_of_all_that_a_run_names_for_their_side(tmp_path: Path) -> None:
    rows = [f"{'harmful' if i % 2 else 'safe'},{text}" for i, text in enumerate(ROWS)]
    (tmp_path / "both.csv").write_text("label,prompt\n" + "\n".join(rows) + "\n")
    (tmp_path / "other.csv").write_text("label,prompt\nunsafe,run away\nsafe,sit down\n")
    labelled = config_of(tmp_path, [], eval_harmful=[], eval_harmless=[],
                         eval_labelled=str(tmp_path / "both.csv"))  # fmt: skip
    save_config(labelled, tmp_path / "run.yaml")
    other = [str(tmp_path / "other.csv")]
    chosen = replacing({"data.eval_harmful": other, "data.eval_harmless": other})
    groups = load_groups(load_config(tmp_path / "run.yaml", chosen).data, need_train=False)
    assert [p.text for p in groups.eval_harmful] == ["run away"]
    assert [p.text for p in groups.eval_harmless] == ["sit down"]
    one = replacing({"data.eval_harmful": other})
    with pytest.raises(UserError, match=r"data\.eval_harmful: replaced, but data\.eval_labelled"):
        check_replaced(load_config(tmp_path / "run.yaml", one).data, one)
    check_replaced(labelled.data, chosen)
    assert replacing({"data.harmless": other})[-1] == "data.borderline=[]"
