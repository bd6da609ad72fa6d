"""Two processes share an evaluation; what comes out is what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_tiny, write_prompts

ROOT = Path(__file__).resolve().parents[2]
ATTACKS = (
    "evaluate.attacks=[direct, {name: prefill, tokens: [0, 3]}, {name: mean_difference, "
    "trial_prompts: 4}, {name: ablation, candidates: 2}, {name: finetune, steps: [2], pairs: 4}, "
    "splice]"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    save_tiny(folder / "base")
    save_tiny(folder / "other", seed=1)
    write_prompts(folder / "data", 16)
    return folder


def run(project: Path, out: Path, *more: str, ranks: int) -> subprocess.CompletedProcess[str]:
    arguments = [
        "evaluate", project / "other", "--base", project / "base", "--limit", 5, "--out", out,
        "--harmful", project / "data/harmful.jsonl", "--harmless", project / "data/harmless.jsonl",
        "evaluate.max_new_tokens=5", "train.device=cpu", *more,
    ]  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks]
    command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "es2fast.cli", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def answers(folder: Path) -> list[Any]:
    lines = map(json.loads, (folder / "answers.jsonl").read_text().splitlines())
    return sorted(  # an answer that a trial repeats on a resume counts once
        {(line["model"], line["attack"], line["key"], line["part"], line["text"]) for line in lines}
    )


def report(folder: Path) -> Any:
    """Without times, and with pushes, whose sums are over other batches, to six digits."""
    found = json.loads((folder / "report.json").read_text())
    found.pop("created")
    for model in found["models"]:
        for attack in model["attacks"].values():
            assert attack.pop("seconds") > 0
            if attack["relative_push"] is not None:
                attack["relative_push"] = f"{attack['relative_push']:.6g}"
    return found


@pytest.mark.launcher
@pytest.mark.slow
def test_two_ranks_give_the_report_of_one_process(project: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run(project, one, ATTACKS, ranks=1)
    assert alone.returncode == 0, alone.stderr
    shared = run(project, two, ATTACKS, ranks=2)
    assert shared.returncode == 0, shared.stderr
    assert "on 2 ranks: 2 models x 6 attacks" in shared.stdout
    assert shared.stdout.count("worst case") == 1
    assert answers(two) == answers(one)
    assert report(two) == report(one)
    assert not list(two.glob("answers.rank*"))
    # half of the answers lost, the rest in a rank's file: one process goes on from there
    lines = (two / "answers.jsonl").read_text().splitlines(keepends=True)
    (two / "answers.jsonl").unlink()
    (two / "answers.rank1.jsonl").write_text("".join(lines[::2]))
    again = run(project, two, ATTACKS, ranks=1)
    assert again.returncode == 0, again.stderr
    assert answers(two) == answers(one) and not list(two.glob("answers.rank*"))


@pytest.mark.launcher
@pytest.mark.slow
def test_a_mistake_is_said_once(project: Path, tmp_path: Path) -> None:
    done = run(project, tmp_path / "out", "evaluate.device_map=auto", ranks=2)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "error: evaluate" in line]
    assert len(said) == 1 and said[0].startswith("error: evaluate.device_map: 'auto' under")


@pytest.mark.launcher
@pytest.mark.slow
def test_an_attack_that_cannot_answer_is_left_out_as_in_one_process(
    project: Path, tmp_path: Path
) -> None:
    (tmp_path / "goals.jsonl").write_text('{"goal": "other", "attack": "please"}\n')
    attacks = (
        f"evaluate.attacks=[direct, {{name: artifacts, path: {tmp_path / 'goals.jsonl'}}}, "
        "{name: gcg, initial: zebra, steps: 1}, prefill]"
    )
    for ranks in (1, 2):
        done = run(project, tmp_path / str(ranks), attacks, ranks=ranks)
        assert done.returncode == 0, done.stderr
    one, two = (report(tmp_path / name) for name in ("1", "2"))
    assert two == one and list(one["models"][0]["attacks"]) == ["direct", "prefill"]
    assert len([text for text in one["warnings"] if "artifacts" in text or "gcg" in text]) == 4
    assert answers(tmp_path / "2") == answers(tmp_path / "1")
