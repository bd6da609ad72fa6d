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
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from es2fast.training.profiling import summary


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


def test_the_page_of_a_gpu(tmp_path: Path) -> None:
    """Three steps of 0.5 s, whose GPU works 0.4 s each; its timeline holds the ranges again."""
    events = []

    def add(name: str, begin: float, end: float, device: DeviceType, annotation: bool) -> None:
        events.append(
            FunctionEvent(
                len(events), name, thread=0, start_us=begin, end_us=end, use_device="cuda",
                stack=[], input_shapes=[], device_type=device, is_user_annotation=annotation,
            )
        )  # fmt: skip

    for step in range(3):
        begin = 500e3 * step
        add("es2fast:student", begin, begin + 100e3, DeviceType.CPU, True)
        add("aten::mm", begin + 1, begin + 99e3, DeviceType.CPU, False)
        events[-1].append_kernel("gemm", 0, 400e3)
        add("gemm", begin + 5, begin + 400e3 + 5, DeviceType.CUDA, False)
        add("es2fast:student", begin + 5, begin + 400e3 + 5, DeviceType.CUDA, True)
    every = EventList(events, use_device="cuda")
    every._build_tree()
    page = summary(every.key_averages(), wall=1.5, busy=0.5)
    found = {line[:26].strip(): line[26:].split() for line in page.splitlines()}
    assert found["student"] == ["0.1000", "20.0%", "3"]
    assert found["GPU without work"] == ["0.1000", "20.0%"]
