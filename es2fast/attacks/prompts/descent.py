"""Gradient descent on free embeddings: one soft prompt per row, or one for all rows.

Legend: B rows, K free embeddings, H hidden size.

Rows are optimised side by side: the loss of the batch is the sum of the rows' losses, so a row's
gradient, and hence its path, is what it would be alone. A row whose loss has reached `stop` leaves
the batch. Steps are either signSGD (Schwinn et al. 2024),

    x <- x - lr sign(dloss/dx)

or Adam on gradients clipped to norm 1 per row (Bailey et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.attacks.prompts.embeddings import Batch, Row, layout

BETAS = (0.9, 0.999)
Objective = Callable[[Batch, Tensor], Tensor]  # (batch, soft (B, K, H)) -> losses (B,)


class Steps:
    """The update rule, with the state it keeps per row.

    Args:
        rule: "sign" or "adam".
        lr: in units of the embeddings.
        like: (B, K, H), what is optimised.
    """

    def __init__(self, rule: str, lr: float, like: Tensor):
        self._rule, self._lr, self._count = rule, lr, 0
        if rule == "adam":
            self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)

    def __call__(self, soft: Tensor, gradient: Tensor, rows: Tensor) -> Tensor:
        """The next `soft` (b, K, H) of the rows numbered `rows` (b,), which may only get fewer."""
        if self._rule == "sign":
            return soft - self._lr * gradient.sign()
        self._count += 1
        size = gradient.flatten(1).norm(dim=1)[:, None, None]
        gradient = gradient / size.clamp_min(1.0)
        first, second = BETAS
        self._mean[rows] = first * self._mean[rows] + (1 - first) * gradient
        self._square[rows] = second * self._square[rows] + (1 - second) * gradient.square()
        mean = self._mean[rows] / (1 - first**self._count)
        square = self._square[rows] / (1 - second**self._count)
        return soft - self._lr * mean / (square.sqrt() + 1e-8)


@dataclass(frozen=True)
class Found:
    """What the descent ended with: per row the best `soft` (B, K, H) and its loss, and the loss it
    started from, (B,)."""

    soft: Tensor
    losses: Tensor
    first: Tensor


def fit_rows(
    model: nn.Module,
    objective: Objective,
    rows: Sequence[Row],
    start: Tensor,
    steps: Steps,
    stop: float,
    bar: Any,
) -> Found:
    """One soft prompt per row.

    Args:
        objective: losses to be made small.
        start: (B, K, H), where each row starts.
        stop: loss at which a row is done.
        bar: the loop's counter, a progress bar; its last round only measures.
    """
    soft, best = start.clone(), start.clone()
    losses = torch.full(start.shape[:1], torch.inf, dtype=start.dtype, device=start.device)
    first = losses.clone()
    active = torch.arange(len(rows), device=start.device)
    batch = layout(model, rows, start.shape[1], start.device)
    for number in bar:
        part = soft[active].requires_grad_()
        found = objective(batch, part)
        (gradient,) = torch.autograd.grad(found.sum(), part)
        part, found = part.detach(), found.detach().to(losses.dtype)
        if number == 0:
            first[active] = found
        better = found < losses[active]
        losses[active[better]], best[active[better]] = found[better], part[better]
        soft[active] = steps(part, gradient, active)
        if (found <= stop).any():
            active = active[found > stop]
            if not len(active):
                break
            left = [rows[i] for i in active.tolist()]
            batch = layout(model, left, start.shape[1], start.device)
    return Found(best, losses, first)


def fit_universal(
    model: nn.Module,
    objective: Objective,
    rows: Sequence[Row],
    start: Tensor,
    steps: Steps,
    stop: float,
    bar: Any,
    size: int,
) -> tuple[Tensor, list[float]]:
    """One soft prompt for all rows: every step goes down the mean loss of the next `size` rows.

    Args:
        start: (K, H); the rest as for `fit_rows`.

    Returns:
        the soft prompt (K, H), and the mean loss of each step before it was made. It stops when the
        mean over one pass through the rows has reached `stop`.
    """
    device, one = start.device, torch.zeros(1, dtype=torch.int64, device=start.device)
    batches = [
        layout(model, rows[i : i + size], len(start), device) for i in range(0, len(rows), size)
    ]
    soft, curve = start.clone(), []
    for number in bar:
        batch = batches[number % len(batches)]
        part = soft.clone().requires_grad_()
        loss = objective(batch, part.expand(len(batch.mask), -1, -1)).mean()
        (gradient,) = torch.autograd.grad(loss, part)
        curve.append(float(loss.detach()))
        last = curve[-len(batches) :]
        if len(curve) >= len(batches) and sum(last) / len(last) <= stop:
            break
        soft = steps(part.detach()[None], gradient[None], one)[0]
    return soft, curve
