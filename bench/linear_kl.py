"""How fast, and in how much memory, is the linear KL? Against its floor and its peers.

    python bench/linear_kl.py --out DIR              # everything, needs a GPU
    python bench/linear_kl.py --out DIR --only es2fast --shape 8192 4096 128256
    python bench/linear_kl.py --check                # only whether everyone is right
    python bench/linear_kl.py --device cpu --quick   # a smoke run anywhere, small shapes

Modes: ``trainable`` (loss, dX, dW; floor 8NHV flop), ``frozen`` (loss, dX; 6NHV), ``no-grad``
(loss; 4NHV), ``moments`` (loss, dX against a teacher reduced to moments before the timed call;
4NHV; a row of its own says what making the moments takes). Two floors stand in every row:
``floor_ms``, the GEMMs alone (bf16, fp32 out where ours need it, G a real gradient, since a GEMM on
zeros is faster) with the chunk that suits them best, and ``limit_ms``, the flop over 790 TFLOP/s,
the dense bf16 ceiling of an H200. ``of_floor`` and ``of_limit`` are their fractions (1 is the floor
itself).

Before anyone is timed, value and gradients are compared with the float64 definition on a small
input; the errors stand in every row, and who is wrong, fails or is not installed gets a row with
the reason and no time (:mod:`bench._linear_kl_contestants`). On a GPU every contestant has a
process of its own in every mode, since an illegal access poisons all that follows in one; ours come
first. Rows are appended to ``linear_kl.jsonl`` in the folder ``--out``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench._harness import Rows, conditions, measure
from bench._linear_kl_contestants import (
    CHECK_SHAPE,
    Contestant,
    Inputs,
    check,
    contestants,
    make_inputs,
)
from es2fast import teacher_moments
from es2fast.ops.gemms import add_weight_gradient, input_gradient, logits_into, weight_gradient

MODES = {"trainable": 8, "frozen": 6, "no-grad": 4, "moments": 4}  # flop in units of N H V
CEILING = 790e12  # dense bf16 flop/s, measured ceiling of an H200
SHAPES = tuple(
    (n, h, v)
    for h, v in ((4096, 128256), (4096, 151936), (2048, 151936))
    for n in (8192, 1024, 2048, 4096, 16384)
)
QUICK_SHAPES = ((64, 64, 1000), (33, 96, 4001))
FLOOR = "GEMMs alone (floor)"
FLOOR_CHUNKS = (1024, 2048, 4096, 8192)
Step = Callable[[], object]


def real_gradient(i: Inputs, rows: int) -> torch.Tensor:
    """(rows, V) the gradient of a forward KL by the logits, in the inputs' dtype."""
    with torch.no_grad():
        x, x_t = i.x.detach()[:rows], i.x_t[:rows]
        parts = []
        for start in range(0, rows, 1024):
            some = slice(start, start + 1024)
            p_s = torch.softmax((x[some] @ i.w.detach().t()).float(), -1)
            p_t = torch.softmax((x_t[some] @ i.w_t.t()).float(), -1)
            parts.append(((p_s - p_t) / i.x.shape[0]).to(i.x.dtype))
    return torch.cat(parts)


def floor_step(i: Inputs, chunk: int) -> Step:
    """The mode's GEMMs alone, chunk by chunk, with no row pass; dW at once where a float32 dW would
    take more than G (as in the op), else in float32 chunk by chunk."""
    (n, h), v = i.x.shape, i.w.shape[0]
    chunk = min(chunk, n)
    x, w, x_t, w_t = (t.detach() for t in (i.x, i.w, i.x_t, i.w_t))
    logits = torch.empty(chunk, v, dtype=torch.float32, device=x.device)
    trains = i.w.requires_grad
    at_once = trains and n * x.dtype.itemsize <= 4 * h
    g = real_gradient(i, n if at_once else chunk) if i.mode != "no-grad" else logits[:0]
    wide = torch.empty(v, h, dtype=torch.float32, device=x.device) if trains else None

    def call() -> None:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            count = rows.stop - rows.start
            if i.mode != "moments":
                logits_into(x_t[rows], w_t, logits[:count])
            logits_into(x[rows], w, logits[:count])
            if i.mode != "no-grad":
                input_gradient(g[:count], w, torch.float32)
            if wide is not None and not at_once:
                add_weight_gradient(wide, g[:count], x[rows], first=start == 0)
        if at_once:
            weight_gradient(g, x, x.dtype)

    return call


def best_floor(i: Inputs, device: str) -> dict[str, Any]:
    """The measurement of the fastest chunk, with it."""
    n = i.x.shape[0]
    chunks = sorted({min(chunk, n) for chunk in FLOOR_CHUNKS})
    found = [measure(floor_step(i, chunk), device) | dict(chunk=chunk) for chunk in chunks]
    return min(found, key=lambda row: row.get("ms", float("inf")))


def about_shape(shape: tuple[int, int, int], mode: str, device: str) -> dict[str, Any]:
    n, h, v = shape
    limit = 1e3 * MODES[mode] * n * h * v / CEILING if device == "cuda" else None
    return dict(op="linear_kl", mode=mode, n=n, h=h, v=v, dtype="bfloat16", limit_ms=limit)


