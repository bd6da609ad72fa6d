"""Attention of short bfloat16 rows against float64, and against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from es2fast.modeling.row_attention import WIDTHS, causal_attention


def operands(
    width: int, heads: int = 6, groups: int = 2, size: int = 32, rows: int = 3, reach: float = 1.0
) -> list[Tensor]:
    """Query, key and value (R, heads, W, D) with gradients, scores of about `reach`^2, and the
    output's gradient."""
    generator = torch.Generator().manual_seed(width)

    def draw(count: int, by: float = 1.0) -> Tensor:  # laid out as projections leave them
        made = by * torch.randn(rows, width, count, size, generator=generator)
        return made.bfloat16().transpose(1, 2)

    made = [draw(heads, reach), draw(groups, reach), draw(groups)]
    return [*(x.requires_grad_() for x in made), draw(heads)]


def truth(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients in float64, softmax written out, heads repeated."""
    q, k, v = (x.detach().double().requires_grad_() for x in (query, key, value))
    times = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(times, 1).mT / q.shape[-1] ** 0.5
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    out = weights @ v.repeat_interleave(times, 1)
    return torch.autograd.grad(out, (q, k, v), grad.double())


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]


@pytest.mark.parametrize("reach", [1.0, 6.0])
@pytest.mark.parametrize(("width", "groups"), [(16, 2), (19, 1), (19, 6), (70, 2)])
def test_gradients_are_as_near_to_float64_as_torchs_own(
    width: int, groups: int, reach: float
) -> None:
    *inputs, grad = operands(width, groups=groups, reach=reach)
    out = causal_attention(*inputs)
    own = scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    assert torch.equal(out, own)
    exact = truth(*inputs, grad)
    found = errors(torch.autograd.grad(out, inputs, grad), exact)
    theirs = errors(torch.autograd.grad(own, inputs, grad), exact)
    assert max(found) < 2e-2  # the output, which enters, is rounded to 2^-8
    assert all(one < 1.1 * other for one, other in zip(found, theirs, strict=True))


def test_a_scale() -> None:
    *inputs, grad = operands(18)
    query, key, value = inputs
    found = torch.autograd.grad(causal_attention(query, key, value, 0.5), inputs, grad)
    larger = (query.detach() * 0.5 * 32**0.5, key, value)
    dq, dk, dv = truth(*larger, grad)
    assert max(errors(found, (dq * 0.5 * 32**0.5, dk, dv))) < 2e-2


def test_others_are_torchs_own() -> None:
    query, key, value, _ = operands(20)
    assert "ShortRows" in type(causal_attention(query, key, value).grad_fn).__name__
    wide = causal_attention(query.float(), key.float(), value.float())
    assert "ShortRows" not in type(wide.grad_fn).__name__
    dropped = causal_attention(query, key, value, dropout=0.5)
    assert "ShortRows" not in type(dropped.grad_fn).__name__
    for width in (WIDTHS.start - 1, WIDTHS.stop):
        other = operands(width, heads=1, groups=1, size=8, rows=1)
        assert "ShortRows" not in type(causal_attention(*other[:3]).grad_fn).__name__


def test_a_block_that_is_computed_again_for_its_gradient() -> None:
    *inputs, grad = operands(21)
    plain = torch.autograd.grad(causal_attention(*inputs), inputs, grad)
    again = checkpoint(causal_attention, *inputs, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again, inputs, grad), plain))
