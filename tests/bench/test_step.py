"""bench/step.py: it runs end to end, and its contestants compute the same losses."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from bench._step_workload import model_folder
from bench.step import ENTRIES, RESULTS, Entry, main, table, work


def losses(folder: Path) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Of every contestant, by what is trained; the one that changes the library comes last."""
    arguments = argparse.Namespace(
        model=model_folder("toy", folder), work=folder, rows=3, steps=3, warmup=1,
        dtype="fp32", device="cpu",
    )  # fmt: skip
    work(arguments, {"prepare": "moments"})
    base = work(arguments, {"prepare": "cache"})
    switched = ("", "no packing", "no early exit", "no fused KL", "checkpointing")
    entries = [
        entry
        for entry in ENTRIES
        if entry.kind != "liger"
        and entry.switch in switched
        and not (entry.switch and entry.trainable != "lora")
    ]
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for entry in sorted(entries, key=lambda entry: entry.switch == "no fused KL"):
        row = work(arguments, {"entry": asdict(entry), "base": base})
        found.setdefault(entry.trainable, {})[entry.name] = row["losses"]
    return found


@pytest.mark.slow
def test_contestants_agree_in_fp32(tmp_path: Path) -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        everything = apart.submit(losses, tmp_path).result()
    assert set(everything) == {"lora", "blocks", "all"}
    for trainable, found in everything.items():
        plain = found.pop(f"plain-{trainable}")
        assert plain[0]["sep"] > 0 and plain[-1]["kl"] > 1e-6 and found
        for name, other in found.items():
            for step, (own, expected) in enumerate(zip(other, plain)):
                assert own["sep"] == pytest.approx(expected["sep"], rel=1e-4), (name, step)
                assert own["kl"] == pytest.approx(expected["kl"], rel=0.02, abs=1e-7), (name, step)


@pytest.mark.slow
def test_a_contestant_has_a_process_of_its_own_and_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["step.py", "--quick", "--dtype", "fp32", "--work", str(tmp_path), "--out"]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "rows"), "--only", "plain-blocks"])
    main()
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["prepare, twin", "plain-blocks"]
    assert rows[1]["s_per_step"] > 0 and rows[1]["extra_mb"] > 0 and len(rows[1]["losses"]) == 3
    assert "| toy, fp32, 4+4 | blocks | plain |" in table(tmp_path / "rows")


def test_the_document_holds_the_table_of_the_rows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    assert table(RESULTS) in page, "run python bench/step.py --report"


def test_names_are_unique() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert Entry("es2fast", "lora", "cache", "no packing").name == "es2fast-lora-cache, no packing"
