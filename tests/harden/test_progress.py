"""Numbered steps, and an estimate from the first work that was measured."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from es2fast.harden.progress import Steps, duration, estimated


def test_steps_are_numbered_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    steps = Steps(3)
    with steps.step("plan") as say:
        say("4 prompts")
    with steps.step("train", "5 steps"):
        pass
    steps.skip("evaluate", "finished before")
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] plan: 4 prompts (0 s)",
        "[2/3] train: 5 steps",
        "[2/3] train: done (0 s)",
        "[3/3] evaluate: finished before",
    ]


def test_a_failed_step_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError), Steps(1).step("train", "5 steps"):
        raise RuntimeError
    assert "done" not in capsys.readouterr().out


def test_the_time_left_follows_from_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two units 1.5 s apart of 102: 100 are left, 150 s; an earlier run's lines do not count."""
    log = tmp_path / "log.jsonl"
    log.write_text("1\n2\n3\n4\n5\n")
    with estimated(log, 102, lambda line: line != "trial\n"):
        time.sleep(0.7)
        log.write_text("trial\n1\n")
        time.sleep(1.5)
        log.write_text("trial\n1\ntrial\n2\n")
        time.sleep(1.2)
    out = capsys.readouterr().out
    assert out.count("left") == 1 and "by 2 of 102" in out
    seconds = {"2 min": 120, "3 min": 180}  # the poll is every half second
    assert any(f"about {words} left" in out for words in (*seconds, "100 s", "4 min")), out


def test_durations() -> None:
    assert [duration(s) for s in (3.2, 99, 130, 8000)] == ["3 s", "99 s", "2 min", "2 h 13 min"]
