"""The check of code counts what runs and is right, and compares task by task."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from tiny_models import save_tiny

from bench.studies import real_code
from bench.studies.real_code import Task, code_of, main, passes

TASK = Task("", "def twice(n):\n    '''2 n'''\n", "assert twice(4) == 8\n")
RIGHT = "Sure:\n```python\ndef twice(n):\n    return 2 * n\n```\nIt doubles."


def test_first_block_closed_or_cut() -> None:
    assert code_of(RIGHT) == "def twice(n):\n    return 2 * n\n"
    assert code_of("```\na = 1") == "a = 1"
    assert code_of("a = 1") == "a = 1"


@pytest.mark.parametrize(
    ("answer", "solved"),
    [
        (RIGHT, True),
        ("def twice(n):\n    return n * 2", True),
        (RIGHT.replace("2 *", "3 *"), False),
        ("I cannot help with that.", False),
        ("print(1, file=open('a', 'w'), flush=True)\ndef twice(n): return 2 * n", False),
        ("```python\nx = bytearray(1 << 33)\ndef twice(n): return 2 * n\n```", False),
        ("```python\nwhile True: pass\n```", False),
        ("a\0b", False),
    ],
    ids=["right", "no block", "wrong", "refused", "a file", "8 GiB", "no end", "NUL"],
)
def test_passes(answer: str, solved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_code, "SECONDS", 1)
    assert passes(TASK, answer) == solved


def test_task_by_task_beside_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny(tmp_path / "base")
    one = {
        "prompt": TASK.before,
        "test": "def check(f):\n    assert f(4) == 8",
        "entry_point": "twice",
    }
    with gzip.open(tmp_path / "tasks.gz", "wt") as file:
        file.writelines(f"{json.dumps(one)}\n" for _ in range(4))
    kept = {"base": [RIGHT, RIGHT, RIGHT, ""], "arm": [RIGHT, "", "", RIGHT]}
    (tmp_path / "code").mkdir()
    for name, answers in kept.items():
        lines = "".join(f"{json.dumps({'answer': a})}\n" for a in answers)
        (tmp_path / f"code/{name}-humaneval.jsonl").write_text(lines)
    command = ["real_code.py", "--model", base, "--work", tmp_path, "--arms", "arm,tiny",
               "--humaneval", tmp_path / "tasks.gz", "--out", tmp_path / "rows"]  # fmt: skip
    save_tiny(tmp_path / "tiny/model")
    monkeypatch.setattr(real_code, "TOKENS", 4)
    monkeypatch.setattr("sys.argv", [str(part) for part in command])
    main()
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(r["model"], r["passed"], r["lost"], r["won"]) for r in rows] == [
        ("base", 3, 0, 0), ("arm", 2, 2, 1), ("tiny", 0, 3, 0)
    ]  # fmt: skip
    assert rows[1]["p"] == 1.0 and rows[2]["p"] == 0.25
