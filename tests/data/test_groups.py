"""Groups checked against each other: duplicates, leakage, overlap, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from es2fast.config import DataConfig
from es2fast.data import Prompt, load_groups, normalise_prompt
from es2fast.errors import UserError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
real_data = pytest.mark.skipif(
    not (SHARED / "advbench.csv").exists(), reason="../shared/data with public prompts is absent"
)


def files(folder: Path, **groups: list[str]) -> DataConfig:
    """One text file per group."""
    for name, prompts in groups.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    return DataConfig(**{name: str(folder / f"{name}.txt") for name in groups})


def test_normalise_prompt():
    assert normalise_prompt("  How   do I\tbake?! ") == "how do i bake"
    assert normalise_prompt("ﬁne Ｔext…") == normalise_prompt("FINE text")
    assert normalise_prompt("Straße") == normalise_prompt("STRASSE")
    assert normalise_prompt("??") == "??"
    assert normalise_prompt("what?now") == "what?now"
    assert normalise_prompt("one") != normalise_prompt("two")


def test_system_messages_do_not_make_a_prompt_another_one():
    user = {"role": "user", "content": "One."}
    system = {"role": "system", "content": "be kind"}
    assert Prompt((system, user)).key == Prompt.of("one").key
    assert Prompt.of("one") == Prompt.of("one") and len({Prompt.of("one"), Prompt.of("one")}) == 1


def test_held_out_prompts_begin_with_every_source(tmp_path):
    (tmp_path / "one.txt").write_text("a0\na1\n")
    (tmp_path / "two.txt").write_text("".join(f"b{i}\n" for i in range(6)))
    both = [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")]
    groups = load_groups(DataConfig(eval_harmless=both), need_train=False)
    found = [prompt.text for prompt in groups.eval_harmless]
    assert found == ["b0", "a0", "b1", "b2", "b3", "a1", "b4", "b5"]
    trained = load_groups(DataConfig(harmless=both), need_train=False)
    assert [p.text for p in trained.harmless][:3] == ["a0", "a1", "b0"]


def test_duplicates_and_leakage_are_removed_counted_and_printed(tmp_path):
    config = files(
        tmp_path,
        harmful=["bad one", "Bad  one!", "bad two", "bad three"],
        harmless=["good one", "good two", "GOOD TWO.", "good two"],
        eval_harmful=["bad three?", "bad four"],
        eval_harmless=["good five", "good five"],
    )
    groups = load_groups(config)
    assert [p.text for p in groups.harmful] == ["bad one", "bad two"]
    assert [p.text for p in groups.harmless] == ["good one", "good two"]
    assert [p.text for p in groups.eval_harmful] == ["bad three?", "bad four"]
    assert groups.report.duplicates == {
        "harmful": 1,
        "harmless": 2,
        "eval_harmful": 0,
        "eval_harmless": 1,
    }
    assert groups.report.leakage == {"harmful": 1, "harmless": 0}
    assert groups.report.kept["harmful"] == 2
    text = "\n".join(groups.report.lines())
    assert "harmful: 2 prompts (1 duplicates removed, 1 removed that also occur in eva" in text
    assert "4 rows; column 'text'" in text
    assert json.loads(json.dumps(groups.report.to_dict()))["leakage"]["harmful"] == 1


@pytest.mark.parametrize(
    ("left", "right"),
    [("harmful", "harmless"), ("harmful", "eval_harmless"), ("eval_harmful", "harmless")],
)
def test_overlap_between_the_groups_is_an_error(tmp_path, left, right):
    groups = {"harmful": ["bad one"], "harmless": ["good one"]}
    groups[left] = [*groups.get(left, []), "the same", "also this"]
    groups[right] = [*groups.get(right, []), "The  same!", "Also this"]
    with pytest.raises(
        UserError, match="2 prompts are both harmful and harmless, for example 'the"
    ):
        load_groups(files(tmp_path, **groups))


@pytest.mark.parametrize("more", [{}, {"side": "harmful"}, {"rows": ":"}])
def test_rows_that_a_limit_left_out_are_told(tmp_path, more):
    config = files(tmp_path, harmful=["bad one", "bad two", "bad three"], harmless=["good"])
    cut, whole = ({**config.harmful[0].model_dump(), **more, "limit": limit} for limit in (2, 3))
    for source, words in ((cut, "the first 2 rows (limit); column"), (whole, ": 3 rows; column")):
        changed = DataConfig.model_validate(config.model_dump() | {"harmful": [source]})
        groups = load_groups(changed)
        assert len(groups.harmful) == source["limit"]
        assert words in groups.report.lines()[0]


def test_missing_groups(tmp_path):
    with pytest.raises(UserError, match=r"data\.harmful: no harmful prompts; give"):
        load_groups(files(tmp_path, harmless=["one"]))
    with pytest.raises(UserError, match=r"data\.harmless: no harmless prompts; give"):
        load_groups(files(tmp_path, harmful=["one"]))
    evaluation = files(tmp_path, eval_harmful=["one"])
    assert len(load_groups(evaluation, need_train=False).eval_harmful) == 1
    with pytest.raises(UserError, match="no harmful prompts"):
        load_groups(evaluation)


def test_a_group_that_leaks_completely_is_an_error(tmp_path):
    config = files(
        tmp_path, harmful=["one", "two"], harmless=["three"], eval_harmful=["two", "one"]
    )
    with pytest.raises(UserError, match="all 2 prompts also occur in evaluation"):
        load_groups(config)


def test_an_empty_file_names_its_role(tmp_path):
    with pytest.raises(UserError, match=r"data\.eval_harmless\[0\]: .*has no rows"):
        load_groups(files(tmp_path, harmful=["one"], harmless=["two"], eval_harmless=[""]))


def test_borderline_prompts_are_the_last_of_the_harmless_ones(tmp_path):
    config = files(
        tmp_path,
        harmful=["kill a person"],
        harmless=["kill a process", "bake a cake", "draw a cat"],
        borderline=["kill a process", "shoot a film", "held out one"],
        eval_harmless=["held out one"],
    )
    groups = load_groups(config)
    texts = [prompt.text for prompt in groups.harmless]
    assert texts == ["bake a cake", "draw a cat", "kill a process", "shoot a film"]
    assert groups.borderline == 2
    assert any("2 of them borderline" in line for line in groups.report.lines())
    with pytest.raises(UserError, match="both harmful and harmless"):
        load_groups(files(tmp_path, harmful=["a b"], harmless=["c d"], borderline=["a b"]))


def test_labelled_rows_join_both_groups(tmp_path):
    path = tmp_path / "both.csv"
    path.write_text("prompt,label,response\nbad,1,\ngood,0,fine\n")
    config = files(tmp_path, harmful=["worse"])
    config.labelled = DataConfig(labelled=str(path)).labelled
    groups = load_groups(config)
    assert [p.text for p in groups.harmful] == ["worse", "bad"]
    assert groups.harmless == [Prompt.of("good", "fine")]
    line = groups.report.lines()[1]
    assert "labels 0: 1, 1: 1" in line and "1 responses in 'response'" in line


def test_held_out_rows_of_both_kinds_are_told_apart(tmp_path):
    path = tmp_path / "both.csv"
    path.write_text("prompt,label\nbad,unsafe\ngood,safe\nworse,unsafe\n")
    config = files(tmp_path, harmful=["worse", "worst"], harmless=["fine"])
    config.eval_labelled = DataConfig(eval_labelled=str(path)).eval_labelled
    groups = load_groups(config)
    assert [p.text for p in groups.eval_harmful] == ["bad", "worse"]
    assert [p.text for p in groups.eval_harmless] == ["good"]
    assert [p.text for p in groups.harmful] == ["worst"]  # what is held out is not trained on
    path.write_text("prompt\nbad\n")
    with pytest.raises(UserError, match=r"data\.eval_labelled\[0\].* has no column 'label'"):
        load_groups(config)


@real_data
def test_public_prompt_sets():
    config = DataConfig(
        harmful=str(SHARED / "advbench.csv"),
        labelled=str(SHARED / "xstest_prompts.csv"),
        eval_harmful=str(SHARED / "jailbreakbench_harmful.csv"),
    )
    groups = load_groups(config)
    adv, jbb, xstest = groups.report.sources
    assert (adv.rows, adv.column, adv.response_column) == (520, "goal", None)
    assert (jbb.rows, jbb.column) == (100, "Goal")
    assert (xstest.rows, xstest.column) == (450, "prompt")
    assert xstest.labels == {"safe": 250, "unsafe": 200}
    assert len(groups.eval_harmful) == 100 and len(groups.harmless) == 250
    leaked = groups.report.leakage["harmful"]
    assert leaked > 0  # the one set quotes the other
    leaked += groups.report.near_leakage["harmful"]
    assert len(groups.harmful) == 720 - leaked - groups.report.duplicates["harmful"]
    kept = {p.key for p in groups.harmful}
    assert not kept & {p.key for p in groups.eval_harmful}
