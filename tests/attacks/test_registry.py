"""Attacks by name: settings of their own, mistakes as one line, attacks of other packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from es2fast.attacks.registry import BUILT_IN, attack_names, make_attack, make_attacks
from es2fast.errors import UserError


def test_every_attack_has_its_name_and_takes_the_defaults_it_knows() -> None:
    needed = {"artifacts": {"path": "file.json"}}
    made = {
        name: make_attack({"name": name, **needed.get(name, {})}, steps="prompt", nonsense=1)
        for name in BUILT_IN
    }
    assert all(attack.name == attack.label == name for name, attack in made.items())
    assert made["scav"].settings.steps == "prompt"
    assert make_attack({"name": "scav", "steps": "all"}, steps="prompt").settings.steps == "all"
    assert made["soft_prompt"].settings.steps == 500  # a number there: not the default's kind


MISTAKES = [
    ("scva", ["no attack 'scva'", "did you mean 'scav'"]),
    ({"p0": 0.1}, ["no name"]),
    ({"name": "scav", "p9": 1}, ["scav.p9", "p0"]),
    ({"name": "scav", "p0": 2}, ["scav.p0", "found 2"]),
    ({"name": "direct", "label": "a/b"}, ["direct.label", "a/b"]),
]


@pytest.mark.parametrize(("entry", "words"), MISTAKES)
def test_mistakes_are_one_line(entry: object, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_attack(entry)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and str(caught.value).startswith("evaluate.attacks")
    for word in words:
        assert word in str(caught.value)


def test_an_attack_may_be_listed_twice_under_two_labels() -> None:
    twice = [{"name": "scav", "p0": 0.1, "label": "scav-weak"}, "scav"]
    assert [attack.label for attack in make_attacks(twice)] == ["scav-weak", "scav"]
    with pytest.raises(UserError, match="'scav' is listed twice"):
        make_attacks(["scav", "scav"])


PLUGIN = """
from es2fast.attacks.base import Answer, Attack

class Shout(Attack):
    name = "shout"

    def answers(self, target, prompts):
        return [[Answer(text.upper())] for text in target.generate(prompts)]

class NoAttack:
    pass
"""


def test_other_packages_bring_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shouting.py").write_text(PLUGIN)
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[es2fast.attacks]\nshout = shouting:Shout\nwrong = shouting:NoAttack\n"
        "absent = nowhere_at_all:X\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert {"shout", "wrong", "absent"} <= set(attack_names())
    assert make_attack("shout").name == "shout"
    for name, word in (("wrong", "not an es2fast Attack"), ("absent", "nowhere_at_all")):
        with pytest.raises(UserError, match=word):
            make_attack(name)
    sys.modules.pop("shouting", None)
