"""`train.profile`: the page and the trace of a real training of a few steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_models import save_tiny, write_prompts


@pytest.mark.slow
def test_a_profile_names_the_parts_of_a_step(tmp_path: Path) -> None:
    raw = {
        "model": {"name": str(save_tiny(tmp_path / "model"))},
        "data": write_prompts(tmp_path / "data"),
        "layers": [1, 2],
        "train": {"steps": 5, "micro_batch_size": 2, "device": "cpu", "profile": True},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "es2fast.train", "--config", str(tmp_path / "run.yaml")]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "run" / "profile.txt").read_text()
    assert page in done.stdout
    shares = {}
    for line in page.splitlines()[2:-1]:
        name, _, rest = line.partition("  ") if not line.startswith(" ") else (line[:26], "", "")
        if rest:
            shares[name.strip()] = float(rest.split()[1].rstrip("%"))
    assert {"teacher", "student", "head", "separation", "backward", "optimizer"} <= shares.keys()
    assert all(shares[name] > 0 for name in ("teacher", "student", "head", "backward"))
    assert sum(v for k, v in shares.items() if "exchanges" not in k) == pytest.approx(100, abs=2)
    attention = next(line for line in page.splitlines() if "of it attention" in line)
    assert attention.split()[-1] == "12"  # three passes of four blocks, without their norms
    assert "cores used" in page
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("es2fast:student") == 3  # steps that were looked at
