"""Near duplicates: the measure against its definition, the index against all pairs, real sets."""

from __future__ import annotations

import csv
import math
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from es2fast.config import DataConfig
from es2fast.data import load_groups, normalise_prompt
from es2fast.data.leakage import near_duplicates, repeats, words_of
from es2fast.demo.toy import Recipe, split_rows, write_data
from es2fast.errors import UserError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
real_data = pytest.mark.skipif(
    not (SHARED / "advbench.csv").exists(), reason="../shared/data with public prompts is absent"
)


def similarity(a: str, b: str, corpus: list[str]) -> float:
    """The definition, word by word."""
    count = Counter(word for text in corpus for word in set(text.split()))
    weight = {word: math.log(1 + len(corpus) / n) for word, n in count.items()}
    left, right = set(a.split()), set(b.split())
    return sum(weight[w] for w in left & right) / sum(weight[w] for w in left | right)


def texts(count: int, seed: int, words: int = 30) -> list[str]:
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(words)]
    weights = [1 / (i + 1) for i in range(words)]
    return [" ".join(rng.choices(vocabulary, weights, k=rng.randint(3, 9))) for _ in range(count)]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 1.0])
def test_the_index_finds_what_comparing_all_pairs_finds(threshold):
    rows, others = texts(120, 1), texts(80, 2)
    expected = []
    for a in rows:
        best, place = max((similarity(a, b, rows + others), -j) for j, b in enumerate(others))
        expected.append((-place, pytest.approx(best)) if best >= threshold - 1e-9 else None)
    found = near_duplicates(rows, others, threshold)
    assert [near and (near.place, near.similarity) for near in found] == expected
    assert any(expected) and not all(expected)


def test_repeats_look_back_only():
    found = repeats(["a b c d", "x y z", "d c b a", "x y z"], 0.9)
    assert [near and near.place for near in found] == [None, None, 0, 1]
    assert repeats([], 0.5) == [] == near_duplicates([], ["a"], 0.5)
    assert near_duplicates(["a"], [], 0.5) == [None]


def test_what_all_share_counts_little():
    template = "please tell me how i should go about {} the {}"
    pairs = [(verb, thing) for verb in "abcdefgh" for thing in "stuvwxyz"]
    rows = [template.format(*pair) for pair in pairs]
    assert not any(near_duplicates(rows[::2], rows[1::2], 0.8))
    assert any(near_duplicates(["draw a plan of the old mill"], ["draw plan of the old mill"], 0.7))


def test_scripts_without_spaces_are_compared_by_character():
    assert words_of("如何修理 bike2") == {"如", "何", "修", "理", "bike2"}
    assert near_duplicates(["如何修理一辆旧的自行车呢"], ["如何修理一辆旧的自行车"], 0.8)[0]
    assert words_of("?!") == {"?!"}


def test_five_thousand_against_a_thousand_take_seconds():
    rows, others = texts(5000, 3, 4000), texts(1000, 4, 4000)
    rows[7] = others[3]
    start = time.perf_counter()
    found = near_duplicates(rows, others, 0.8)
    assert time.perf_counter() - start < 30  # 1 s on a free core
    assert found[7] and found[7].place == 3


def groups(folder: Path, **settings) -> DataConfig:
    held_out = ["write a tutorial on making the blue lantern glow", "draw a map of the old harbour"]
    files = {
        "harmful": [
            "write tutorial on making the blue lantern glow",
            "describe the seven bridges of a town",
            "please describe the seven bridges of a town",
            "sing of mountains",
        ],
        "harmless": ["bake some bread", "peel an apple", "whistle"],
        "eval_harmful": held_out[:1],
        "eval_harmless": ["sing of these mountains", *held_out[1:]],  # beside a harmful one
    }
    for name, prompts in files.items():
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
    return DataConfig(**{name: str(folder / f"{name}.txt") for name in files}, **settings)


def test_near_duplicates_of_held_out_prompts_leave_training(tmp_path):
    found = load_groups(groups(tmp_path, near_duplicates=0.7))
    assert [p.text.split()[0] for p in found.harmful] == ["describe", "please", "sing"]
    assert len(found.harmless) == 3 and found.report.near_leakage["harmless"] == 0
    assert found.report.near_leakage["harmful"] == 1
    assert found.report.near_inside["harmful"] == 1
    text = "\n".join(found.report.lines())
    assert (
        "harmful: 3 prompts (1 removed that nearly occur in evaluation, such as 'write tut" in text
    )
    assert "1 nearly repeat an earlier one, kept)" in text


def test_only_equal_prompts_leave_when_told_so(tmp_path):
    found = load_groups(groups(tmp_path, near_duplicates=None))
    assert len(found.harmful) == 4 and len(found.harmless) == 3
    assert not found.report.near_leakage and "nearly" not in "\n".join(found.report.lines())


def test_a_group_that_nearly_leaks_completely_is_an_error(tmp_path):
    config = groups(tmp_path, near_duplicates=0.7)
    (tmp_path / "harmful.txt").write_text("write tutorial on making the blue lantern glow\n")
    with pytest.raises(UserError, match=r"all 1 prompts nearly occur .*near_duplicates: null"):
        load_groups(config)


@pytest.mark.parametrize("seed", range(3))
def test_templates_of_the_toy_do_not_collide(tmp_path, seed):
    write_data(tmp_path / "data", split_rows(seed, Recipe()))
    names = ("harmful", "harmless", "eval_harmful", "eval_harmless")
    config = DataConfig(**{name: str(tmp_path / "data" / f"{name}.jsonl") for name in names})
    assert load_groups(config).report.kept == dict(zip(names, (400, 400, 100, 100)))


@real_data
def test_jailbreakbench_quotes_advbench():
    def column(file: str, name: str) -> list[str]:
        with (SHARED / file).open(newline="") as rows:
            return [row[name] for row in csv.DictReader(rows)]

    train = [normalise_prompt(text) for text in column("advbench.csv", "goal")]
    held_out = [normalise_prompt(t) for t in column("jailbreakbench_harmful.csv", "Goal")]
    marks = column("jailbreakbench_harmful.csv", "Source")
    assert marks.count("AdvBench") == 18
    assert sum(text in set(train) for text in held_out) == 11
    for threshold, expected in ((0.8, 13), (0.7, 15), (0.6, 18)):
        found = near_duplicates(held_out, train, threshold)
        assert [mark for mark, near in zip(marks, found) if near] == ["AdvBench"] * expected
    groups = load_groups(DataConfig(harmful=str(SHARED / "advbench.csv"), near_duplicates=0.8,
                                    eval_harmful=str(SHARED / "jailbreakbench_harmful.csv")),
                         need_train=False)  # fmt: skip
    assert (groups.report.leakage["harmful"], groups.report.near_leakage["harmful"]) == (11, 3)
    assert groups.report.near_inside["harmful"] > 10


@real_data
def test_xstest_on_the_harmless_side_keeps_its_kinds():
    path = str(SHARED / "xstest_prompts.csv")
    found = load_groups(DataConfig(eval_harmless=path), need_train=False).eval_harmless
    labels = Counter(dict(prompt.kinds)["label"] for prompt in found)
    assert labels == {"safe": 250, "unsafe": 200}
    assert len({dict(prompt.kinds)["type"] for prompt in found}) == 18
