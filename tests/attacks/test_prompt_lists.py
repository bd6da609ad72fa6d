"""Roleplay, transcript and artifacts: what is asked for each prompt, and mistakes in the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attacks.targets import TEXTS, prompts, tiny_target

from es2fast.attacks.base import Target
from es2fast.attacks.prompts.roleplay import read_wrappers
from es2fast.attacks.prompts.transcript import read_transcripts
from es2fast.attacks.registry import make_attack
from es2fast.config import DataConfig, EvaluateConfig
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError
from es2fast.evaluation.answering import EvaluationPrompts, Subject
from es2fast.evaluation.run import evaluate_models
from es2fast.run.folder import RunFolder

ASKED = prompts(*TEXTS)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(target: Target, attack: Any, prompt: Prompt) -> list[str]:
    """What is asked, as text with special tokens."""
    convert = target.formatter.tokenizer.convert_ids_to_tokens
    return [" ".join(convert(list(row.ids))) for row in attack.rows(target, prompt)]


def roomy(length: int = 512) -> Target:
    target = tiny_target(max_new_tokens=2)
    target.formatter = Formatter(target.formatter.tokenizer, DataConfig(max_length=length))
    return target


def test_built_in_lists_hold_the_request_and_differ() -> None:
    target = roomy()
    for name, key in (("roleplay", "wrapper"), ("transcript", "transcript")):
        attack = make_attack(name)
        attack.prepare(target)
        rows = attack.rows(target, ASKED[0])
        names = [row.parameters[key] for row in rows]
        assert len(names) == len(set(names)) >= 3
        for text in texts(target, attack, ASKED[0]):
            assert ASKED[0].text in text
    assert all(text.count("{prompt}") == 1 for text in read_wrappers().values())
    assert all(turns[-1]["role"] == "assistant" for turns in read_transcripts().values())


def test_a_wrapper_goes_around_the_last_turn_only(tmp_path: Path) -> None:
    path = lines(tmp_path / "w.jsonl", [{"name": "a", "text": "please {prompt} . {x}"}])
    attack, target = make_attack({"name": "roleplay", "path": path}), roomy()
    attack.prepare(target)
    turns = [("user", "draw"), ("assistant", "sure"), ("user", "break {prompt}")]
    prompt = Prompt(tuple({"role": role, "content": text} for role, text in turns))
    assert texts(target, attack, prompt) == [
        "<s> <user> draw <bot> sure </s> <user> please break <unk> . <unk> <bot>"
    ]
    found = attack.answers(target, ASKED)
    assert [[one.parameters for one in answers] for answers in found] == [[{"wrapper": "a"}]] * 4
    wrapped = target.generate(prompts(*(f"please {text} . {{x}}" for text in TEXTS)))
    assert [answers[0].text for answers in found] == wrapped


TURNS = [
    {"role": "user", "content": "draw a tree"},
    {"role": "assistant", "content": "sure {prompt}"},
]


def test_a_transcript_comes_first(tmp_path: Path) -> None:
    path = lines(tmp_path / "t.jsonl", [{"name": "a", "messages": TURNS}])
    attack, target = make_attack({"name": "transcript", "path": path}), roomy()
    attack.prepare(target)
    assert texts(target, attack, ASKED[0]) == [
        "<s> <user> draw a tree <bot> sure break the car </s> <user> break the car <bot>"
    ]
    assert attack.summary() == {"transcripts": ["a"]}
    assert attack.answers(target, ASKED)[3][0].parameters == {"transcript": "a"}


def test_transcripts_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    long = [TURNS[0], {"role": "assistant", "content": "text " * 40}]
    rows = [{"name": "short", "messages": TURNS}, {"name": "long", "messages": long}]
    path = lines(tmp_path / "t.jsonl", rows)
    attack = make_attack({"name": "transcript", "path": path})
    attack.prepare(roomy(30))
    assert attack.summary() == {"transcripts": ["short"]}
    attack = make_attack({"name": "transcript", "path": lines(tmp_path / "u.jsonl", rows[1:])})
    with pytest.raises(UserError, match=r"data\.max_length 30"):
        attack.prepare(roomy(30))


def jbb(path: Path) -> str:
    """Two goals, one of them twice, another one whose search had failed."""
    found = [
        {"index": 0, "goal": "Break the  CAR.", "prompt": "please break a car", "jailbroken": True},
        {"index": 1, "goal": TEXTS[2], "prompt": None},
        {"index": 2, "goal": "break the car", "prompt": "sure . break the car"},
        {"index": 3, "goal": TEXTS[3], "prompt": "some text"},
    ]
    path.write_text(json.dumps({"parameters": {"model": "m"}, "jailbreaks": found}))
    return str(path)


def test_artifacts_are_matched_by_normalised_goal(tmp_path: Path) -> None:
    attack = make_attack({"name": "artifacts", "path": jbb(tmp_path / "a.json")})
    target = roomy()
    attack.prepare(target)
    assert attack.coverage(ASKED) == {"prompts_with_artifact": 2}
    plain = TEXTS[1].replace("old red", "<unk> <unk>")
    asked = [["please break a car", "sure . break the car"], [plain], [TEXTS[2]], ["some text"]]
    for prompt, wanted in zip(ASKED, asked):
        assert texts(target, attack, prompt) == [f"<s> <user> {text} <bot>" for text in wanted]
    found = attack.answers(target, ASKED)
    assert [[(one.parameters["artifact"], one.sample) for one in answers] for answers in found] == [
        [(True, 0), (True, 1)], [(False, 0)], [(False, 0)], [(True, 0)]
    ]  # fmt: skip
    assert found[1][0].text == target.generate(ASKED[1:2])[0]


def test_rows_and_conversations_are_artifacts_too(tmp_path: Path) -> None:
    talk = [*TURNS, {"role": "user", "content": "break the car please"}]
    rows = [{"prompt": TEXTS[0], "attack": talk}, {"goal": TEXTS[1], "attack": "steal"}]
    attack = make_attack({"name": "artifacts", "path": lines(tmp_path / "a.jsonl", rows)})
    target = roomy()
    assert attack.coverage(ASKED) == {"prompts_with_artifact": 2}
    assert texts(target, attack, ASKED[0])[0].endswith("</s> <user> break the car please <bot>")
    assert texts(target, attack, ASKED[1]) == ["<s> <user> steal <bot>"]


MISTAKES = [
    ("roleplay", [{"name": "a", "text": "no place"}], "row 1: expected `name` and `text`"),
    ("roleplay", [{"name": "a", "text": "{prompt}"}] * 2, "row 2: 'a' occurs twice"),
    ("transcript", [{"name": "a", "messages": TURNS[:1]}], "row 1: expected `name` and `messages`"),
    ("transcript", [{"name": "a", "messages": TURNS}] * 2, "row 2: 'a' occurs twice"),
    ("artifacts", [{"goal": "other", "prompt": "x"}], "none of them a held-out harmful prompt"),
    ("artifacts", [{"goal": TEXTS[0]}], "row 1: expected `goal` and"),
    ("artifacts", [{"goal": TEXTS[0], "prompt": None}], "no row with a prompt"),
    ("artifacts", [{"goal": TEXTS[0], "attack": TURNS}], "row 1: what is asked must be text"),
]


@pytest.mark.parametrize(("name", "rows", "words"), MISTAKES)
def test_mistakes_in_files_are_one_line(
    name: str, rows: list[Any], words: str, tmp_path: Path
) -> None:
    attack = make_attack({"name": name, "path": lines(tmp_path / "f.jsonl", rows)})
    with pytest.raises(UserError) as caught:
        attack.coverage(ASKED)
        attack.prepare(roomy())
    assert words in str(caught.value) and str(caught.value).startswith(f"{name}.path: ")


def test_a_file_that_is_not_there_is_said() -> None:
    with pytest.raises(UserError, match=r"artifacts\.path: there is no file 'nowhere\.json'"):
        make_attack({"name": "artifacts", "path": "nowhere.json"}).coverage(ASKED)


def test_answers_in_the_log_belong_to_the_file_s_content(tmp_path: Path) -> None:
    """A report tells how many prompts had an artifact; an edited file is asked anew."""
    target, folder = roomy(), RunFolder(tmp_path / "out")
    path = jbb(tmp_path / "a.json")
    settings = EvaluateConfig(
        attacks=["direct", {"name": "artifacts", "path": path}], max_new_tokens=2, batch_size=4
    )
    given = EvaluationPrompts(ASKED, target.harmless, target.harmful, target.harmless)

    def report() -> Any:
        subject = Subject.of("model", target.model, target.formatter)
        return evaluate_models([subject], given, settings, folder).models[0].attacks["artifacts"]

    def logged() -> int:
        rows = map(json.loads, folder.answers.read_text().splitlines())
        return sum(row["attack"] == "artifacts" for row in rows)

    first = report()
    assert (first.prompts_with_artifact, first.answers_per_prompt, logged()) == (2, 2, 5)
    assert {(v["parameters"]["artifact"], v["n"]) for v in first.variants} == {
        (True, 2),
        (False, 2),
    }
    report()
    assert logged() == 5
    Path(path).write_text(json.dumps([{"goal": TEXTS[0], "attack": "steal"}]))
    assert (report().prompts_with_artifact, logged()) == (1, 9)
