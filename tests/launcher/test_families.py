"""Every supported family trains, and what is saved is what was trained."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, HEAD_FAMILIES, MORE_FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.families_worker import IDS

TRAINED = [*FAMILIES, *MORE_FAMILIES, *HEAD_FAMILIES]
pytestmark = [pytest.mark.launcher, pytest.mark.slow]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("families")
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, str(tests / "launcher/families_worker.py"), "--out", str(folder / "r.pt"),
         "--folder", str(folder), *TRAINED],
        env=os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(tests)},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, torch.load(folder / "r.pt", weights_only=False)


@pytest.mark.parametrize("family", TRAINED)
def test_three_steps_separate_and_stay_near_the_base(
    trained: tuple[Path, dict[str, Any]], family: str
) -> None:
    steps = trained[1][family]["steps"]
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert abs(steps[0]["kl_sum"]) < 1e-4  # the student starts as the teacher
    assert steps[-1]["kl_sum"] / steps[-1]["kl_tokens"] > 1e-7  # and has moved
    for layer in (0, 2):
        assert steps[0][f"distance/{layer}"] > 0


@pytest.mark.parametrize("family", TRAINED)
def test_saved_model_reloads_with_the_same_logits(
    trained: tuple[Path, dict[str, Any]], family: str
) -> None:
    folder, results = trained
    saved = folder / family / "saved"
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    AutoTokenizer.from_pretrained(saved)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        before = tiny_model(family)(input_ids=IDS).logits
    torch.testing.assert_close(found, results[family]["logits"], rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 1e-4
    assert not list(saved.glob("*.bin"))
