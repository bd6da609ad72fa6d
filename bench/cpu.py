"""How fast, and in how much memory, is the linear KL on a CPU? Against its GEMMs and plain torch.

    python bench/cpu.py              # N=2048 H=1024 V=32000, about seven minutes on two cores
    python bench/cpu.py --quick      # a smoke run

Two questions. The whole op: ``floor_ms`` is the mode's GEMMs alone in float32 (torch.mm, the same
chunks) whatever the inputs' dtype, so bfloat16 inputs may be faster than it; ``extra_mb`` the peak
of the resident set during a call above what it was before. The row pass: native against torch's own
chain (log_softmax of both sides, kl_div, and their backward) on one chunk of logits.

Contestants take turns, round by round, so that a noisy machine disturbs all alike; figures are
medians, and ``of_floor`` and ``speedup`` are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench._harness import Rows, conditions, extra_memory
from bench._linear_kl_contestants import Inputs, eager_loss, make_inputs, moments_loss
from bench.linear_kl import MODES, floor_step
from es2fast import linear_kl_div
from es2fast.ops import native
from es2fast.ops.linear_kl.chunked import KLProblem, torch_row_pass
from es2fast.ops.linear_kl.native import kl_row_pass
from es2fast.ops.linear_kl.rows import KLSpec
from es2fast.ops.tokens import CPU_CHUNK

Step = Callable[[], Any]


def turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each step, one after the other in every round; the first is not kept."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _wide(i: Inputs) -> Inputs:
    tensors = (t.detach().float().requires_grad_(t.requires_grad) for t in (i.x, i.w, i.x_t, i.w_t))
    return Inputs(*tensors, i.mode)


def bench_op(
    rows: Rows, shape: tuple[int, int, int], mode: str, dtype: torch.dtype, n: int
) -> None:
    """The whole op in one mode and dtype; eager torch runs in the inputs' dtype."""
    i = make_inputs(shape, mode, "cpu", dtype=dtype)

    def ours(backend: str) -> Step:
        if mode == "moments":
            return i.step(moments_loss(backend)(i))
        return i.step(lambda: linear_kl_div(i.x, i.w, i.x_t, i.w_t, backend=backend))

    steps = {
        "fp32 GEMMs alone (floor)": floor_step(_wide(i), CPU_CHUNK),
        "es2fast native": ours("native"),
        "es2fast torch": ours("torch"),
    }
    if mode != "moments":  # which nobody else has
        steps["torch eager"] = i.step(eager_loss(i))
    about = dict(zip(("n", "h", "v"), shape), mode=mode, dtype=str(dtype)[6:])
    memory = {}
    for name, step in steps.items():
        step()  # what libraries keep from a first call on is not the call's
        memory[name] = extra_memory(step, "cpu", i.clear)
    times = turns(steps, n)
    floor, eager = times["fp32 GEMMs alone (floor)"], times.get("torch eager")
    for name, found in times.items():
        rows.add(
            op="linear_kl",
            name=name,
            **about,
            ms=statistics.median(found),
            ms_min=min(found),
            ms_max=max(found),
            over_floor=ratio(found, floor),
            speedup_to_eager=ratio(eager, found) if eager else None,
            extra_mb=memory[name],
        )


def bench_rows(rows: Rows, vocab: int, direction: str, n: int) -> None:
    """The row pass alone on a chunk of float32 logits, gradient included."""
    chunk = CPU_CHUNK
    z_t = 2 * torch.randn(chunk, vocab)
    z_s = z_t + 0.05 * torch.randn(chunk, vocab)
    scale = torch.full((chunk,), 1.0 / chunk)
    x, w = torch.empty(chunk, 1), torch.empty(vocab, 1)
    problem = KLProblem(
        x, w, None, x, w, None, None, scale, KLSpec(direction), chunk, False, True, False, False
    )
    work_t, work_s = torch.empty_like(z_t), torch.empty_like(z_s)

    def fill() -> None:
        work_t.copy_(z_t)
        work_s.copy_(z_s)

    def chain() -> None:
        fill()
        s = work_s.detach().requires_grad_()
        a, b = torch.log_softmax(work_t, -1), torch.log_softmax(s, -1)
        a, b = (a, b) if direction == "forward" else (b, a)
        torch.nn.functional.kl_div(b, a, reduction="batchmean", log_target=True).backward()

    def of(row_pass: Any) -> Step:
        def call() -> None:
            fill()
            row_pass(work_t, work_s, scale, None, problem)

        return call

    steps = {"copy of the logits": fill, "torch log_softmax chain": chain}
    steps |= {"es2fast native": of(kl_row_pass), "es2fast torch": of(torch_row_pass)}
    times = turns(steps, n)
    copies = times.pop("copy of the logits")
    net = {k: [a - b for a, b in zip(v, copies, strict=True)] for k, v in times.items()}
    for name, found in net.items():
        rows.add(
            op="row pass",
            name=name,
            direction=direction,
            rows=chunk,
            v=vocab,
            ms=statistics.median(found),
            ns_per_logit=1e6 * statistics.median(found) / (chunk * vocab),
            speedup_to_chain=ratio(net["torch log_softmax chain"], found),
        )


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--quick", action="store_true", help="small shapes, two rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mode", choices=MODES, nargs="*", default=list(MODES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.jsonl")
    args = parser.parse_args()
    if native.why_missing() is not None:
        parser.error(str(native.why_missing()))
    rows = Rows(args.out, conditions("cpu") | dict(native=native.capability()))
    shape = (64, 96, 4001) if args.quick else (2048, 1024, 32000)
    rounds = 2 if args.quick else args.rounds
    for direction in ("forward", "reverse"):
        bench_rows(rows, shape[2], direction, 3 * rounds)
    for dtype in (torch.float32, torch.bfloat16):
        for mode in args.mode:
            bench_op(rows, shape, mode, dtype, rounds)


if __name__ == "__main__":
    main()
