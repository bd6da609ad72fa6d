"""What a first run on a GPU has to tell so that constants can be chosen afterwards.

    python bench/gpu_probe.py gemms --out DIR     # does cuBLAS take our layouts at full speed?
    python bench/gpu_probe.py profile --out DIR   # which kernels a step consists of
    python bench/gpu_probe.py tune --out DIR      # chunks, the buffer of G, the row kernel's tile

``gemms``: logits into strided float32, dX from a G of doubled pitch (16-bit rows in float32's
memory) and from one of its own, dW by addmm with beta = 1 and as one product, at several chunks.
``--device cpu --quick`` rehearses all of it with small shapes. Rows go to ``gpu_probe.jsonl``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.autograd import DeviceType

from bench._harness import Rows, conditions, measure
from bench._linear_kl_contestants import make_inputs
from bench.linear_kl import real_gradient
from es2fast import linear_kl_div
from es2fast.ops.gemms import (
    add_weight_gradient,
    input_gradient,
    logits_into,
    weight_gradient,
)
from es2fast.ops.scratch import logit_rows

SHAPE, QUICK_SHAPE = (8192, 4096, 128256), (96, 32, 300)
CHUNKS, QUICK_CHUNKS = (1024, 2048, 4096, 8192), (32, 96)
TRAINING = ("frozen", "trainable")


def probe_gemms(rows: Rows, args: argparse.Namespace) -> None:
    """Each product of the chunk loop alone, in the layouts that the loop uses."""
    shape, chunks = (QUICK_SHAPE, QUICK_CHUNKS) if args.quick else (SHAPE, CHUNKS)
    i = make_inputs(shape, "trainable", args.device)
    (n, h), v = i.x.shape, i.w.shape[0]
    x, w = i.x.detach(), i.w.detach()
    g_all = real_gradient(i, n)
    dw = torch.zeros(v, h, device=args.device)

    def report(name: str, tokens: int, step: Callable[[], Any]) -> None:
        found = measure(step, args.device)
        tflops = 2e-9 * tokens * h * v / found["ms"] if "ms" in found else None
        rows.add(op="gemm probe", name=name, n=tokens, h=h, v=v, tflops=tflops, **found)

    for chunk in chunks:
        logits = logit_rows(chunk, v, torch.float32, x.device)
        some, g = x[:chunk], g_all[:chunk]
        doubled = doubled_pitch(g)
        report("logits, strided float32", chunk, partial(logits_into, some, w, logits))
        report("dX", chunk, partial(input_gradient, g, w, torch.float32))
        report("dX, doubled pitch", chunk, partial(input_gradient, doubled, w, torch.float32))
        report("dW, beta = 1", chunk, partial(add_weight_gradient, dw, g, some, False))
        report("dW, to bfloat16", chunk, partial(weight_gradient, g, some, x.dtype))


def doubled_pitch(g: Tensor) -> Tensor:
    """G as it lies over the student's float32 logits: in the upper half of each row."""
    wide = g.new_zeros(g.shape[0], 2 * -(-g.shape[1] // 128) * 128)
    place = wide[:, wide.shape[1] // 2 :][:, : g.shape[1]]
    return place.copy_(g)


def profile(rows: Rows, args: argparse.Namespace) -> None:
    """Kernels of one step of each mode, by their total time."""
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU] + ([activity.CUDA] if args.device == "cuda" else [])
    for mode in (*TRAINING, "no-grad"):
        i = make_inputs(QUICK_SHAPE if args.quick else SHAPE, mode, args.device)
        step = i.step(lambda i=i: linear_kl_div(i.x, i.w, i.x_t, i.w_t))
        step()
        with torch.profiler.profile(activities=kinds) as found:
            step()
            if args.device == "cuda":
                torch.cuda.synchronize()
        events, total = list(found.key_averages()), "self_cpu_time_total"
        if args.device == "cuda":
            events, total = [e for e in events if _is_kernel(e)], "self_device_time_total"
        for event in sorted(events, key=lambda e: -getattr(e, total))[:12]:
            rows.add(
                op="profile", mode=mode, name=event.key[:120], count=event.count,
                ms=getattr(event, total) / 1e3,
            )  # fmt: skip


def _is_kernel(event: Any) -> bool:
    """Neither what launched kernels nor a range, which a GPU's timeline holds as an annotation."""
    return event.device_type != DeviceType.CPU and not event.is_user_annotation


def tune(rows: Rows, args: argparse.Namespace) -> None:
    """The op over chunks and buffers of G, then the row kernel's tiles."""
    shape, chunks = (QUICK_SHAPE, QUICK_CHUNKS) if args.quick else (SHAPE, CHUNKS)
    for mode in (*TRAINING, "no-grad"):
        i = make_inputs(shape, mode, args.device)
        budgets = (None, 0) if mode == "trainable" else (None,)
        for chunk in (512, 1536, 3072, *chunks) if not args.quick else chunks:
            for budget in budgets:
                options = dict(chunk_tokens=chunk, grad_buffer_bytes=budget)
                call = lambda o=options, i=i: linear_kl_div(i.x, i.w, i.x_t, i.w_t, **o)  # noqa: E731
                found = measure(i.step(call), args.device, clear=i.clear)
                rows.add(
                    op="tune", mode=mode, n=shape[0], h=shape[1], v=shape[2], **options, **found
                )
    if args.device == "cuda":
        tune_row_kernel(rows, shape)


def tune_row_kernel(rows: Rows, shape: tuple[int, int, int]) -> None:
    """Tiles and warps of the 16-bit row kernel on one chunk of logits."""
    from es2fast.ops.linear_kl import triton as kernels
    from es2fast.ops.linear_kl.chunked import KLProblem
    from es2fast.ops.linear_kl.rows import KLSpec
    from es2fast.ops.linear_kl.triton_light import LightConfig

    _, h, v = shape
    chunk, device = 1024, torch.device("cuda")
    x = torch.empty(chunk, h, dtype=torch.bfloat16, device=device)
    w = torch.empty(v, h, dtype=torch.bfloat16, device=device)
    z = 2 * torch.randn(chunk, v, device=device)
    zt, zs = (logit_rows(chunk, v, torch.float32, device) for _ in range(2))
    scale = torch.full((chunk,), 1.0 / chunk, device=device)
    place = logit_rows(chunk, v, torch.bfloat16, device)
    used = kernels.LIGHT
    try:
        for direction in ("forward", "jsd"):
            p = KLProblem(
                x, w, None, x, w, None, None, scale, KLSpec(direction), chunk, False, True, True,
                False,
            )  # fmt: skip
            for groups in (1, 2, 4):
                for vec, warps in ((4, 4), (4, 8), (4, 16), (8, 8)):
                    kernels.LIGHT = LightConfig(groups, vec, warps)
                    zt.copy_(z), zs.copy_(z).add_(0.05)
                    found = measure(lambda p=p: kernels.row_pass(zt, zs, scale, place, p), "cuda")
                    rows.add(
                        op="tune row kernel", direction=direction, groups=groups, vec=vec,
                        num_warps=warps, rows=chunk, v=v, in_use=used == kernels.LIGHT, **found,
                    )  # fmt: skip
    finally:
        kernels.LIGHT = used


PARTS = {"gemms": probe_gemms, "profile": profile, "tune": tune}


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: rehearse with --device cpu --quick")
    PARTS[args.part](Rows(args.out / "gpu_probe.jsonl", conditions(args.device)), args)


if __name__ == "__main__":
    main()
