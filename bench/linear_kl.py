"""How fast, and in how much memory, is the linear KL? Against its floor and its peers.

    python bench/linear_kl.py                        # everything, needs a GPU
    python bench/linear_kl.py --device cpu --quick   # a smoke run anywhere, small shapes

Modes: ``trainable`` (loss, dX, dW; floor 8NHV flop), ``frozen`` (loss, dX; 6NHV), ``no-grad``
(loss; 4NHV), ``moments`` (loss, dX against a teacher reduced to moments before the timed call;
4NHV; a row of its own says what making the moments takes). Two floors stand in every row:
``floor_ms``, the mode's GEMMs alone (bf16, fp32 out where ours need it, the same chunks) measured
in the same run, and ``limit_ms``, the flop over 790 TFLOP/s, the dense bf16 ceiling of an H200.
``of_floor`` and ``of_limit`` are their fractions (1 is the floor itself). Peers that are not
installed get a row with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from bench._harness import Rows, conditions, measure
from es2fast import half_head, linear_kl_div, moment_kl_div, teacher_moments
from es2fast.ops.linear_kl_chunked import add_weight_gradient, input_gradient, logits_into

MODES = {"trainable": 8, "frozen": 6, "no-grad": 4, "moments": 4}  # flop in units of N H V
CEILING = 790e12  # dense bf16 flop/s, measured ceiling of an H200
SHAPES = tuple(
    (n, h, v)
    for h, v in ((4096, 128256), (4096, 151936), (2048, 151936))
    for n in (8192, 1024, 2048, 4096, 16384)
)
QUICK_SHAPES = ((64, 64, 1000), (33, 96, 4001))
Step = Callable[[], object]


@dataclass
class Inputs:
    """One shape's tensors; student and teacher have heads of their own."""

    x: Tensor  # (N, H)
    w: Tensor  # (V, H)
    x_t: Tensor  # (N, H)
    w_t: Tensor  # (V, H)
    mode: str

    def step(self, loss: Callable[[], Tensor]) -> Step:
        """The measured call: loss, and backward unless the mode is no-grad."""

        def call() -> None:
            self.x.grad = self.w.grad = None
            if self.mode == "no-grad":
                with torch.no_grad():
                    loss()
            else:
                loss().backward()

        return call


def make_inputs(n: int, h: int, v: int, mode: str, dtype: torch.dtype, device: str) -> Inputs:
    """The one set-up for time and memory of everyone: a student near its teacher."""
    gen = torch.Generator(device=device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, device=device, dtype=dtype)

    x_t, w_t = randn(n, h), randn(v, h) * (2.0 / h**0.5)
    x = (x_t + 0.05 * randn(n, h)).requires_grad_(mode != "no-grad")
    return Inputs(x, w_t.clone().requires_grad_(mode == "trainable"), x_t, w_t, mode)


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


def eager_loss(i: Inputs) -> Callable[[], Tensor]:
    """Plain torch on float32 logits: what everybody writes first."""

    def loss() -> Tensor:
        log_s = torch.log_softmax((i.x @ i.w.t()).float(), -1)
        with torch.no_grad():
            log_t = torch.log_softmax((i.x_t @ i.w_t.t()).float(), -1)
        return torch.nn.functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

    return loss


def _ours(i: Inputs, direction: str, backend: str | None = None) -> Callable[[], Tensor]:
    return lambda: linear_kl_div(
        i.x, i.w, i.x_t, i.w_t, direction=direction, backend=backend
    )  # fmt: skip


def _liger_fused(i: Inputs) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=0.5)
    return lambda: module(i.x, i.w, i.x_t, i.w_t, None)


def _liger_chunked(i: Inputs) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
    labels = torch.zeros(i.x.shape[0], dtype=torch.long, device=i.x.device)
    return lambda: module(i.x, i.w, i.x_t, i.w_t, labels)


def _fla(i: Inputs) -> Callable[[], Tensor]:
    from fla.modules import FusedKLDivLoss

    module = FusedKLDivLoss()  # KL(teacher||student); (student x, teacher x, student W, teacher W)
    return lambda: module(i.x, i.x_t, i.w, i.w_t)


def contestants(i: Inputs, device: str) -> Iterator[tuple[str, Callable[[], Step]]]:
    """(name, maker of the measured call); a maker may raise, for instance ImportError."""
    for direction in ("forward", "reverse", "jsd"):
        yield f"es2fast {direction}", lambda d=direction: i.step(_ours(i, d))
    if device == "cuda":
        yield "es2fast forward, torch backend", lambda: i.step(_ours(i, "forward", "torch"))
    yield "torch eager, forward", lambda: i.step(eager_loss(i))
    yield "torch.compile, forward", lambda: i.step(torch.compile(eager_loss(i)))
    yield "Liger fused_linear_jsd", lambda: i.step(_liger_fused(i))
    yield "Liger chunked jsd", lambda: i.step(_liger_chunked(i))
    yield "flash-linear-attention fused_kl_div", lambda: i.step(_fla(i))


def moment_contestants(i: Inputs, device: str) -> Iterator[tuple[str, Callable[[], Step]]]:
    """As ``contestants``, for the mode ``moments``: nobody else has it."""

    def loss(w: Tensor, backend: str | None = None) -> Step:
        moments = teacher_moments(i.x_t, w)
        return i.step(lambda: moment_kl_div(i.x, w, moments, backend=backend))

    yield "es2fast moments", lambda: loss(i.w)
    yield "es2fast moments, fp16 head", lambda: loss(half_head(i.w).weight)
    if device == "cuda":
        yield "es2fast moments, torch backend", lambda: loss(i.w, "torch")
    yield "making the moments", lambda: lambda: teacher_moments(i.x_t, i.w)


def bench_shape(rows: Rows, shape: tuple[int, int, int], mode: str, device: str) -> None:
    """Every contestant on one shape and mode; the floor first."""
    n, h, v = shape
    dtype = torch.bfloat16
    torch._dynamo.reset()
    i = make_inputs(n, h, v, mode, dtype, device)
    chunk = 2048 if mode == "trainable" else 1024
    limit = 1e3 * MODES[mode] * n * h * v / CEILING if device == "cuda" else None
    about = dict(op="linear_kl", mode=mode, n=n, h=h, v=v, dtype=str(dtype)[6:], limit_ms=limit)
    floor = measure(floor_step(i, chunk), device)
    rows.add(name="GEMMs alone (floor)", **about, **floor)
    makers = moment_contestants if mode == "moments" else contestants
    for name, make in makers(i, device):
        try:
            step = make()
        except ImportError as error:
            rows.add(name=name, **about, error=f"not installed: {error}")
            continue
        result = measure(step, device)
        ms, floor_ms = result.get("ms"), floor.get("ms")
        rows.add(
            name=name,
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
    parser.add_argument("--mode", choices=MODES, nargs="*", default=list(MODES))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "H", "V"), help="only this")
    default = Path(__file__).parent / "results" / "linear_kl.jsonl"
    parser.add_argument("--out", type=Path, default=default)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: run with --device cpu --quick for a smoke run")
    rows = Rows(args.out, conditions(args.device))
    shapes = [tuple(args.shape)] if args.shape else QUICK_SHAPES if args.quick else SHAPES
    for shape in shapes:
        for mode in args.mode:
            bench_shape(rows, shape, mode, args.device)


if __name__ == "__main__":
    main()
