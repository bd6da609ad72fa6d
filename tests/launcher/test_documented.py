"""The commands of README and quickstart, run as they stand there: on a tiny model and few prompts
under the names that the documents use, with two steps for hundreds and two ranks for eight."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from tiny_models import OBJECTS, save_refusing

from es2fast.attacks.registry import make_attacks
from es2fast.config import load_config

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
HARMFUL = [f"{verb} the {thing}" for thing in OBJECTS for verb in ("break", "steal")]
HARMLESS = [f"please {verb} a {thing} ." for thing in OBJECTS for verb in ("draw", "paint")]
OTHERS = [f"please {verb} the {thing} ." for thing in OBJECTS for verb in ("describe", "explain")]


def write_column(path: Path, prompts: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt"], *([prompt] for prompt in prompts)])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the documents' names mean something."""
    place = tmp_path_factory.mktemp("documented") / "with a space, ünïcode"  # as people have them
    save_refusing(place / "meta-llama" / "Llama-3.1-8B-Instruct")
    files = {
        "advbench.csv": HARMFUL[:10],
        "tatsu-lab/alpaca/train.csv": HARMLESS[:10],
        "borderline_safe.csv": OTHERS[:6],
        "jailbreakbench_harmful.csv": HARMFUL[10:],
        "data/harmful.csv": HARMFUL[:10],
        "data/borderline.csv": OTHERS[:6],
        "data/eval_harmful.csv": HARMFUL[10:],
        "data/eval_harmless.csv": HARMLESS[10:],
    }
    for name, prompts in files.items():
        write_column(place / name, prompts)
    for name, prompts in (("data/harmless.jsonl", HARMLESS[:10]), ("my_heldout.jsonl", OTHERS[6:])):
        (place / name).write_text("".join(f'{{"prompt": "{prompt}"}}\n' for prompt in prompts))
    return place


def block_with(page: str, words: str) -> str:
    """The fenced block of a page that holds these words."""
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    return next(block for block in blocks if words in block)


def write_run(place: Path, page: str) -> str:
    """The page's run file with two steps, short answers and two attacks that search nothing; its
    folder for the results."""
    text, changed = re.subn(r"steps: \d+", "steps: 2", block_with(page, "# run.yaml\n"))
    assert changed == 1
    raw = yaml.safe_load(text)
    evaluate = raw.setdefault("evaluate", {})
    make_attacks(evaluate.get("attacks", []))
    evaluate |= {"attacks": ["direct", "prefill"], "max_new_tokens": 16}
    raw["data"]["max_response_tokens"] = 16
    text = yaml.safe_dump(raw)
    (place / "run.yaml").write_text(text)
    return re.search(r"output_dir: (\S+)", text)[1]  # type: ignore[index]


def run(place: Path, lines: str) -> str:
    """What a shell prints that stops at the first command that fails."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(place / "cache"),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_readme(place: Path) -> None:
    out = write_run(place, "README.md")
    commands = block_with("README.md", "es2fast validate run.yaml").replace(
        "--num_gpus 8", "--num_gpus 2"
    )
    assert len(re.findall(r"^(?:es2fast|deepspeed) ", commands, re.MULTILINE)) == 7
    printed = run(place, commands)
    assert "H100" in printed
    assert (place / out / "train.json").is_file()
    assert (place / "runs" / "mean" / "report.html").is_file()
    assert (place / "hardened" / "model.safetensors").is_file()
    assert (place / "runs" / "mean" / "train.json").is_file()
    assert load_config(place / "runs" / "mean" / "config.yaml").train.update_scale == 0.8


def test_quickstart(place: Path) -> None:
    page = "docs/quickstart.md"
    out = write_run(place, page)
    before = block_with(page, "es2fast plan run.yaml")
    train = block_with(page, "CUDA_VISIBLE_DEVICES=0 es2fast train").splitlines()[0]
    blocks = [
        block_with(page, f"es2fast {words}")
        for words in ("average runs", "export runs/llama-8b-mean --out llama-8b-closer")
    ]
    after = "\n".join(
        line
        for line in "".join(blocks).splitlines()
        if not line.startswith("torchrun") and "--push-to-hub" not in line
    )
    second = after.replace(" train.seed=1", " --ranks 1 train.seed=1")  # as many as the first has
    printed = run(place, "\n".join((before, train, second)))
    assert "1 rank" in printed
    assert (place / out / "train.json").is_file()
    assert (place / "runs" / "llama-8b-mean" / "report.html").is_file()
    assert (place / "llama-8b-hardened" / "model.safetensors").is_file()
    assert (place / "runs" / "llama-8b-mean" / "train.json").is_file()
    assert load_config(place / "llama-8b-closer" / "es2fast.yaml").train.update_filter == 1
