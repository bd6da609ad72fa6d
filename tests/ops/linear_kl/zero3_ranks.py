"""Two real processes share a head that DeepSpeed has parted; started by test_linear_kl_zero3.py."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn

from es2fast.ops.linear_kl.zero3 import own_rows, zero3_linear_kl_div
from tests.ops.linear_kl.matrix import (
    BF16,
    DIRECTIONS,
    FP32,
    Problem,
    at_divergence,
    make_problem,
)
from tests.ops.linear_kl.ranks import OPTIONS, Wire, join

TOKENS = 8
CUT = dict(h=65, v=127)  # 4128 elements each: the 64th row is cut in two
WHOLE = dict(h=48, v=128)  # 64 rows each


def cases() -> dict[str, tuple[Problem, int]]:
    """Problems of all tokens, and how many of them the first rank has."""
    found = {}
    weights = torch.tensor([1.0, 0, 2, 1, 0.5, 0, 3, 1])
    for direction in DIRECTIONS:
        for dtype, target, shape in ((FP32, 1e-4, CUT), (BF16, 2e-3, WHOLE), (BF16, 1e-6, CUT)):
            problem, _ = at_divergence(target, dtype, n=TOKENS, direction=direction, **shape)
            found[f"{direction} {dtype} {target}"] = (problem, 5)
        options = dict(n=TOKENS, direction=direction, token_weights=weights, **OPTIONS)
        found[f"{direction} options"] = (make_problem(FP32, **options, **CUT), 5)
        found[f"{direction} sum"] = (make_problem(FP32, **options, **WHOLE, reduction="sum"), 3)
    found["none"] = (make_problem(n=TOKENS, reduction="none", token_weights=weights, **CUT), 5)
    found["no tokens on one rank"] = (make_problem(n=TOKENS, reduction="sum", **CUT), TOKENS)
    found["no tokens"] = (make_problem(n=TOKENS, token_weights=0 * weights, **CUT), 5)
    return found


def part(problem: Problem, count: int, rank: int) -> Problem:
    """The tokens of one rank."""
    own = slice(0, count) if rank == 0 else slice(count, TOKENS)
    options = dict(problem.options)
    if "token_weights" in options:
        options["token_weights"] = options["token_weights"][own]
    return Problem(
        problem.hidden[own], problem.weight, problem.teacher_hidden[own], options=options
    )


def parted(weight: torch.Tensor) -> nn.Parameter:
    """A head (V, H) as DeepSpeed's ZeRO-3 parts it."""
    import deepspeed

    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    head.weight = nn.Parameter(weight.clone(), requires_grad=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=head, config_dict_or_path=config)
    assert head.weight.numel() == 0  # the whole one is gone
    return head.weight


def call(problem: Problem, flat: torch.Tensor, backend: str | None = None) -> dict:
    x = problem.hidden.clone().requires_grad_()
    loss = zero3_linear_kl_div(
        x, flat, problem.weight.shape[0], problem.teacher_hidden, backend=backend, **problem.options
    )
    factors = torch.arange(1, loss.numel() + 1).to(loss) if loss.dim() else torch.tensor(8.0)
    (loss * factors).sum().backward()
    with torch.no_grad():
        again = zero3_linear_kl_div(
            x, flat, problem.weight.shape[0], problem.teacher_hidden, **problem.options
        )
    return dict(loss=loss.detach(), again=again, dx=x.grad)


def worker(rank: int, world: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    join(rank, world, folder)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found: dict[str, object] = {}
    for name, (problem, count) in cases().items():
        weight = parted(problem.weight)
        found[name] = call(part(problem, count, rank), weight.ds_tensor)
    for shape in (CUT, WHOLE):
        problem = make_problem(BF16, n=TOKENS, **shape)
        flat = parted(problem.weight).ds_tensor
        rows = own_rows(flat, shape["v"], shape["h"], dist.group.WORLD)
        found[f"rows {shape['h']}"] = rows.clone()
        assert (rows.data_ptr() == flat.data_ptr()) == (shape is WHOLE)
        with Wire() as wire:
            call(part(problem, 5, rank), flat)
        found[f"bytes {shape['h']}"] = (wire.gathered, wire.reduced, wire.scattered)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
