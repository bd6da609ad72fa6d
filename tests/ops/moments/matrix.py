"""The test matrix of the teacher moments: the linear KL's problems and float64 oracle, the bounds.

Backends: those of ``moment_kl_div``, and "rounded": the torch row pass with G rounded to the head's
16 bits as on a GPU, so that the gradient's conditioning is tested without one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from es2fast import TeacherMoments, moment_kl_div, teacher_moments
from es2fast.ops.moments.chunked import MomentProblem, rounded_row_pass, run_moments
from tests.ops.linear_kl.matrix import (
    Outcome,
    Problem,
    make_problem,
    option_problems,
    oracle,
    relative,
)

VALUE_BOUND = 1e-5  # nats, per unit of token weight
GRADIENT_BOUND = 1e-2
MOMENT_OPTIONS = ("bias", "teacher_bias", "temperature", "logit_scale", "vocab_size")
LOSS_OPTIONS = ("bias", "token_weights", "max_valid_tokens", "reduction", "chunk_tokens")


def options_without_softcap(dtype: torch.dtype) -> dict[str, Problem]:
    """Every option of the linear KL that the moments have."""
    problems = option_problems(dtype)
    for problem in problems.values():
        problem.options.pop("softcap", None)
    return {name: p for name, p in problems.items() if not name.startswith("soft-cap")}


def moments_of(problem: Problem, top_k: int = 16, head: Tensor | None = None) -> TeacherMoments:
    """The teacher of a problem reduced; ``head`` replaces the student's (its float16 copy)."""
    options = {k: v for k, v in problem.options.items() if k in MOMENT_OPTIONS}
    weight = problem.weight if head is None else head
    teacher_weight = weight if problem.teacher_weight is None else problem.teacher_weight
    return teacher_moments(
        problem.teacher_hidden,
        teacher_weight,
        None if problem.teacher_weight is None else weight,
        top_k=top_k,
        chunk_tokens=problem.options.get("chunk_tokens"),
        **options,
    )


def run(
    problem: Problem,
    backend: str | None,
    top_k: int = 16,
    head: Tensor | None = None,
    moments: TeacherMoments | None = None,
    **extra: Any,
) -> Outcome:
    """moment_kl_div and its gradient, with moments made here unless they are given."""
    weight = problem.weight if head is None else head
    moments = moments_of(problem, top_k, head) if moments is None else moments
    options = {k: v for k, v in (problem.options | extra).items() if k in LOSS_OPTIONS}
    if backend == "rounded":
        return _run_rounded(problem, weight, moments)
    x = problem.hidden.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = moment_kl_div(x, weight, moments, backend=backend, **options)
    factors = 8.0 if not loss.dim() else torch.arange(1, len(loss) + 1, device=loss.device)
    (loss * factors).sum().backward()
    return Outcome(loss.detach(), x.grad, None, None)


def _run_rounded(problem: Problem, weight: Tensor, m: TeacherMoments) -> Outcome:
    n = problem.hidden.shape[0]
    rows, dx = run_moments(
        MomentProblem(
            hidden=problem.hidden,
            weight=weight,
            bias=None,
            tail_moment=m.tail_moment,
            top_ids=m.top_ids,
            top_probs=m.top_probs,
            tail_sums=m.tail_sums,
            index=None,
            scale=torch.full((n,), 8.0 / n, device=weight.device),
            gain=m.logit_scale / m.temperature,
            chunk_tokens=n,
            need_dx=True,
        ),
        rounded_row_pass,
    )
    return Outcome(rows.mean(), dx, None, None)


def check(
    problem: Problem,
    backend: str | None,
    bound: float = GRADIENT_BOUND,
    top_k: int = 16,
    head: Tensor | None = None,
) -> None:
    """Value and gradient against the oracle."""
    expected = oracle(problem)
    got = run(problem, backend, top_k, head)
    assert got.loss.shape == expected.loss.shape
    assert (got.loss - expected.loss).abs().max() <= VALUE_BOUND * _weight(problem)
    assert got.dx.dtype == problem.hidden.dtype and got.dx.shape == problem.hidden.shape
    assert relative(got.dx, expected.dx) <= bound, (relative(got.dx, expected.dx), bound)
    if backend != "rounded":
        with torch.no_grad():
            value = run_value(problem, backend, top_k, head)
        assert (value - expected.loss).abs().max() <= VALUE_BOUND * _weight(problem)


def run_value(problem: Problem, backend: str | None, top_k: int, head: Tensor | None) -> Tensor:
    """The loss under no_grad."""
    options = {k: v for k, v in problem.options.items() if k in LOSS_OPTIONS}
    weight = problem.weight if head is None else head
    moments = moments_of(problem, top_k, head)
    return moment_kl_div(problem.hidden, weight, moments, backend=backend, **options)


def _weight(problem: Problem) -> float:
    """What the tokens' errors are multiplied by in the loss."""
    weights, reduction = problem.options.get("token_weights"), problem.options.get("reduction")
    if reduction not in ("sum", "none"):
        return 1.0
    weights = torch.ones(len(problem.hidden)) if weights is None else weights.float()
    return float(weights.max() if reduction == "none" else weights.sum())


__all__ = [
    "check",
    "make_problem",
    "moments_of",
    "options_without_softcap",
    "run",
]
