"""How fast, and in how much memory, is the pairwise separation? Against its floor and torch.

    python bench/separation.py                        # everything, needs a GPU
    python bench/separation.py --device cpu --quick   # a smoke run anywhere, small shapes
    python bench/separation.py --device cpu --shape 4096 2048 --dtype float32

Forward and backward of the hinge, gradients to both groups, n = m. The floor is the three GEMMs
alone (6 n m H flop) in the inputs' dtype, measured in the same run; ``limit_ms`` is the flop over
the dense ceiling of an H200. Peers: ``torch.cdist`` with autograd (on a CPU it takes no bf16 and is
given float32 copies), the Gram form in plain torch, and ``torch.compile`` of it. ``extra_mb`` is
the allocator's peak on a GPU; on a CPU the growth of the peak resident memory during one call, in a
process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench._harness import Rows, conditions, measure
from es2fast import pairwise_separation

CEILING = {"bfloat16": 790e12, "float32": 51e12}  # dense flop/s of an H200; float32 without TF32
ROWS, WIDTHS = (64, 1024, 4096, 16384), (2048, 4096, 8192)
QUICK_SHAPES = ((8, 32), (64, 96))
PAGE = os.sysconf("SC_PAGE_SIZE")


def make_inputs(n: int, h: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, float]:
    """Two groups around a common mean, and a margin that half of the pairs meet."""
    gen = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device, dtype=dtype)

    centre = 10 * randn(h)
    a, b = randn(n, h).add_(centre), randn(n, h).add_(centre)
    return a.requires_grad_(), b.requires_grad_(), (2 * h) ** 0.5


def ours(backend: str | None) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda a, b, margin: pairwise_separation(a, b, margin=margin, backend=backend)


def cdist(a: Tensor, b: Tensor, margin: float) -> Tensor:
    """What everybody writes first."""
    return (margin - torch.cdist(a.float(), b.float())).relu().mean()


def gram(a: Tensor, b: Tensor, margin: float) -> Tensor:
    """The Gram form, uncentred, with the usual clamp against NaN."""
    a, b = a.float(), b.float()
    d2 = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.t()
    return (margin - d2.clamp_min(1e-12).sqrt()).relu().mean()


def gemms(a: Tensor, b: Tensor, margin: float) -> None:
    """The floor: forward, and one per gradient."""
    a, b = a.detach(), b.detach()
    c = torch.mm(a, b.t())
    torch.mm(c, b)
    torch.mm(c.t(), a)


def contestants(device: str) -> dict[str, Callable[[Tensor, Tensor, float], Tensor]]:
    found = {"es2fast": ours(None)}
    if device == "cuda":
        found["es2fast, torch backend"] = ours("torch")
    return found | {
        "torch.cdist": cdist,
        "Gram": gram,
        "torch.compile of Gram": torch.compile(gram),
    }


def step(function: Callable[[Tensor, Tensor, float], Tensor], inputs: tuple) -> Callable[[], None]:
    a, b, margin = inputs

    def call() -> None:
        a.grad = b.grad = None
        function(a, b, margin).backward()

    return call


def peak_growth(name: str, n: int, h: int, dtype: torch.dtype) -> float:
    """MB by which one call raises this process's peak resident memory above what was resident."""
    function = contestants("cpu")[name]
    step(function, make_inputs(16, 32, dtype, "cpu"))()  # threads, libraries
    call = step(function, make_inputs(n, h, dtype, "cpu"))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    call()
    peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return (int(peak.split()[1]) * 1024 - before) / 1e6


def peak_in_a_process(name: str, n: int, h: int, dtype: torch.dtype) -> float | None:
    command = [sys.executable, "-W", "ignore", __file__, "--device", "cpu", "--peak-of", name]
    command += ["--shape", str(n), str(h), "--dtype", str(dtype)[6:]]
    done = subprocess.run(command, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def bench_shape(rows: Rows, n: int, h: int, dtype: torch.dtype, device: str, args) -> None:
    """Every contestant on one shape; the floor first."""
    torch._dynamo.reset()
    inputs = make_inputs(n, h, dtype, device)
    name = str(dtype)[6:]
    limit = 1e3 * 6 * n * n * h / CEILING[name] if device == "cuda" else None
    about = dict(op="separation", loss="hinge", n=n, m=n, h=h, dtype=name, limit_ms=limit)
    floor = measure(lambda: gemms(*inputs), device, args.repeats)
    rows.add(name="GEMMs alone (floor)", **about, **floor)
    for contestant, function in contestants(device).items():
        if args.only and contestant not in args.only:
            continue
        result = measure(step(function, inputs), device, args.repeats)
        if device == "cpu" and "error" not in result:
            result["extra_mb"] = peak_in_a_process(contestant, n, h, dtype)
        ms, floor_ms = result.get("ms"), floor.get("ms")
        rows.add(
            name=contestant,
            **about,
            **result,
            floor_ms=floor_ms,
            of_floor=floor_ms / ms if ms and floor_ms else None,
            of_limit=limit / ms if ms and limit else None,
        )


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument(
        "--shape", type=int, nargs=2, metavar=("N", "H"), help="only this, n = m = N"
    )
    parser.add_argument("--dtype", nargs="*", choices=CEILING, default=list(CEILING))
    parser.add_argument("--only", nargs="*", help="only these contestants, by name")
    parser.add_argument("--repeats", type=int, default=5, help="on a CPU")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    default = Path(__file__).parent / "results" / "separation.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    if args.peak_of:
        print(peak_growth(args.peak_of, *args.shape, getattr(torch, args.dtype[0])))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: run with --device cpu --quick for a smoke run")
    rows = Rows(args.out, conditions(args.device))
    every = [(n, h) for h in WIDTHS for n in ROWS]
    shapes = [tuple(args.shape)] if args.shape else QUICK_SHAPES if args.quick else every
    for n, h in shapes:
        for dtype in args.dtype:
            bench_shape(rows, n, h, getattr(torch, dtype), args.device, args)


if __name__ == "__main__":
    main()
