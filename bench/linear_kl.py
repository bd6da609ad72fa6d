"""How fast, and in how much memory, is the linear KL? Against its floor and its peers.

    python bench/linear_kl.py                        # everything, needs a GPU
    python bench/linear_kl.py --check                # only whether everyone is right
    python bench/linear_kl.py --device cpu --quick   # a smoke run anywhere, small shapes

Modes: ``trainable`` (loss, dX, dW; floor 8NHV flop), ``frozen`` (loss, dX; 6NHV), ``no-grad``
(loss; 4NHV), ``moments`` (loss, dX against a teacher reduced to moments before the timed call;
4NHV; a row of its own says what making the moments takes). Two floors stand in every row:
``floor_ms``, the GEMMs alone (bf16, fp32 out where ours need it, the same chunks) measured in the
same run, and ``limit_ms``, the flop over 790 TFLOP/s, the dense bf16 ceiling of an H200.
``of_floor`` and ``of_limit`` are their fractions (1 is the floor itself).

Before anyone is timed, value and gradients are compared with the float64 definition on a small
input; the errors stand in every row, and who is wrong, fails or is not installed gets a row with
the reason and no time (:mod:`bench._linear_kl_contestants`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench._harness import Rows, conditions, measure
from bench._linear_kl_contestants import CHECK_SHAPE, Inputs, check, contestants, make_inputs
from es2fast import teacher_moments
from es2fast.ops.gemms import add_weight_gradient, input_gradient, logits_into

MODES = {"trainable": 8, "frozen": 6, "no-grad": 4, "moments": 4}  # flop in units of N H V
CEILING = 790e12  # dense bf16 flop/s, measured ceiling of an H200
SHAPES = tuple(
    (n, h, v)
    for h, v in ((4096, 128256), (4096, 151936), (2048, 151936))
    for n in (8192, 1024, 2048, 4096, 16384)
)
QUICK_SHAPES = ((64, 64, 1000), (33, 96, 4001))
Step = Callable[[], object]


def floor_step(i: Inputs, chunk: int) -> Step:
    """The mode's GEMMs alone, chunk by chunk, with no row pass."""
    (n, _), (v, h) = i.x.shape, i.w.shape
    chunk = min(chunk, n)
    x, w, x_t, w_t = (t.detach() for t in (i.x, i.w, i.x_t, i.w_t))
    logits = torch.empty(chunk, v, dtype=torch.float32, device=x.device)
    g = torch.zeros(chunk, v, dtype=x.dtype, device=x.device)
    dw = torch.zeros(v, h, dtype=torch.float32, device=x.device) if i.w.requires_grad else None

    def call() -> None:
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            count = rows.stop - rows.start
            if i.mode != "moments":
                logits_into(x_t[rows], w_t, logits[:count])
            logits_into(x[rows], w, logits[:count])
            if i.mode != "no-grad":
                input_gradient(g[:count], w, torch.float32)
            if dw is not None:
                add_weight_gradient(dw, g[:count], x[rows], first=start == 0)

    return call


def check_mode(mode: str, device: str) -> dict[str, dict[str, Any]]:
    """Errors of everyone in a mode, by name."""
    torch._dynamo.reset()
    return {c.name: check(c, mode, device) for c in contestants(mode, device)}


def write_checks(rows: Rows, mode: str, device: str) -> bool:
    """One row per contestant without times; whether all are right."""
    n, h, v = CHECK_SHAPE
    errors = check_mode(mode, device)
    for c in contestants(mode, device):
        about = dict(op="linear_kl check", mode=mode, n=n, h=h, v=v, dtype="bfloat16")
        rows.add(**c.about(), **about, **errors[c.name])
    return not any("error" in row for row in errors.values())


def bench_shape(
    rows: Rows,
    shape: tuple[int, int, int],
    mode: str,
    device: str,
    errors: dict[str, dict[str, Any]],
) -> None:
    """Every contestant on one shape and mode; the floor first."""
    n, h, v = shape
    torch._dynamo.reset()
    i = make_inputs(shape, mode, device)
    chunk = 2048 if mode == "trainable" else 1024
    limit = 1e3 * MODES[mode] * n * h * v / CEILING if device == "cuda" else None
    about = dict(op="linear_kl", mode=mode, n=n, h=h, v=v, dtype="bfloat16", limit_ms=limit)
    floor = measure(floor_step(i, chunk), device)
    rows.add(name="GEMMs alone (floor)", **about, **floor)
    for c in contestants(mode, device):
        if "error" in errors[c.name]:
            rows.add(**c.about(), **about, **errors[c.name])
            continue
        result = measure(i.step(c.loss(i)), device)
        ms, floor_ms = result.get("ms"), floor.get("ms")
        rows.add(
            **c.about(),
            **about,
            **errors[c.name],
            **result,
            floor_ms=floor_ms,
            of_floor=floor_ms / ms if ms and floor_ms else None,
            of_limit=limit / ms if ms and limit else None,
        )
    if mode == "moments":
        making = measure(lambda: teacher_moments(i.x_t, i.w_t, i.w), device)
        rows.add(name="making the moments", **about, **making)


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--check", action="store_true", help="values and gradients, no timing")
    parser.add_argument("--mode", choices=MODES, nargs="*", default=list(MODES))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "H", "V"), help="only this")
    default = Path(__file__).parent / "results" / "linear_kl.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: run with --device cpu --quick for a smoke run")
    rows = Rows(args.out, conditions(args.device))
    shapes = [tuple(args.shape)] if args.shape else QUICK_SHAPES if args.quick else SHAPES
    if args.check:
        return int(not all([write_checks(rows, mode, args.device) for mode in args.mode]))
    for mode in args.mode:
        errors = check_mode(mode, args.device)
        for shape in shapes:
            bench_shape(rows, shape, mode, args.device, errors)
    return 0


if __name__ == "__main__":
    sys.exit(main())
