"""Verdicts that are kept, and judges by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from es2fast.config import parse_config
from es2fast.errors import UserError
from es2fast.judges.base import Item, Judge, Verdict
from es2fast.judges.cached import CHUNK, CachedJudge
from es2fast.judges.registry import describe, judges_of, make_judge, make_judges, with_base


class Counting(Judge):
    """Calls an answer useful when its length is even, and counts how often it was asked."""

    name, slow = "counting", True

    def __init__(self, version: str = "1", stop_at: int = 10**9):
        self.asked: list[Item] = []
        self.unclear: set[Item] = set()
        self.version, self.stop_at = version, stop_at

    @property
    def identity(self) -> str:
        return self.version

    def verdicts(self, items: Sequence[Item]) -> list[Verdict]:
        if len(self.asked) + len(items) > self.stop_at:
            raise UserError("no more")
        self.asked += items
        return ["useful" if len(answer) % 2 == 0 else "refused" for _, answer, _ in items]


ITEMS: list[Item] = [("p", "ab", None), ("p", "abc", None), ("p", "ab", None), ("q", "ab", None)]


def test_a_second_time_costs_nothing(tmp_path: Path) -> None:
    path, first, second = tmp_path / "v.jsonl", Counting(), Counting()
    wanted = ["useful", "refused", "useful", "useful"]
    assert CachedJudge(first, path).verdicts(ITEMS) == wanted
    assert len(first.asked) == 3  # the same answer to the same prompt once
    assert CachedJudge(second, path).verdicts(ITEMS) == wanted and second.asked == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 3 and {"key", "judge", "answer", "verdict"} == lines[0].keys()


def test_what_a_verdict_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    CachedJudge(Counting(), path).verdicts(ITEMS[:1])
    for version, item in (("2", ITEMS[0]), ("1", ("p2", "ab", None)), ("1", ("p", "ab", "ref"))):
        judge = Counting(version)
        CachedJudge(judge, path).verdicts([item])
        assert judge.asked == [item]


def test_a_torn_line_and_a_failure_lose_little(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    many: list[Item] = [("p", "a" * i, None) for i in range(1, 2 * CHUNK)]
    with pytest.raises(UserError, match="no more"):
        CachedJudge(Counting(stop_at=CHUNK), path).verdicts(many)
    with path.open("ab") as file:
        file.write(b'{"key": "torn')
    judge = Counting()
    assert len(CachedJudge(judge, path).verdicts(many)) == len(many)
    assert len(judge.asked) == len(many) - CHUNK


def test_what_was_not_understood_is_not_kept(tmp_path: Path) -> None:
    judge = Counting()
    judge.unclear = {ITEMS[1]}
    cached = CachedJudge(judge, tmp_path / "v.jsonl")
    cached.verdicts(ITEMS)
    cached.verdicts(ITEMS)
    assert judge.asked == [ITEMS[0], ITEMS[1], ITEMS[3], ITEMS[1]]
    assert cached.notes() == ["judge counting: 1 outputs not understood, judged by rules"]


def test_judges_by_name(tmp_path: Path) -> None:
    made = make_judges("rules, rules:gcg,openai:http://h/v1#m,hf:a/wildguard", tmp_path / "v")
    assert [judge.name for judge in made] == [
        "rules", "rules:gcg", "openai:http://h/v1#m", "hf:a/wildguard",
    ]  # fmt: skip
    assert [isinstance(judge, CachedJudge) for judge in made] == [False, False, True, True]
    assert make_judge("rules:gcg+ppl:some/model").name == "rules:gcg+ppl:some/model"
    assert make_judge("hf:a/b:llamaguard").name == "hf:a/b:llamaguard"
    assert make_judges(["rules"])[0].name == "rules"
    assert any("refusal_direction" in line for line in describe())


def test_the_base_model_is_asked_where_none_is_named() -> None:
    names = [
        "rules+ppl", "rules:gcg+ppl", "rules+ppl:other/m", "rules", "hf:a/wildguard",
        "openai:http://h/v1#m+ppl", "rules+ppl:x+ppl",
    ]  # fmt: skip
    wanted = ["rules+ppl:b/m", "rules:gcg+ppl:b/m", *names[2:]]
    assert with_base(names, "b/m") == with_base(" , ".join(names), "b/m") == wanted
    assert with_base(names, None) == with_base(names, "") == names
    assert [judge.name for judge in make_judges(wanted)] == wanted


@pytest.mark.parametrize(
    ("field", "value"),
    [("model.revision", "v2"), ("model.trust_remote_code", True), ("evaluate.device_map", "auto")],
)
def test_a_base_model_that_needs_more_than_its_name(field: str, value: Any) -> None:
    raw: dict[str, dict[str, Any]] = {"model": {"name": "m"}, "evaluate": {"judge": "rules"}}
    section, key = field.split(".")
    raw[section][key] = value
    config = parse_config(raw)
    assert judges_of(config, "m") == "rules"
    config.evaluate.judge = "rules,rules+ppl"
    with pytest.raises(UserError, match=rf"^evaluate\.judge: .*{field} is {value!r}.*MODEL"):
        judges_of(config, "m")
    raw[section].pop(key)
    raw["evaluate"]["judge"] = "rules,rules+ppl"
    assert judges_of(parse_config(raw), "m") == ["rules", "rules+ppl:m"]
    assert judges_of(parse_config(raw), None) == "rules,rules+ppl"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("rule", "no judge 'rule'; there are rules"),
        ("rules,rules", "'rules' is named twice"),
        (" , ", "none given"),
        ("hf:a/b", "the name tells no preset"),
        ("hf:a/b:x", "no such preset"),
        ("openai:h", "expected openai:URL#MODEL"),
        ("rules:x+ppl:m", "no such list"),
        (
            "rules+ppl",
            "no base model to ask; give one (--base) or name a model, rules+ppl:MODEL",
        ),
        ("rule+ppl", "no judge 'rule+ppl'"),
    ],
)
def test_mistakes_in_names(names: str, words: str) -> None:
    with pytest.raises(UserError, match=r"^evaluate\.judge: ") as caught:
        make_judges(names)
    assert words in str(caught.value)
