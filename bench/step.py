"""How fast is a whole training step, in how much memory, against plain transformers?

    python bench/step.py --model DIR                 # a real model's folder
    python bench/step.py --shape 8b --dtype bf16     # random weights: toy, 1b, 3b, 8b
    python bench/step.py --model DIR --only plain-lora es2fast-lora-cache
    python bench/step.py --report                    # the table of docs/speed.md

Every contestant gets the same rows in the same steps, the same losses (hinge on two blocks, forward
KL on all harmless tokens), precision and trainable parameters, in a process of its own; with
`--rounds` they take turns. Time: the median step after the warm-up, by the clock and in CPU
seconds, which other programs on the machine disturb less. Extra memory: on a CPU the
process's peak resident set (VmHWM, restarted before the models are loaded) less what it was then
and less the bytes of the model's weights, so a second model, optimizer states, activations and
whatever loading leaves behind count; on a GPU the allocator's peak less the weights. The teacher's
cache is made before, by the package's own `prepare`, whose seconds stand in the rows of `prepare`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench._harness import Rows, conditions, restart_peak, status_bytes  # noqa: E402
from bench._step_workload import (  # noqa: E402
    SHAPES,
    configuration,
    free_memory,
    layers_of,
    model_folder,
)

RESULTS = Path(__file__).parent / "results" / "step.jsonl"


@dataclass(frozen=True)
class Entry:
    """kind: "plain", "liger" or "es2fast"; switch: what an ablation changes, "" for none."""

    kind: str
    trainable: str
    teacher: str = "twin"
    switch: str = ""

    @property
    def name(self) -> str:
        if self.kind != "es2fast":
            return f"{self.kind}-{self.trainable}"
        name = f"es2fast-{self.trainable}-{self.teacher}"
        return f"{name}, {self.switch}" if self.switch else name


_TEACHERS = {
    "lora": ("adapters_off", "cache", "moments"),
    "blocks": ("twin", "cache", "moments"),
    "all": ("twin", "cache"),
}
# switch -> more of the section `train`, part of the package left out
SWITCHES: dict[str, tuple[dict[str, Any], str]] = {
    "no packing": ({"packing": False}, ""),
    "no early exit": ({}, "early_exit"),
    "no fused KL": ({}, "fused_kl"),
    "length_window 8": ({"length_window": 8}, ""),
    "checkpointing": ({"gradient_checkpointing": True}, ""),
    "compile": ({"compile": True}, ""),
}
NEEDED = ("deepspeed", "peft", "pydantic", "transformers", "tokenizers")
ENTRIES = [
    *(Entry(kind, trainable) for trainable in _TEACHERS for kind in ("plain", "liger")),
    *(Entry("es2fast", trainable, t) for trainable, ts in _TEACHERS.items() for t in ts),
    *(Entry("es2fast", "lora", "cache", switch) for switch in SWITCHES),
    Entry("es2fast", "blocks", "twin", "compile"),
]


def main() -> None:
    arguments = parse()
    if arguments.report:
        print(table(RESULTS))
        return
    if arguments.worker is not None:
        print(json.dumps(work(arguments, json.loads(arguments.worker))))
        return
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:  # before gigabytes of weights are made
        raise SystemExit(f"step: {', '.join(absent)} not installed")
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = arguments.model or model_folder(arguments.shape, arguments.work)
    free_memory()  # for the processes that follow
    rows = Rows(arguments.out, conditions(arguments.device) | {"threads": arguments.threads})
    common = dict(
        model=arguments.shape or model.resolve().name, dtype=arguments.dtype,
        rows=f"{arguments.rows}+{arguments.rows}", layers=layers_of(model),
    )  # fmt: skip
    chosen = [e for e in ENTRIES if not arguments.only or e.name in arguments.only]
    kept = {e.teacher for e in chosen} & {"cache", "moments"}
    for kind in sorted(kept) or ["twin"]:
        base = spawn(arguments, model, {"prepare": kind})
        rows.add(name=f"prepare, {kind}", **common, **base)
        if "error" in base:
            raise SystemExit(f"step: {base['error']}")
    failed = []
    for turn in range(arguments.rounds):
        for entry in chosen:
            found = spawn(arguments, model, {"entry": asdict(entry), "base": base})
            rows.add(name=entry.name, **common, turn=turn, **found)
            failed += [entry.name] if "error" in found else []
    if failed:
        raise SystemExit(f"step: failed: {', '.join(failed)}; the errors are in the rows")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a chat model")
    parser.add_argument("--shape", choices=SHAPES, help="random weights in its place")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=_device())
    parser.add_argument("--rows", type=int, default=4, help="of each group per step")
    parser.add_argument("--steps", type=int, default=6, help="those of --warmup among them")
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--rounds", type=int, default=1, help="processes per contestant, in turns")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--only", nargs="+", choices=[e.name for e in ENTRIES], metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="the toy, 3 steps: does it run?")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "step")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.shape, arguments.model, arguments.steps = "toy", None, 3
    if not (arguments.report or arguments.model or arguments.shape):
        parser.error("name a --model or a --shape")
    if not 0 <= arguments.warmup < arguments.steps:
        parser.error(f"--warmup {arguments.warmup}: must be less than --steps {arguments.steps}")
    return arguments


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def spawn(arguments: argparse.Namespace, model: Path, job: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own found, or the error it ended with."""
    command = [
        sys.executable, str(Path(__file__).resolve()), "--model", str(model), "--dtype",
        arguments.dtype, "--device", arguments.device, "--rows", str(arguments.rows), "--steps",
        str(arguments.steps), "--warmup", str(arguments.warmup), "--work", str(arguments.work),
        "--worker", json.dumps(job),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return {"error": told[-1][:300]}


def work(arguments: argparse.Namespace, job: dict[str, Any]) -> dict[str, Any]:
    """A worker's whole life."""
    if "prepare" in job:
        return prepared(arguments, job["prepare"])
    entry = Entry(**job["entry"])
    if entry.kind == "es2fast" and arguments.device == "cpu":
        from es2fast.distributed.allocator import keep_few_products, keep_freed_memory

        keep_freed_memory()  # before any tensor, as in a run
        keep_few_products()
    d0 = {int(layer): value for layer, value in job["base"]["d0"].items()}
    norm0 = {int(layer): value for layer, value in job["base"]["norm0"].items()}
    before = _memory_before(arguments.device)
    if entry.kind == "es2fast":
        more, off = SWITCHES.get(entry.switch, ({}, ""))
        from bench._step_contestants import Ours

        raw = _configuration(arguments, entry.trainable, entry.teacher, **more)
        contestant: Any = Ours(raw, d0, norm0, off)
        inputs: list[Any] = list(range(arguments.steps))
    else:
        contestant, inputs = _plain(arguments, entry, d0)
    seconds, busy, losses, graphs = [], [], [], []
    for given in inputs:
        started, used = time.perf_counter(), time.process_time()
        losses.append(contestant.step(given))  # reads the losses, so a GPU has finished
        seconds.append(time.perf_counter() - started)
        busy.append(time.process_time() - used)
        graphs.append(compiled_graphs())
    timed = sorted(seconds[arguments.warmup :])
    middle = statistics.median(timed)
    extra = _extra_mb(arguments.device, before, contestant.weights_bytes)
    floor: dict[str, float] = {}
    if entry.kind == "es2fast" and not entry.switch:
        gemms = 3 - (entry.teacher == "moments") + (entry.trainable == "all")
        flop = contestant.flop(arguments.steps - 1, gemms)
        floor = {"step_flop": flop, "gemm_rate": gemm_rate(arguments)}
    return dict(
        s_per_step=middle, fastest=timed[0], slowest=timed[-1],
        cpu_s_per_step=statistics.median(busy[arguments.warmup :]),
        first_step_s=seconds[0], cpu_first_step_s=busy[0],
        graphs=graphs[-1], graphs_while_timed=graphs[-1] - graphs[max(arguments.warmup, 1) - 1],
        samples_per_s=2 * arguments.rows / middle,
        extra_mb=extra,
        weights_mb=contestant.weights_bytes / 1e6, stage=getattr(contestant, "stage", None),
        losses=losses, **floor,
    )  # fmt: skip


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # takes memory where nobody compiles
    return 0 if dynamo is None else dynamo.counters["stats"]["unique_graphs"]


def gemm_rate(arguments: argparse.Namespace) -> float:
    """flop/s of torch's product of 512 tokens with the first weight of the model's MLP: the best
    of many, in CPU seconds on a CPU, so that other work on the machine does not flatter a step."""
    import torch
    from transformers import AutoConfig

    from bench._step_contestants import DTYPES

    config = AutoConfig.from_pretrained(arguments.model)
    options: Any = {"dtype": DTYPES[arguments.dtype], "device": arguments.device}
    a = torch.randn(512, config.hidden_size, **options)
    b = torch.randn(config.intermediate_size, config.hidden_size, **options)
    clock = time.process_time if arguments.device == "cpu" else time.perf_counter
    times = []
    for _ in range(50):
        started = clock()
        (a @ b.T)[0, 0].item()
        times.append(clock() - started)
    return 2 * a.numel() * b.shape[0] / min(times)


def prepared(arguments: argparse.Namespace, kind: str) -> dict[str, Any]:
    """d0 and norms of the base model, and the teacher's cache of a kind that is kept on disk."""
    from es2fast.config import parse_config
    from es2fast.distributed import runtime as runtimes
    from es2fast.training.plan import make_plan
    from es2fast.training.prepare import prepare

    config = parse_config(_configuration(arguments, "blocks", kind))
    runtime = runtimes.start(config)
    started = time.perf_counter()
    found, _, _ = prepare(make_plan(config), runtime)
    return dict(d0=found.d0, norm0=found.norm0, seconds=time.perf_counter() - started)


def _configuration(
    arguments: argparse.Namespace, trainable: str, teacher: str, **more: Any
) -> dict[str, Any]:
    return configuration(
        arguments.model, arguments.work, rows=arguments.rows, steps=arguments.steps,
        dtype=arguments.dtype, device=arguments.device, trainable=trainable, teacher=teacher,
        **more,
    )  # fmt: skip


def _plain(
    arguments: argparse.Namespace, entry: Entry, d0: dict[int, float]
) -> tuple[Any, list[Any]]:
    """A contestant of plain transformers, and its rows per step, tokenised before."""
    from bench._step_contestants import Liger, Plain
    from es2fast.config import parse_config
    from es2fast.training.plan import make_plan

    plan = make_plan(parse_config(_configuration(arguments, entry.trainable, "twin")))
    formatter, groups, sampler = plan.formatter, plan.groups, plan.sampler(0)
    steps = []
    for index in range(arguments.steps):
        ((a, b),) = sampler.indices(index)
        harmless = [groups.harmless[i] for i in b]
        steps.append((
            [formatter.prompt_ids(groups.harmful[i]) for i in a],
            [formatter.conversation_ids(p, p.response or "") for p in harmless],
        ))  # fmt: skip
    make = Plain if entry.kind == "plain" else Liger
    contestant = make(
        str(arguments.model), dtype=arguments.dtype, device=arguments.device,
        trainable=entry.trainable, layers=list(d0), d0=d0, pad=formatter.pad_token_id,
    )  # fmt: skip
    return contestant, steps


def _memory_before(device: str) -> int | None:
    """Bytes in use when nothing is loaded but the libraries."""
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return 0
    return restart_peak()


def _extra_mb(device: str, before: int | None, weights: int) -> float | None:
    if before is None:
        return None
    import torch

    peak = torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")
    return (peak - before - weights) / 1e6


def table(path: Path) -> str:
    """The latest row of every contestant, beside the plain one of the same model, precision, rows
    and trainable parameters: ratios of samples/s (by CPU seconds on a CPU) and of extra memory;
    and the time over its floor, the step's own flop at the rate of a large product."""
    latest: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if not row["name"].startswith("prepare"):
            latest[row["model"], row["dtype"], row["rows"], row["device"], row["name"]] = row
    lines = [
        "| model, dtype, rows | trained | contestant | s/step | speed | of floor | extra GB | "
        "of plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    largest_first = sorted(latest.items(), key=lambda one: one[0][2], reverse=True)
    for (model, dtype, rows, device, name), row in largest_first:
        if "error" in row:
            continue
        trained, _, teacher = name.partition("-")[2].partition("-")
        plain = latest.get((model, dtype, rows, device, f"plain-{trained}"))
        shown = name.partition("-")[0] + (f" {teacher}" if teacher else "")
        speed = memory = "–"
        if plain is not None and "error" not in plain:
            key = "cpu_s_per_step" if device == "cpu" else "s_per_step"
            speed = f"{plain[key] / row[key]:.2f}×"
            if row["extra_mb"] and plain["extra_mb"]:
                memory = f"{row['extra_mb'] / plain['extra_mb']:.0%}"
        seconds = row["cpu_s_per_step"] if device == "cpu" else row["s_per_step"]
        # rows before `step_flop` counted the head's products of a common beginning once per row
        ratio = seconds * row["gemm_rate"] / row["step_flop"] if "step_flop" in row else None
        floor = "–" if ratio is None else f"{ratio:.2f}×"
        extra = "–" if row["extra_mb"] is None else f"{row['extra_mb'] / 1e3:.2f}"
        lines.append(
            f"| {model}, {dtype}, {rows} | {trained} | {shown} | {seconds:.2f} | {speed} | "
            f"{floor} | {extra} | {memory} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
