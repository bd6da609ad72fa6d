"""Can a hardened model still write code? Functional correctness beside the base model's.

    python bench/studies/real_code.py --model DIR --work DIR --arms longer \\
        --humaneval HumanEval.jsonl.gz --mbpp sanitized-mbpp.json

pass@1 of one greedy answer through the chat template on HumanEval (Chen et al., arXiv 2107.03374,
164 tasks) and the test part of sanitized MBPP (Austin et al., arXiv 2108.07732, 257 tasks), whose
files are given; one row per model and set in bench/results/real_models_code.jsonl. Answers stay in
the working folder, and what is there is not made again.

It runs what the models write, each program in a process with limits of time and memory and without
files to write. That is no sandbox: use a machine on which nothing can be lost.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench._harness import Rows, conditions
from bench.studies.real_arms import BASE
from bench.studies.real_report import CODE_ROWS
from es2fast.config import DataConfig, ModelConfig
from es2fast.data import Formatter, Prompt, model_fingerprint
from es2fast.modeling.generate import generate
from es2fast.modeling.load import load_merged, load_tokenizer
from es2fast.progress import tqdm
from es2fast.report.stats import mcnemar
from es2fast.run.files import read_lines

TOKENS = 256  # of an answer
PASSED = 77  # exit code behind the last test: a program that ends itself before has not passed
SECONDS = 10  # of a program
BYTES = 2 << 30  # of its memory


@dataclass(frozen=True)
class Task:
    """question: what the model is asked; before, after: what surrounds its code in the program."""

    question: str
    before: str
    after: str


def humaneval(path: Path) -> list[Task]:
    with gzip.open(path, "rt") as file:
        found = [json.loads(line) for line in file]
    ask = "Complete this Python function. Answer with the whole function in one code block.\n\n"
    return [
        Task(
            f"{ask}```python\n{one['prompt']}```",
            one["prompt"],
            f"{one['test']}\ncheck({one['entry_point']})\n",
        )
        for one in found
    ]


def mbpp(path: Path) -> list[Task]:
    found = [one for one in json.loads(path.read_text()) if 11 <= one["task_id"] <= 510]
    return [
        Task(
            f"{one['prompt']} Answer with Python code in one code block. It has to pass this test:"
            f"\n\n{one['test_list'][0]}",
            "\n".join(one["test_imports"]),
            "\n".join(one["test_list"]),
        )
        for one in found
    ]


def code_of(answer: str) -> str:
    """The first code block, closed or cut, or all of it."""
    found = re.search(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    return found[1] if found else answer


def passes(task: Task, answer: str) -> bool:
    program = f"{task.before}\n{code_of(answer)}\n{task.after}\nimport os\nos._exit({PASSED})\n"
    with tempfile.TemporaryDirectory() as place:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", program], cwd=place, env={}, timeout=2 * SECONDS,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                preexec_fn=_limits,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, ValueError):  # ValueError: a NUL in the program
            return False
    return done.returncode == PASSED


def _limits() -> None:
    for kind, most in (
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_AS, BYTES),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def answers(
    folder: Path,
    head: dict[str, Any],
    tasks: Sequence[Task],
    kept: Path,
    formatter: Formatter,
    arguments: argparse.Namespace,
) -> tuple[list[str], float | None]:
    """Of every task, in their order, and the seconds; kept ones where they are those of this model
    to these questions, None seconds then."""
    rows = list(read_lines(kept)) if kept.is_file() else []
    if (
        rows
        and rows[0] == head
        and [r["question"] for r in rows[1:]] == [t.question for t in tasks]
    ):
        return [row["answer"] for row in rows[1:]], None
    start = time.perf_counter()
    model = load_merged(ModelConfig(name=str(folder)), arguments.dtype).eval()
    prompts = [Prompt.of(task.question) for task in tasks]
    order = sorted(range(len(prompts)), key=lambda i: len(formatter.prompt_ids(prompts[i])))
    found = [""] * len(prompts)
    for first in tqdm(range(0, len(order), arguments.batch), f"{kept.stem}", unit="batch"):
        batch = order[first : first + arguments.batch]
        made = generate(
            model, formatter, [prompts[i] for i in batch], max_new_tokens=TOKENS,
            device=torch.device("cpu"),
        )  # fmt: skip
        for i, text in zip(batch, made, strict=True):
            found[i] = text
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = [head, *({"question": t.question, "answer": a} for t, a in zip(tasks, found))]
    kept.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return found, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", type=Path, required=True, help="folder of the base model")
    parser.add_argument("--label", default="Qwen2.5-Coder-0.5B-Instruct", help="its name in rows")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--work", type=Path, default=Path("runs/real_models"))
    parser.add_argument("--arms", required=True, help="trained ones, with commas between them")
    parser.add_argument("--humaneval", type=Path)
    parser.add_argument("--mbpp", type=Path)
    parser.add_argument("--batch", type=int, default=41, help="tasks answered at a time")
    parser.add_argument("--out", type=Path, default=CODE_ROWS)
    arguments = parser.parse_args()
    formatter = Formatter(load_tokenizer(ModelConfig(name=str(arguments.model))), DataConfig())
    out = Rows(arguments.out, conditions("cpu"))
    for name, read in (("humaneval", humaneval), ("mbpp", mbpp)):
        path = getattr(arguments, name)
        tasks = [] if path is None else read(path)
        passed: dict[str, list[bool]] = {}
        for arm in (BASE, *arguments.arms.split(",")) if tasks else ():
            folder = arguments.model if arm == BASE else arguments.work / arm / "model"
            head = {
                "weights": model_fingerprint(str(folder)),
                "dtype": arguments.dtype,
                "tokens": TOKENS,
            }
            kept = arguments.work / "code" / f"{arm}-{name}.jsonl"
            texts, seconds = answers(folder, head, tasks, kept, formatter, arguments)
            passed[arm] = [passes(*pair) for pair in zip(tasks, texts, strict=True)]
            pairs = list(zip(passed[BASE], passed[arm], strict=True))
            lost, won = pairs.count((True, False)), pairs.count((False, True))
            out.add(
                base=arguments.label, model=arm, tasks=name, n=len(tasks), passed=sum(passed[arm]),
                lost=lost, won=won, p=mcnemar(lost, won), seconds=seconds, **head,
            )  # fmt: skip


if __name__ == "__main__":
    main()
