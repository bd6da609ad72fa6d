"""The KL budget holds where it binds: an unbounded loss on the toy, from a lambda far too small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from es2fast.config import DataConfig, ModelConfig, load_config
from es2fast.data import Formatter, load_groups
from es2fast.distributed.launch import launch
from es2fast.evaluation.teacher import SavedTeacher, token_batches
from es2fast.modeling.load import load_causal_lm, load_tokenizer

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
BUDGET = 0.03


def test_final_kl_is_within_the_budget(toy: Path, tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "model": {"name": str(toy / "model")},
        "data": {name: str(toy / f"data/{name}.jsonl") for name in ("harmful", "harmless")},
        "layers": [2, 4],
        "separation": {"loss": "l2"},
        "kl": {"weight": 0.1, "budget": BUDGET},
        "train": {"steps": 50, "micro_batch_size": 4, "lr": 3e-4, "device": "cpu"},
        "deepspeed": "zero2",
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    launch(tmp_path / "run.yaml", ranks=2, device="cpu")
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    summary = json.loads((tmp_path / "run/train.json").read_text())
    assert max(row["kl"] for row in rows) > 1.5 * BUDGET  # it binds
    assert rows[-1]["kl_weight"] > 10 * rows[0]["kl_weight"]
    assert 0.2 * BUDGET < summary["kl"] <= 1.1 * BUDGET
    assert rows[-1]["distance_over_base/2"] > 2.0  # and is not met by standing still
    assert summary["update_scale"] > 0.7

    config = load_config(tmp_path / "run.yaml")
    groups = load_groups(config.data)
    formatter = Formatter(load_tokenizer(config.model), DataConfig())
    base, tuned = (
        load_causal_lm(ModelConfig(name=str(folder)), "fp32")
        for folder in (toy / "model", tmp_path / "run/model")
    )
    responses = [prompt.response or "" for prompt in groups.harmless]
    batches = token_batches(formatter, groups.harmless, responses, 50)
    teacher = SavedTeacher(tmp_path / "teacher", "")
    teacher.write(base, batches, "base")
    measured = teacher.compare(tuned, batches, "tuned").kl
    assert measured is not None
    assert measured <= 1.2 * BUDGET  # all training prompts, of which the run measured a part
