"""Two real processes share a vocabulary; started by test_linear_kl_parallel.py.

Each rank holds its rows of the heads (an uneven split) and all tokens, and writes the loss, the
gradients and how many bytes it handed to collectives.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from es2fast import vocab_parallel_linear_kl_div
from es2fast.distributed.runtime import stop
from tests.ops.linear_kl.matrix import (
    BF16,
    DIRECTIONS,
    FP16,
    FP32,
    Problem,
    at_divergence,
    make_problem,
)

SPLIT = (50, 77)  # of 127 tokens
NEVER = -1e30  # what -inf, which the op gets, is to the reference
OPTIONS = dict(temperature=1.5, logit_scale=0.8, softcap=4.0, chunk_tokens=2)


def cases() -> dict[str, Problem]:
    found = {}
    for direction in DIRECTIONS:
        for dtype, target in ((FP32, 1e-4), (BF16, 2e-3), (BF16, 1e-6), (FP32, 0.4)):
            problem, _ = at_divergence(target, dtype, separate=True, direction=direction)
            found[f"{direction} {dtype} {target}"] = problem
        bias = torch.linspace(-2, 2, 127)
        weights = torch.tensor([1.0, 0, 2, 1, 0.5])
        options = dict(direction=direction, bias=bias, token_weights=weights, **OPTIONS)
        found[f"{direction} shared head, options"] = make_problem(FP32, **options)
        many = dict(n=150, h=48, direction=direction, separate=True, chunk_tokens=64)
        found[f"{direction} many tokens"] = make_problem(BF16, **many)
    bias = torch.linspace(-2, 2, 127)
    bias[: SPLIT[0] + 3] = NEVER
    found["never said"] = make_problem(FP32, bias=bias)
    found["float64"] = make_problem(torch.float64, separate=True)
    found["no tokens"] = make_problem(FP32, token_weights=torch.zeros(5))
    found["none"] = make_problem(FP32, reduction="none", separate=True)
    return found


def half_cases() -> dict[str, Problem]:
    """16-bit inputs, for the Triton row kernels; with few tokens G has two parts."""
    found = {}
    bias, weights = torch.linspace(-2, 2, 127), torch.tensor([1.0, 0, 2, 1, 0.5])
    for direction in DIRECTIONS:
        for target in (2e-3, 1e-6):
            problem, _ = at_divergence(target, BF16, n=2, separate=True, direction=direction)
            found[f"{direction} {target}"] = problem
        options = dict(direction=direction, bias=bias.half(), token_weights=weights)
        found[f"{direction} options"] = make_problem(FP16, **options, **OPTIONS)
    found["many tokens"] = make_problem(BF16, n=70, h=16, separate=True, chunk_tokens=64)
    return found


def rows_of(x: torch.Tensor | None, rank: int) -> torch.Tensor | None:
    return None if x is None else x[sum(SPLIT[:rank]) :][: SPLIT[rank]]


def call(problem: Problem, rank: int, backend: str | None = None) -> dict[str, torch.Tensor | None]:
    options = dict(problem.options)
    bias = rows_of(options.pop("bias", None), rank)
    if bias is not None:
        bias = bias.masked_fill(bias == NEVER, -torch.inf)
    trains = options.get("reduction") != "none"
    x = problem.hidden.clone().requires_grad_()
    w = rows_of(problem.weight, rank).clone().requires_grad_(trains)
    if bias is not None:
        bias = bias.clone().requires_grad_(trains)
    loss = vocab_parallel_linear_kl_div(
        x, w, problem.teacher_hidden, rows_of(problem.teacher_weight, rank), bias=bias,
        backend=backend, **options,
    )  # fmt: skip
    factors = torch.arange(1, loss.numel() + 1).to(loss) if loss.dim() else torch.tensor(8.0)
    (loss * factors).sum().backward()
    with torch.no_grad():
        again = vocab_parallel_linear_kl_div(
            x, w, problem.teacher_hidden, rows_of(problem.teacher_weight, rank), bias=bias,
            backend=backend, **options,
        )  # fmt: skip
    db = None if bias is None else bias.grad
    return dict(loss=loss.detach(), again=again, dx=x.grad, dw=w.grad, db=db)


class Wire:
    """Counts the bytes of tensors handed to the collectives."""

    def __init__(self) -> None:
        self.gathered = self.reduced = self.scattered = 0
        self.all_gather, self.all_reduce = dist.all_gather, dist.all_reduce
        self.reduce_scatter = dist.reduce_scatter_tensor

    def __enter__(self) -> Wire:
        def all_gather(parts, mine, group):
            self.gathered += mine.nbytes * (len(parts) - 1)
            self.all_gather(parts, mine, group=group)

        def all_reduce(x, group):
            self.reduced += x.nbytes
            self.all_reduce(x, group=group)

        def reduce_scatter(out, x, group):
            self.scattered += x.nbytes
            self.reduce_scatter(out, x, group=group)

        dist.all_gather, dist.all_reduce = all_gather, all_reduce
        dist.reduce_scatter_tensor = reduce_scatter
        return self

    def __exit__(self, *_: object) -> None:
        dist.all_gather, dist.all_reduce = self.all_gather, self.all_reduce
        dist.reduce_scatter_tensor = self.reduce_scatter


def join(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def worker(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    found: dict[str, object] = {name: call(problem, rank) for name, problem in cases().items()}
    for direction in ("forward", "jsd"):
        found[f"bytes {direction}"] = wire_bytes(direction, rank, "torch")
    torch.save(found, f"{folder}/{rank}.pt")
    stop()


def triton_worker(rank: int, world: int, folder: str) -> None:
    join(rank, world, folder)
    found: dict[str, object] = {
        name: call(problem, rank, "triton") for name, problem in half_cases().items()
    }
    for direction in ("forward", "jsd"):
        found[f"bytes {direction}"] = wire_bytes(direction, rank, "triton")
    torch.save(found, f"{folder}/{rank}.pt")
    stop()


def wire_bytes(direction: str, rank: int, backend: str) -> tuple[int, int]:
    """What a call hands to all_gather and to all_reduce."""
    p = make_problem(BF16, n=20, h=48, direction=direction, separate=True)
    w, w_t = rows_of(p.weight, rank), rows_of(p.teacher_weight, rank)
    with Wire() as wire:
        x = p.hidden.requires_grad_()
        vocab_parallel_linear_kl_div(
            x, w.requires_grad_(), p.teacher_hidden, w_t, direction=direction, backend=backend
        ).backward()
    return wire.gathered, wire.reduced
