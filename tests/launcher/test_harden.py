"""`es2fast harden` from end to end under the real launcher, and once more where it was stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from tiny_models import save_tiny, write_prompts

from es2fast.errors import RunInterrupted, UserError
from es2fast.evaluation.run import evaluate_run
from es2fast.harden.recipe import resolve
from es2fast.harden.run import RECIPE, attack_both, run_harden
from es2fast.run.folder import RunFolder

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
SHORT = ["train.device=cpu", "train.steps=3", "train.micro_batch_size=1", "layer_choice.prompts=12",
         "evaluate.max_new_tokens=6", "evaluate.limit=6", "evaluate.fit_limit=8",
         "evaluate.attacks=[direct,{name: prefill,tokens: [2]}]"]  # fmt: skip


def files_of(folder: Path) -> dict[str, list[str]]:
    names = ("harmful", "harmless", "eval_harmful", "eval_harmless")
    files = {name.replace("_", "-"): [str(folder / f"{name}.jsonl")] for name in names}
    return files | {"borderline": ["none"]}


def test_from_a_name_to_a_verdict_and_on_from_where_it_stopped(
    toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = [*SHORT, f"data.cache_dir={tmp_path}"]

    def config(*changed: str):
        return resolve(str(toy / "model"), out, quick=True, files=files_of(toy / "data"),
                       overrides=[*more, *changed])  # fmt: skip

    report = run_harden(config(), ranks=1)
    printed = capfd.readouterr().out
    steps = re.findall(r"^\[(\d)/4\] (\w+): .*\(.*\d+ (?:s|min)\)$", printed, re.MULTILINE)
    assert steps == [("1", "plan"), ("2", "train"), ("3", "evaluate")]
    last = printed.strip().splitlines()[-1]
    assert last.startswith("Verdict: ") and "(n = 6)" in last
    assert report.names == ["base", "tuned"] and (out / RECIPE).is_file()
    assert {"direct", "prefill"} == set(report.attack_names)
    names = ("model/adapter_model.safetensors", "model/README.md", "report.html", "answers.jsonl")
    assert "| **worst case**" in (out / "model/README.md").read_text()

    times = {name: (out / name).stat().st_mtime_ns for name in names}
    assert run_harden(config(), ranks=1) == report  # nothing is done twice
    assert times == {name: (out / name).stat().st_mtime_ns for name in names}
    printed = capfd.readouterr().out
    assert "train: finished before" in printed and "evaluate: finished before" in printed

    evaluate_run(out, ["evaluate.attacks=[direct]", "evaluate.limit=4"])
    again = run_harden(config(), ranks=1)  # that was another evaluation
    assert [model.attacks for model in again.models] == [model.attacks for model in report.models]

    with pytest.raises(
        UserError, match=r"another train\.steps \(3 there, 5 now\), evaluate\.limit \("
    ):
        run_harden(config("evaluate.limit=4", "train.steps=5"), ranks=1)

    answers = (out / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "answers.jsonl").write_text("".join(answers[:-4]))  # as if stopped in its last batch
    (out / "report.json").unlink()
    again = run_harden(config(), ranks=1)
    assert (out / "answers.jsonl").read_text().splitlines(keepends=True) == answers
    assert [model.attacks["direct"].outcomes for model in again.models] == [
        model.attacks["direct"].outcomes for model in report.models
    ]

    folder = RunFolder(out)
    for path in (folder.report, folder.answers):
        path.unlink()
    shared = attack_both(folder, 2)
    assert "on 2 ranks: 2 models x 2 attacks" in capfd.readouterr().out
    for mine, other in zip(shared.models, report.models):
        assert {name: one.outcomes for name, one in mine.attacks.items()} == {
            name: one.outcomes for name, one in other.attacks.items()
        }

    shorter = run_harden(config("evaluate.limit=4"), ranks=1, overwrite=True)
    assert shorter.model("tuned").attacks["direct"].n == 4
    assert (out / names[0]).stat().st_mtime_ns == times[names[0]]  # only evaluated anew
    assert run_harden(config("evaluate.limit=4"), ranks=1) == shorter


def test_the_mean_of_two_runs(toy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    data = Path(shutil.copytree(toy / "data", tmp_path / "data"))

    def config(*changed: str):
        return resolve(str(toy / "model"), out, quick=True, files=files_of(data),
                       overrides=[*SHORT, f"data.cache_dir={tmp_path}", *changed])  # fmt: skip

    (out / "seeds").mkdir(parents=True)
    with pytest.raises(UserError, match=r"seeds' is there, which no run of es2fast wrote"):
        run_harden(config(), ranks=1)
    shutil.rmtree(out)
    with pytest.raises(UserError, match=r"--mean-of: 2 runs with train\.trainable=blocks have no"):
        run_harden(config("train.trainable=blocks"), ranks=1, mean_of=2)
    assert not out.exists()
    report = run_harden(config(), ranks=1, mean_of=2)
    steps = re.findall(
        r"^\[(\d)/5\] ([\w, ]+): .*\(.*\d+ (?:s|min)\)$", capfd.readouterr().out, re.M
    )
    assert steps == [("1", "plan"), ("2", "train, seed 0"), ("3", "train, seed 1"),
                     ("4", "evaluate")]  # fmt: skip
    parts = [out / "seeds" / seed / "model" / "adapter_model.safetensors" for seed in "01"]
    mean = out / "model" / "adapter_model.safetensors"
    sizes = [part.stat().st_size for part in parts]
    assert sizes[0] == sizes[1] and mean.stat().st_size > 1.9 * sizes[0]  # ranks add up
    assert parts[0].read_bytes() != parts[1].read_bytes()
    told = json.loads((out / "train.json").read_text())
    assert told["mean_of_seeds"] == "0, 1" and told["kl"] is None
    assert "| mean of the runs with seeds | 0, 1 |" in (out / "model/README.md").read_text()
    files = [*parts, mean, out / "report.json"]
    times = [path.stat().st_mtime_ns for path in files]
    assert run_harden(config(), ranks=1, mean_of=2) == report  # nothing is done twice
    assert [path.stat().st_mtime_ns for path in files] == times
    with pytest.raises(UserError, match=r"holds a model of another --mean-of; choose another"):
        run_harden(config(), ranks=1)

    (out / "train.json").unlink()  # as if it was stopped while the mean was written
    before = mean.read_bytes()
    for changed, count, words in (
        ("train.steps=5", 2, r"another train\.steps \(3 there, 5 now\)"),
        ("train.steps=3", 1, r"a model of another --mean-of"),
    ):
        with pytest.raises(UserError, match=words):
            run_harden(config(changed), ranks=1, mean_of=count)
    with pytest.raises(UserError, match=r"would have \d+; give --ranks 1 or another --out"):
        run_harden(config(), ranks=2, mean_of=2)
    with pytest.raises(UserError, match=r"seeds/0' holds a finished training with another train"):
        run_harden(config("train.micro_batch_size=2"), ranks=1, mean_of=2)
    text = (data / "harmful.jsonl").read_text()
    (data / "harmful.jsonl").write_text("".join(text.splitlines(keepends=True)[1:]))
    with pytest.raises(UserError, match=r"a finished training with another the prompts in data"):
        run_harden(config(), ranks=1, mean_of=2)
    (data / "harmful.jsonl").write_text(text)
    again = run_harden(config(), ranks=1, mean_of=2)
    assert [path.stat().st_mtime_ns for path in parts] == times[:2]
    assert mean.read_bytes() == before and again.names == report.names


def test_a_model_that_refuses_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A random model: the anchor teaches the fallback and says so; asked to stop, it goes on with
    the same command; newer weights are noticed."""
    model = save_tiny(tmp_path / "model")
    sources = write_prompts(tmp_path / "data", count=16)
    for name, path in sources.items():
        lines = Path(path).read_text().splitlines(keepends=True)
        Path(path).write_text("".join(lines[:10]))
        (tmp_path / "data" / f"eval_{name}.jsonl").write_text("".join(lines[10:]))
    config = resolve(
        str(model), tmp_path / "out", quick=True, files=files_of(tmp_path / "data"),
        overrides=[*SHORT, "data.near_duplicates=null", f"data.cache_dir={tmp_path}",
                   "data.max_length=48", "refusal.prefill.tokens=4"],
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out/STOP").touch()
    with pytest.raises(RunInterrupted, match="was asked to stop; the same command again continues"):
        run_harden(config, ranks=1)
    assert not (tmp_path / "out/model").exists() and not (tmp_path / "out/STOP").exists()
    with pytest.raises(UserError, match="the deepspeed launcher ended with code"):
        run_harden(config, ranks=2)  # another run: what was trained is not thrown away for it
    before = capfd.readouterr()
    assert "micro_batch_size" in before.err
    report = run_harden(config, ranks=1)
    printed = before.out + capfd.readouterr().out
    assert "continues after step 2" in printed  # the wish is seen during the second
    assert "refuses none of the 10 harmful prompts; the anchor teaches refusal.fallback" in printed
    assert printed.strip().splitlines()[-1].startswith("Verdict: ")
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all("refusal" in row for row in rows)
    assert report.model("tuned").harmless.kl_to_base != 0
    later = (tmp_path / "out/train.json").stat().st_mtime + 5
    os.utime(model / "model.safetensors", (later, later))
    with pytest.raises(UserError, match=r"weights of model\.name have changed"):
        run_harden(config, ranks=1)
