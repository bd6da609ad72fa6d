"""`es2fast tune` under the real launcher: a good trial, one that collapses, one that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_models import save_tiny, write_prompts

from es2fast.config import load_config
from es2fast.report.schema import read_report
from es2fast.report.verdict import damage
from es2fast.tune.front import pick
from es2fast.tune.space import Space
from es2fast.tune.study import REASON, StudyFolder, claim, open_study, search
from es2fast.tune.trial import LOG, RECIPE, run_trial

pytest.importorskip("optuna")
pytestmark = [pytest.mark.launcher, pytest.mark.slow]


def run_file(folder: Path) -> Path:
    model = save_tiny(folder / "model")
    sources = write_prompts(folder / "data", count=16)
    for name, path in list(sources.items()):
        lines = Path(path).read_text().splitlines(keepends=True)
        Path(path).write_text("".join(lines[:10]))
        sources[f"eval_{name}"] = str(folder / "data" / f"eval_{name}.jsonl")
        Path(sources[f"eval_{name}"]).write_text("".join(lines[10:]))
    raw = {
        "model": {"name": str(model), "dtype": "fp32"},
        "data": sources | {"near_duplicates": None, "cache_dir": str(folder)},
        "train": {"steps": 2, "micro_batch_size": 1, "device": "cpu", "warmup_ratio": 0.0,
                  "overwrite": True, "trainable": "all"},
        "safeguards": {"patience": 1},
        "evaluate": {"attacks": ["direct"], "max_new_tokens": 4, "limit": 6, "fit_limit": 8},
        "output_dir": str(folder / "out"),
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


def test_trials_end_in_their_own_ways_and_the_search_goes_on(tmp_path: Path) -> None:
    config = load_config(run_file(tmp_path))
    space_file = tmp_path / "space.yaml"
    space_file.write_text("train.lr: {choices: [0.001, 100.0]}\nlayers: {choices: [[1, 2], [9]]}\n")
    space, folder = Space.read(space_file, config), StudyFolder(tmp_path / "out")
    claim(folder, config, space_file)
    study = open_study(folder, create=True)
    for lr, layers in ((0.001, "[9]"), (100.0, "[1, 2]"), (0.001, "[1, 2]")):
        study.enqueue_trial({"train.lr": lr, "layers": layers})
    assert len(search(folder, config, space, trials=2, ranks=1).best_trials) == 0
    study = search(folder, config, space, trials=3, ranks=1)  # as a second call does
    assert [trial.state.name for trial in study.trials] == ["FAIL", "PRUNED", "COMPLETE"]
    reasons = [trial.user_attrs.get(REASON) for trial in study.trials]
    assert "block 9" in reasons[0] and "training stopped at step" in reasons[1]
    report = read_report(folder.trial(2) / "report.json")
    base, tuned = report.model("base"), report.model("tuned")
    useful = tuned.attacks["direct"].useful
    assert study.trials[2].values == [useful, damage(base, tuned)]
    picked = pick(study, folder, 2)
    assert load_config(picked).train.lr == 0.001 and load_config(picked).layers == [1, 2]

    log = folder.trial(2) / LOG
    written = log.stat().st_mtime_ns
    found = run_trial(load_config(folder.trial(2) / RECIPE), 1, [])  # as one that is queued again
    assert [found.worst, found.damage] == study.trials[2].values
    assert log.stat().st_mtime_ns == written  # its training had ended

    again = search(folder, config, space, trials=3, ranks=1)  # nothing is left to do
    assert len(again.trials) == 3
