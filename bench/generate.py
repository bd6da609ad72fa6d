"""How fast are greedy answers, against transformers' own loop and against their GEMMs alone?

    python bench/generate.py --model DIR --dtype bf16 --prompts 64 --tokens 64
    python bench/generate.py --report                          # the table of bench/README.md

Both contestants answer the same batches, longest prompts first, in turns; harmless prompts in the
model's own chat template, whose answers end where the model ends them. The floor of a run is the
sum over its passes of the larger of two times: that of the flop of all weight products at the best
GEMM rate, and that of reading the weights once at the bandwidth of a matrix-vector product, both
measured in the same process. Ratios are of CPU seconds where the device is a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench._harness import Rows, conditions  # noqa: E402
from bench.studies.real_prompts import ordinary_prompts  # noqa: E402
from es2fast.config import DataConfig  # noqa: E402
from es2fast.data import Formatter, Prompt  # noqa: E402
from es2fast.modeling.decoding import decode  # noqa: E402
from es2fast.modeling.load import DTYPES  # noqa: E402
from es2fast.modeling.taps import blocks, hidden_of, hooks, position_ids  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "generate.jsonl"
CONTESTANTS: dict[str, Callable[..., Any] | None] = {"transformers": None, "es2fast": decode}


def main() -> None:
    arguments = parse()
    if arguments.report:
        print(table(arguments.out))
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=DTYPES[arguments.dtype])
    model = model.to(arguments.device).eval()
    formatter = Formatter(AutoTokenizer.from_pretrained(arguments.model), DataConfig())
    asked = [formatter.prompt_ids(Prompt.of(t)) for t in ordinary_prompts()[: arguments.prompts]]
    asked.sort(key=len, reverse=True)
    batches = [asked[i : i + arguments.batch] for i in range(0, len(asked), arguments.batch)]
    rows = Rows(arguments.out, conditions(arguments.device) | {"threads": arguments.threads})
    common = dict(
        model=arguments.model.resolve().name, dtype=arguments.dtype, prompts=len(asked),
        batch=arguments.batch, tokens=arguments.tokens,
    )  # fmt: skip
    limits = rates(model, arguments.batch)
    answers: dict[str, list[list[int]]] = {}
    for turn in range(arguments.rounds):
        for name in CONTESTANTS:
            found, passes, times = answered(model, formatter, batches, arguments.tokens, name)
            least = floor(model, passes, limits)
            same = answers.setdefault(name, found) == next(iter(answers.values()))
            rows.add(name=name, **common, turn=turn, **times, floor_s=least, **limits,
                     rows_computed=sum(r for r, _ in passes), answers_equal=same,
                     tokens_written=sum(map(len, found)))  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="folder of a chat model")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--prompts", type=int, default=64, help="at most 240")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="length at which answers are cut")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of torch, on a CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.report or arguments.model):
        parser.error("name a --model")
    return arguments


def answered(
    model: Any, formatter: Formatter, batches: list[list[list[int]]], tokens: int, name: str
) -> tuple[list[list[int]], list[tuple[int, int]], dict[str, float]]:
    """Answers as ids up to their stop token; (rows, tokens) of every pass; seconds."""
    found: list[list[int]] = []
    started, used = time.perf_counter(), time.process_time()
    with seen(model) as passes:
        for batch in batches:
            padded = {key: value.to(model.device) for key, value in formatter.pad(batch).items()}
            out = model.generate(
                **padded, position_ids=position_ids(padded["attention_mask"]),
                max_new_tokens=tokens, do_sample=False, eos_token_id=formatter.stop_token_ids,
                pad_token_id=formatter.pad_token_id, custom_generate=CONTESTANTS[name],
            )  # fmt: skip
            width = padded["input_ids"].shape[1]
            found += [_cut(row, formatter.stop_token_ids) for row in out[:, width:].tolist()]
    times = {"s": time.perf_counter() - started, "cpu_s": time.process_time() - used}
    return found, passes, times


def _cut(row: list[int], stop: list[int]) -> list[int]:
    ends = [i for i, token in enumerate(row) if token in stop]
    return row[: ends[0] + 1] if ends else row


@contextmanager
def seen(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every pass, as the first block sees them."""
    passes: list[tuple[int, int]] = []

    def count(module: Any, args: Any, output: Any) -> None:
        rows, tokens = hidden_of(output).shape[:2]
        passes.append((rows, tokens))

    with hooks([blocks(model)[0].register_forward_hook(count)]):
        yield passes


@torch.no_grad()
def rates(model: Any, batch: int) -> dict[str, float]:
    """The machine's limits: GFLOP/s of a GEMM of the model's largest block weight with `batch`
    rows or eight times as many, whichever is faster; GB/s of its head by one vector."""
    weight = max((p for p in blocks(model).parameters() if p.dim() == 2), key=lambda p: p.numel())
    head = model.get_output_embeddings().weight
    gemms = [_gflops(weight, rows, 8) for rows in (batch, 8 * batch)]
    vector = _gflops(head, 1, 4) / 2 * head.element_size()
    return {"gflops": max(gemms), "gb_per_s": vector}


def _gflops(weight: torch.Tensor, rows: int, repeats: int) -> float:
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(weight.dtype)
    samples = []
    for _ in range(repeats + 1):
        started = _clock(weight.device)
        torch.nn.functional.linear(x, weight)
        samples.append(_clock(weight.device) - started)
    return 2e-9 * rows * weight.numel() / statistics.median(samples[1:])


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


def floor(model: Any, passes: list[tuple[int, int]], limits: dict[str, float]) -> float:
    """Seconds below which these passes cannot come, all threads at work."""
    body = sum(p.numel() for p in blocks(model).parameters())
    head = model.get_output_embeddings().weight
    read = (body + head.numel()) * head.element_size() / (1e9 * limits["gb_per_s"])

    def one(rows: int, tokens: int) -> float:
        flop = 2.0 * rows * (tokens * body + head.numel())
        return max(flop / (1e9 * limits["gflops"]), read)

    return sum(one(*shape) for shape in passes)


def table(path: Path) -> str:
    """Medians over the turns of the latest command of every setting."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        keys = ("model", "dtype", "prompts", "batch", "tokens", "threads", "device")
        key = tuple(row[k] for k in keys)
        groups.setdefault((*key, row["name"]), []).append(row)
    lines = [
        "| model, dtype | prompts × tokens, batch | threads | loop | rows computed | s | CPU s | "
        "tokens/s | speed | of floor |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (*key, name), rows in groups.items():
        model, dtype, prompts, batch, tokens, threads, device = key
        rows = [row for row in rows if row["commit"] == rows[-1]["commit"]]
        busy = _seconds(rows, device)
        speed = _seconds(groups[*key, "transformers"], device) / busy
        wall, cpu = (statistics.median(row[unit] for row in rows) for unit in ("s", "cpu_s"))
        least = statistics.median(row["floor_s"] for row in rows)
        lines.append(
            f"| {model}, {dtype} | {prompts} × {tokens}, {batch} | {threads} | {name} | "
            f"{rows[-1]['rows_computed']} | {wall:.0f} | {cpu:.0f} | "
            f"{rows[-1]['tokens_written'] / busy:.0f} | {speed:.2f}× | {least / busy:.0%} |"
        )
    return "\n".join(lines)


def _seconds(rows: list[dict[str, Any]], device: str) -> float:
    """The clock's on a GPU; on a CPU, which others use too, CPU seconds over the threads."""
    if device == "cuda":
        return statistics.median(row["s"] for row in rows)
    return statistics.median(row["cpu_s"] / row["threads"] for row in rows)


if __name__ == "__main__":
    main()
