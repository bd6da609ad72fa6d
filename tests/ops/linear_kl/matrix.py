"""The test matrix of the linear KL: problems, the float64 oracle, the bounds.

One matrix for every backend and device: test_linear_kl.py runs it here (the Triton kernels in the
interpreter), tests/gpu/test_linear_kl_gpu.py on a GPU. The oracle is es2fast.ops.reference in
float64 on the already rounded inputs, so it shares no rounding with the code under test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from es2fast import linear_kl_div
from es2fast.ops.reference import linear_kl_div_reference

DIRECTIONS = ("forward", "reverse", "jsd")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
VALUE_BOUND = 1e-3
# Options that say how, not what.
HOW = ("chunk_tokens", "max_valid_tokens", "exact", "grad_buffer_bytes", "low_memory")


def gradient_bound(dtype: torch.dtype, kl: float) -> float:
    """Relative L2 error allowed in dX (and dW): what the op promises."""
    if dtype == torch.float32:
        return 2e-5 if kl >= 2e-3 else 2e-3
    return 4e-3


@dataclass
class Problem:
    """Inputs of one call, by name, and the options that go with them."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str) -> Problem:
        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return self._map(move)

    def cast(self, dtype: torch.dtype) -> Problem:
        return self._map(lambda x: x.to(dtype) if isinstance(x, Tensor) else x)

    def _map(self, function: Callable[[Any], Any]) -> Problem:
        options = {k: function(v) for k, v in self.options.items()}
        tensors = (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        return Problem(*(function(t) for t in tensors), options)


@dataclass
class Outcome:
    """Loss and gradients (None where the input has none)."""

    loss: Tensor
    dx: Tensor | None
    dw: Tensor | None
    db: Tensor | None


def make_problem(
    dtype: torch.dtype = FP32,
    n: int = 5,
    h: int = 65,
    v: int = 127,
    spread: float = 2.0,  # standard deviation of the logits: 0.5 is flat, 6 is peaked
    distance: float = 0.1,  # standard deviation of the student's perturbation
    separate: bool = False,
    teacher_h: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Random heads and states. With ``separate`` the teacher's head is perturbed as well."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen)

    weight = randn(v, h) * (spread / h**0.5)
    teacher_hidden = randn(n, h).to(dtype)
    hidden = (teacher_hidden.float() + distance * randn(n, h)).to(dtype)
    teacher_weight = None
    if teacher_h is not None:
        teacher_hidden = randn(n, teacher_h).to(dtype)
        teacher_weight = (randn(v, teacher_h) * (spread / teacher_h**0.5)).to(dtype)
    elif separate:
        teacher_weight = (weight + distance * spread / h**0.5 * randn(v, h)).to(dtype)
    return Problem(hidden, weight.to(dtype), teacher_hidden, teacher_weight, options)


def at_divergence(target: float, dtype: torch.dtype, **kwargs: Any) -> tuple[Problem, float]:
    """A problem whose loss is about ``target``, and what it is."""
    distance = target**0.5
    for _ in range(4):
        problem = make_problem(dtype, distance=distance, **kwargs)
        found = float(oracle(problem, gradients=False).loss)
        if 0.7 < found / target < 1.4:
            break
        distance *= (target / max(found, target / 100)) ** 0.5
    assert 0.2 < found / target < 5, (target, found)
    return problem, found


def run(problem: Problem, backend: str | None, gradients: str = "xwb", **extra: Any) -> Outcome:
    """The op under test; ``gradients`` names what requires grad among x, w, b.

    Leaves of their own on the problem's memory: a clone would lose the strides.
    """
    options = problem.options | extra
    x = problem.hidden.detach().requires_grad_("x" in gradients)
    w = problem.weight.detach().requires_grad_("w" in gradients)
    bias = options.pop("bias", None)
    if bias is not None:
        bias = bias.detach().requires_grad_("b" in gradients)
    loss = linear_kl_div(
        x,
        w,
        problem.teacher_hidden,
        problem.teacher_weight,
        bias=bias,
        backend=backend,
        **options,
    )
    if loss.requires_grad:
        _weighted(loss).backward()
    return Outcome(loss.detach(), x.grad, w.grad, None if bias is None else bias.grad)


def oracle(problem: Problem, gradients: bool = True) -> Outcome:
    """The definition in float64 on the same rounded inputs."""

    def wide(t: Any) -> Any:
        is_real = isinstance(t, Tensor) and t.is_floating_point()
        return t.detach().double() if is_real else t

    options = {k: wide(v) for k, v in problem.options.items()}
    for name in HOW:
        options.pop(name, None)
    x, w = wide(problem.hidden), wide(problem.weight)
    bias = options.pop("bias", None)
    for t in (x, w, bias):
        if t is not None:
            t.requires_grad_(gradients)
    loss = linear_kl_div_reference(
        x, w, wide(problem.teacher_hidden), wide(problem.teacher_weight), bias=bias, **options
    )
    if gradients:
        _weighted(loss).backward()
    return Outcome(loss.detach(), x.grad, w.grad, None if bias is None else bias.grad)


def _weighted(loss: Tensor) -> Tensor:
    """A scalar whose gradient differs per token when there is one loss per token."""
    if loss.dim() == 0:
        return loss * 8.0
    factors = torch.arange(1, loss.shape[0] + 1, device=loss.device, dtype=loss.dtype)
    return (loss * factors).sum()


def relative(got: Tensor, expected: Tensor) -> float:
    """Relative L2 error; the absolute one where nothing is expected."""
    error = (got.double() - expected.double()).norm()
    return float(error / expected.norm()) if expected.norm() > 0 else float(error)


def check(problem: Problem, backend: str | None, gradients: str = "xwb") -> None:
    """The op against the oracle, within the bounds."""
    expected = oracle(problem)
    kl = float(expected.loss.abs().mean()) if expected.loss.numel() else 0.0
    bound = gradient_bound(problem.hidden.dtype, kl)
    got = run(problem, backend, gradients)
    assert got.loss.shape == expected.loss.shape and got.loss.dtype == torch.float32
    assert relative(got.loss, expected.loss) <= VALUE_BOUND
    for name in ("dx", "dw", "db"):
        actual, wanted = getattr(got, name), getattr(expected, name)
        if name[1] not in gradients or wanted is None:
            assert actual is None, f"{name} was not asked for"
            continue
        assert actual.dtype == problem.hidden.dtype and actual.shape == wanted.shape
        assert relative(actual, wanted) <= bound, (name, kl)
    with torch.no_grad():
        paths = ({"chunk_tokens": 2}, {"low_memory": True})  # chunked and, on triton, tile-fused
        for extra in paths:
            value = run(problem, backend, "", **extra).loss
            assert relative(value, expected.loss) <= VALUE_BOUND


def option_problems(dtype: torch.dtype, h: int = 65) -> dict[str, Problem]:
    """Every option alone, then all together. A GPU's tile-fused kernel wants h divisible by 16."""
    n, v, teacher_h = 5, 127, 48 if h % 16 == 0 else 33
    gen = torch.Generator().manual_seed(7)
    bias = torch.randn(v, generator=gen).to(dtype)
    other_bias = torch.randn(v, generator=gen).to(dtype)
    mask = torch.tensor([True, False, True, True, False])
    factors = torch.tensor([0.5, 0.0, 2.0, 0.25, 1.0])
    base = dict(dtype=dtype, n=n, h=h, v=v, chunk_tokens=2)
    plain = make_problem(**base)
    wide = torch.randn(v, 2 * h, generator=gen).to(dtype)[:, ::2] * 0.2
    strided = replace(plain, weight=wide, hidden=plain.hidden.t().contiguous().t())
    everything: dict[str, Any] = dict(
        bias=bias,
        teacher_bias=other_bias,
        temperature=2.0,
        logit_scale=3.0,
        softcap=6.0,
        vocab_size=101,
        token_weights=factors,
    )
    return {
        "plain": plain,
        "bias, shared head": make_problem(**base, bias=bias),
        "two heads": make_problem(**base, separate=True),
        "two heads, one bias": make_problem(**base, separate=True, teacher_bias=bias),
        "teacher of another width": make_problem(**base, teacher_h=teacher_h),
        "temperature": make_problem(**base, temperature=2.0),
        "scale": make_problem(**base, logit_scale=0.25),
        "soft-cap": make_problem(**base, softcap=3.0),
        "soft-cap, two heads": make_problem(**base, softcap=3.0, separate=True),
        "padding": make_problem(**base, vocab_size=100),
        "mask": make_problem(**base, token_weights=mask),
        "weights": make_problem(**base, token_weights=factors),
        "weights, hinted": make_problem(**base, token_weights=factors, max_valid_tokens=4),
        "weights, all kept": make_problem(**base, token_weights=factors, max_valid_tokens=5),
        "sum": make_problem(**base, reduction="sum", token_weights=factors),
        "none": make_problem(**base, reduction="none", token_weights=factors),
        "none, no weights": make_problem(**base, reduction="none"),
        "not contiguous": strided,
        "everything": make_problem(**base, separate=True, **everything),
        "everything, hidden width": make_problem(**base, teacher_h=teacher_h, **everything),
    }
