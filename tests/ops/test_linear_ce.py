"""Cross-entropy from hidden states, against torch's own on full logits in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from es2fast.ops.linear_ce import linear_cross_entropy

FORMS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"logit_scale": 0.25},
    {"logit_scale": 2.0, "softcap": 5.0},
]


def problem(n: int, v: int, bias: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Trainable hidden states, head and bias; targets; weights with a zero among them."""
    draw = torch.Generator().manual_seed(n * v)
    leaves = [torch.randn(n, 24, generator=draw), 0.5 * torch.randn(v, 24, generator=draw)]
    leaves += [torch.randn(v, generator=draw)] if bias else []
    targets = torch.randint(v, (n,), generator=draw)
    weights = torch.rand(n, generator=draw)
    weights[n // 2] = 0.0
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], targets, weights


def oracle(
    leaves: list[Tensor], targets: Tensor, weights: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Loss, likeliest tokens and gradients, fp64."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = scale * F.linear(*wide)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = (weights.double() * F.cross_entropy(logits, targets, reduction="none")).sum()
    return loss.detach(), logits.argmax(-1), list(torch.autograd.grad(3.0 * loss, wide))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "v", "chunk"), [(13, 101, 4), (8, 37, 8), (5, 300, None)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)]
)
def test_value_and_gradients_equal_full_logits_in_fp64(
    form: dict[str, Any], bias: bool, n: int, v: int, chunk: int | None, dtype: Any, bound: float
) -> None:
    """The bound of bfloat16 is that of rounding the gradients to it: what was saved, and again
    when it is multiplied."""
    leaves, targets, weights = problem(n, v, bias, dtype)
    scale, cap = form.get("logit_scale", 1.0), form.get("softcap")
    expected, top, gradients = oracle(leaves, targets, weights, scale, cap)
    loss, hits = linear_cross_entropy(
        *leaves[:2], targets, weights, bias=leaves[2] if bias else None, chunk_tokens=chunk, **form
    )
    (3.0 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=max(bound / 10, 1e-6))
    assert torch.equal(hits, top == targets)
    for leaf, gradient in zip(leaves, gradients):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        assert (leaf.grad.double() - gradient).norm() <= bound * gradient.norm()


def test_only_what_trains_gets_a_gradient_and_nothing_without_grad() -> None:
    leaves, targets, weights = problem(6, 40, True, torch.float32)
    hidden, head, bias = leaves
    frozen = [head.detach(), bias.detach()]
    loss, _ = linear_cross_entropy(hidden, frozen[0], targets, weights, bias=frozen[1])
    loss.backward()
    assert hidden.grad is not None and head.grad is None and bias.grad is None
    with torch.no_grad():
        again, _ = linear_cross_entropy(hidden, head, targets, weights, bias=bias)
    assert not again.requires_grad and torch.equal(again, loss.detach())


def test_logits_of_one_chunk_exist_at_a_time() -> None:
    """The largest tensor that is made has chunk x V entries."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest = max(largest, out.numel())
            return out

    leaves, targets, weights = problem(64, 1024, False, torch.float32)
    with Watch():
        linear_cross_entropy(leaves[0], leaves[1].detach(), targets, weights, chunk_tokens=4)
    assert 0 < largest <= 1024 * 24  # of which 4 x 1024 are logits; 64 x 1024 would be all


def test_an_impossible_target_without_weight_does_not_count() -> None:
    leaves, targets, weights = problem(6, 20, True, torch.float32)
    with torch.no_grad():
        leaves[2][targets[3]] = -torch.inf
    weights[targets == targets[3]] = 0.0
    loss, _ = linear_cross_entropy(*leaves[:2], targets, weights, bias=leaves[2])
    assert loss.isfinite() and loss > 0


def test_no_tokens_are_no_loss_and_no_gradient() -> None:
    leaves, targets, weights = problem(2, 40, False, torch.float32)
    loss, hits = linear_cross_entropy(leaves[0][:0], leaves[1], targets[:0], weights[:0])
    loss.backward()
    assert loss.item() == 0.0 and hits.shape == (0,)
    assert not leaves[1].grad.any()


def test_arguments_that_do_not_fit_are_named() -> None:
    leaves, targets, weights = problem(4, 40, False, torch.float32)
    with pytest.raises(ValueError, match=r"targets has shape \(3,\): expected \(4,\)"):
        linear_cross_entropy(*leaves, targets[:3], weights)
    with pytest.raises(ValueError, match=r"token_weights has shape \(3,\)"):
        linear_cross_entropy(*leaves, targets, weights[:3])
    with pytest.raises(ValueError, match="chunk_tokens=0"):
        linear_cross_entropy(*leaves, targets, weights, chunk_tokens=0)
