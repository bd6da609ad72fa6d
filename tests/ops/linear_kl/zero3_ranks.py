"""Two real processes share a head that DeepSpeed has parted; started by test_linear_kl_zero3.py."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn

from es2fast.distributed.runtime import stop
from es2fast.ops.linear_kl.zero3 import zero3_linear_kl_div
from es2fast.ops.zero3 import own_rows
from es2fast.ops.zero3_linear_ce import zero3_linear_cross_entropy
from tests.ops.linear_kl.matrix import (
    BF16,
    DIRECTIONS,
    FP32,
    Problem,
    at_divergence,
    make_problem,
)
from tests.ops.linear_kl.ranks import OPTIONS, Wire, join
from tests.ops.test_linear_ce import problem as entropy_problem

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
        bias = torch.linspace(-2, 2, 127)
        found[f"{direction} bias"] = (make_problem(FP32, **options, **CUT, bias=bias), 5)
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


def entropies() -> dict[str, tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, dict, int]]:
    """Of a cross-entropy the hidden states, head and bias, targets, weights, options, and how many
    tokens the first rank has. The third target's logit has an equal on the other rank."""
    found = {}
    for name, dtype, bias, count, form in (
        ("plain", FP32, False, 5, {}),
        ("bf16", BF16, False, 5, {}),
        ("options", FP32, True, 3, {"logit_scale": 2.0, "softcap": 5.0, "chunk_tokens": 3}),
        ("no tokens on one rank", FP32, True, TOKENS, {"chunk_tokens": 2}),
    ):
        leaves, targets, weights = entropy_problem(TOKENS, 101, bias, dtype)
        leaves = [leaf.detach() for leaf in leaves]
        leaves[1][[7, 90]] = 3 * leaves[0][2]
        targets[2] = 90
        found[name] = leaves, targets, weights, form, count
    return found


def parted(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A head (V, H) as DeepSpeed's ZeRO-3 parts it."""
    import deepspeed

    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    head.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias.clone(), requires_grad=False)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    deepspeed.zero.Init(module=head, config_dict_or_path=config)
    assert head.weight.numel() == 0  # the whole one is gone
    return head


def slices(head: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return head.weight.ds_tensor, None if head.bias is None else head.bias.ds_tensor


def call(problem: Problem, head: nn.Linear) -> dict:
    x = problem.hidden.clone().requires_grad_()
    options = dict(problem.options)
    options.pop("bias", None)
    flat, bias = slices(head)

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        vocab = problem.weight.shape[0]
        return zero3_linear_kl_div(
            x, flat, vocab, problem.teacher_hidden, flat_bias=bias, **options
        )

    loss = loss_of(x)
    factors = torch.arange(1, loss.numel() + 1).to(loss) if loss.dim() else torch.tensor(8.0)
    (loss * factors).sum().backward()
    with torch.no_grad():
        again = loss_of(x)
    return dict(loss=loss.detach(), again=again, dx=x.grad)


def call_entropy(name: str, rank: int) -> dict:
    leaves, targets, weights, form, count = entropies()[name]
    own = slice(0, count) if rank == 0 else slice(count, TOKENS)
    head = parted(*leaves[1:])
    x = leaves[0][own].clone().requires_grad_()
    arguments = x, slices(head)[0], 101, targets[own], weights[own]
    loss, hits = zero3_linear_cross_entropy(*arguments, flat_bias=slices(head)[1], **form)
    (3.0 * loss).backward()
    return dict(loss=loss.detach(), hits=hits, dx=x.grad)


def worker(rank: int, world: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    join(rank, world, folder)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    found: dict[str, object] = {}
    for name, (problem, count) in cases().items():
        head = parted(problem.weight, problem.options.get("bias"))
        found[name] = call(part(problem, count, rank), head)
    for name in entropies():
        found[f"entropy {name}"] = call_entropy(name, rank)
    for shape in (CUT, WHOLE):
        problem = make_problem(BF16, n=TOKENS, **shape)
        head = parted(problem.weight)
        flat = head.weight.ds_tensor
        rows, _ = own_rows(flat, shape["v"], shape["h"], dist.group.WORLD)
        found[f"rows {shape['h']}"] = rows.clone()
        assert (rows.data_ptr() == flat.data_ptr()) == (shape is WHOLE)
        with Wire() as wire:
            call(part(problem, 5, rank), head)
        found[f"bytes {shape['h']}"] = (wire.gathered, wire.reduced, wire.scattered)
    torch.save(found, f"{folder}/{rank}.pt")
    stop()
