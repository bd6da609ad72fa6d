"""What can a hardened model no longer do? Task by task beside the base model.

    python bench/studies/real_abilities.py --model DIR --work DIR --arms longer \\
        --humaneval HumanEval.jsonl.gz --mbpp sanitized-mbpp.json \\
        --benign jbb_benign.csv --borderline 300

- **Code**: pass@1 of one greedy answer through the chat template on HumanEval (Chen et al., arXiv
  2107.03374, 164 tasks) and the test part of sanitized MBPP (Austin et al., arXiv 2108.07732, 257
  tasks), whose files are given.
- **Answers to harmless prompts**, not refused by the library's rules: the benign half of
  JailbreakBench (Chao et al., arXiv 2404.01318), each of which is about the same thing as a harmful
  one, whose file is given, and prompts drawn from `builtin:borderline`, which no arm but those that
  say so (`Arm.more`) trains on.

One row per model and set in bench/results/real_models_abilities.jsonl. Answers stay in the working
folder, and what is there is not made again.

It runs what the models write, each program in a process with limits of time and memory and without
files to write. That is no sandbox: use a machine on which nothing can be lost.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench._harness import Rows, conditions
from bench.studies.real_arms import BASE
from bench.studies.real_report import ABILITY_ROWS
from es2fast.config import DataConfig, DataSource, ModelConfig
from es2fast.data import Formatter, Prompt, model_fingerprint
from es2fast.data.prompts import read_source
from es2fast.judges.rules import is_refusal
from es2fast.modeling.generate import generate
from es2fast.modeling.load import free_memory, load_merged, load_tokenizer
from es2fast.progress import tqdm
from es2fast.report.stats import mcnemar
from es2fast.run.files import read_lines

CODE_TOKENS, TOKENS = 256, 32  # of an answer: a program, and as in the study's other answers
PASSED = 77  # exit code behind the last test: a program that ends itself before has not passed
SECONDS = 10  # of a program
BYTES = 2 << 30  # of its memory


@dataclass(frozen=True)
class Task:
    """question: what the model is asked; before, after: what surrounds its code in the program."""

    question: str
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Tasks:
    """What a model is asked, how long its answers may be, and which of them pass."""

    tasks: Sequence[Task]
    tokens: int
    passes: Callable[[Task, str], bool]


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


def benign(path: Path) -> list[Task]:
    found = read_source(DataSource(source=str(path)), "--benign").prompts
    return [Task(prompt.text) for prompt in found]


def borderline(count: int) -> list[Task]:
    """So many of the built-in prompts, of all kinds, always the same."""
    found = read_source(DataSource(source="builtin:borderline"), "--borderline").prompts
    return [Task(prompt.text) for prompt in random.Random(0).sample(found, count)]


def answered(task: Task, answer: str) -> bool:
    return not is_refusal(answer)


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
    asked: Tasks,
    kept: Path,
    formatter: Formatter,
    arguments: argparse.Namespace,
) -> tuple[list[str], float | None]:
    """Of every task, in their order, and the seconds; kept ones where they are those of this model
    to these questions, None seconds then."""
    rows = list(read_lines(kept)) if kept.is_file() else []
    questions = [task.question for task in asked.tasks]
    if rows and rows[0] == head and [row["question"] for row in rows[1:]] == questions:
        return [row["answer"] for row in rows[1:]], None
    start = time.perf_counter()
    model = load_merged(ModelConfig(name=str(folder)), arguments.dtype).eval()
    prompts = [Prompt.of(question) for question in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(formatter.prompt_ids(prompts[i])))
    found = [""] * len(prompts)
    for first in tqdm(range(0, len(order), arguments.batch), f"{kept.stem}", unit="batch"):
        batch = order[first : first + arguments.batch]
        made = generate(
            model, formatter, [prompts[i] for i in batch], max_new_tokens=asked.tokens,
            device=torch.device("cpu"),
        )  # fmt: skip
        for i, text in zip(batch, made, strict=True):
            found[i] = text
    del model
    free_memory()
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = [head, *({"question": q, "answer": a} for q, a in zip(questions, found))]
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
    parser.add_argument("--benign", type=Path, help="JailbreakBench's harmless half")
    parser.add_argument("--borderline", type=int, default=0, help="how many built-in prompts")
    parser.add_argument("--batch", type=int, default=41, help="tasks answered at a time")
    parser.add_argument("--out", type=Path, default=ABILITY_ROWS)
    arguments = parser.parse_args()
    formatter = Formatter(load_tokenizer(ModelConfig(name=str(arguments.model))), DataConfig())
    out = Rows(arguments.out, conditions("cpu"))
    for name, asked in sets(arguments).items():
        passed: dict[str, list[bool]] = {}
        for arm in (BASE, *arguments.arms.split(",")):
            folder = arguments.model if arm == BASE else arguments.work / arm / "model"
            head = {
                "weights": model_fingerprint(str(folder)),
                "dtype": arguments.dtype,
                "tokens": asked.tokens,
            }
            kept = arguments.work / "abilities" / f"{arm}-{name}.jsonl"
            texts, seconds = answers(folder, head, asked, kept, formatter, arguments)
            passed[arm] = [asked.passes(*pair) for pair in zip(asked.tasks, texts, strict=True)]
            pairs = list(zip(passed[BASE], passed[arm], strict=True))
            lost, won = pairs.count((True, False)), pairs.count((False, True))
            out.add(
                base=arguments.label, model=arm.replace("-seed", ", seed "), tasks=name,
                n=len(pairs), passed=sum(passed[arm]), lost=lost, won=won, p=mcnemar(lost, won),
                seconds=seconds, **head,
            )  # fmt: skip


def sets(arguments: argparse.Namespace) -> dict[str, Tasks]:
    """What was asked for, by name."""
    found = {}
    if arguments.humaneval:
        found["humaneval"] = Tasks(humaneval(arguments.humaneval), CODE_TOKENS, passes)
    if arguments.mbpp:
        found["mbpp"] = Tasks(mbpp(arguments.mbpp), CODE_TOKENS, passes)
    if arguments.benign:
        found["benign"] = Tasks(benign(arguments.benign), TOKENS, answered)
    if arguments.borderline:
        found["borderline"] = Tasks(borderline(arguments.borderline), TOKENS, answered)
    return found


if __name__ == "__main__":
    main()