def floor_of(rows: Rows, about: dict[str, Any]) -> float | None:
    """Milliseconds of the floor that stands last in the file, on the same machine."""
    wanted = about | dict(name=FLOOR, gpu=rows.common["gpu"])
    found = None
    for line in rows.path.read_text().splitlines() if rows.path.exists() else []:
        row = json.loads(line)
        if all(row.get(key) == value for key, value in wanted.items()):
            found = row.get("ms", found)
    return found


def bench_floor(rows: Rows, shapes: list, mode: str, device: str) -> None:
    for shape in shapes:
        i = make_inputs(shape, mode, device)
        rows.add(name=FLOOR, **about_shape(shape, mode, device), **best_floor(i, device))
        if mode == "moments":
            making = measure(lambda i=i: teacher_moments(i.x_t, i.w_t, i.w), device)
            rows.add(name="making the moments", **about_shape(shape, mode, device), **making)


def bench_contestant(rows: Rows, c: Contestant, shapes: list, mode: str, device: str) -> None:
    """Check, then a row per shape."""
    torch._dynamo.reset()
    errors = check(c, mode, device)
    for shape in shapes:
        about = about_shape(shape, mode, device)
        if "error" in errors:
            rows.add(**c.about(), **about, **errors)
            continue
        torch._dynamo.reset()
        i = make_inputs(shape, mode, device)
        result = measure(i.step(c.loss(i)), device, clear=i.clear)
        ms, floor_ms, limit = result.get("ms"), floor_of(rows, about), about["limit_ms"]
        rows.add(
            **c.about(),
            **about,
            **errors,
            **result,
            floor_ms=floor_ms,
            of_floor=floor_ms / ms if ms and floor_ms else None,
            of_limit=limit / ms if ms and limit else None,
        )


def write_checks(rows: Rows, mode: str, device: str) -> bool:
    """One row per contestant without times; whether all are right."""
    n, h, v = CHECK_SHAPE
    right = True
    for c in contestants(mode, device):
        torch._dynamo.reset()
        errors = check(c, mode, device)
        about = dict(op="linear_kl check", mode=mode, n=n, h=h, v=v, dtype="bfloat16")
        rows.add(**c.about(), **about, **errors)
        right = right and "error" not in errors
    return right


def runs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """(mode, name) in the order of running: floors and ours of all modes first, then peers."""
    for ours in (True, False):
        for mode in args.mode:
            names = [c.name for c in contestants(mode, args.device)]
            for name in [FLOOR, *names] if ours else names:
                mine = name == FLOOR or name.startswith("es2fast")
                named = not args.only or any(word in name for word in (*args.only, FLOOR))
                if mine == ours and named and not any(word in name for word in args.skip):
                    yield mode, name


def run_one(rows: Rows, mode: str, name: str, shapes: list, device: str) -> None:
    if name == FLOOR:
        bench_floor(rows, shapes, mode, device)
        return
    (contestant,) = [c for c in contestants(mode, device) if c.name == name]
    bench_contestant(rows, contestant, shapes, mode, device)


def run_apart(rows: Rows, mode: str, name: str, args: argparse.Namespace) -> None:
    """``run_one`` in a process of its own; a row says so when it dies, or is not started since its
    package is absent."""
    absent = [c for c in contestants(mode, args.device) if c.name == name and c.absent]
    if absent:
        rows.add(**absent[0].about(), op="linear_kl", mode=mode, error="not installed")
        return
    command = [sys.executable, __file__, "--device", args.device, "--out", str(args.out)]
    command += ["--one", mode, name] + (["--quick"] if args.quick else [])
    command += ["--shape", *map(str, args.shape)] if args.shape else []
    done = subprocess.run(command)
    if done.returncode:
        rows.add(name=name, op="linear_kl", mode=mode, error=f"ended with status {done.returncode}")


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--check", action="store_true", help="values and gradients, no timing")
    parser.add_argument("--mode", choices=MODES, nargs="*", default=list(MODES))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "H", "V"), help="only this")
    parser.add_argument("--only", nargs="*", default=[], help="names containing one of these")
    parser.add_argument("--skip", nargs="*", default=[], help="not names containing one of these")
    parser.add_argument("--processes", action="store_true", help="one per contestant on a CPU too")
    parser.add_argument("--one", nargs=2, metavar=("MODE", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: run with --device cpu --quick for a smoke run")
    rows = Rows(args.out / "linear_kl.jsonl", conditions(args.device))
    shapes = [tuple(args.shape)] if args.shape else QUICK_SHAPES if args.quick else SHAPES
    if args.check:
        return int(not all([write_checks(rows, mode, args.device) for mode in args.mode]))
    if args.one:
        run_one(rows, *args.one, shapes, args.device)
        return 0
    for mode, name in runs(args):
        if args.device == "cuda" or args.processes:
            run_apart(rows, mode, name, args)
        else:
            run_one(rows, mode, name, shapes, args.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
