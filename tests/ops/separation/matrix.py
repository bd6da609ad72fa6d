"""Problems, oracle and check shared by the separation's tests on the CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from es2fast import Whitening, pairwise_separation
from es2fast.ops.reference import separation

FP64, FP32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# value and gradients, relative, before the gradients are rounded to the inputs' dtype
TOLERANCE = {FP64: 1e-9, FP32: 2e-5, BF16: 1e-3, FP16: 1e-3}

# loss, margin in units of the typical distance, and how the value may vanish
CASES: dict[str, tuple[str, float | None]] = {
    "hinge": ("hinge", 1.02),
    "l2": ("l2", None),
    "log": ("log", None),
    "softplus": ("softplus", 1.5),
    "squared": ("squared", None),
    "squared hinged": ("squared", 1.02),
    "centroid": ("centroid", None),
    "centroid hinged": ("centroid", 1.5),
    "fisher": ("fisher", None),
    "fisher hinged": ("fisher", 1.3),
    "cosine": ("cosine", None),
}
PAIR_CASES = [name for name in CASES if not name.startswith("centroid") and name != "squared"]


# (n, m, H): the interpreter has a program per row and is slow
SIZES = {"torch": (37, 53, 129), "native": (37, 53, 129), "triton": (6, 37, 40)}


@dataclass
class Problem:
    """One call of the op."""

    harmful: Tensor
    harmless: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, device: str) -> Problem:
        options = {k: v.to(device) if hasattr(v, "to") else v for k, v in self.options.items()}
        return Problem(self.harmful.to(device), self.harmless.to(device), options)


@dataclass
class Result:
    loss: Tensor
    da: Tensor
    db: Tensor


def make_problem(
    case: str,
    dtype: torch.dtype,
    *,
    n: int = 37,
    m: int = 53,
    h: int = 129,
    mean: float = 0.0,
    weights: bool = False,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Two groups of spread 1, their means ``0.1 sqrt(h)`` apart, around ``mean`` spreads."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=FP64)

    centre = mean * randn(h)
    a, b = (centre + randn(n, h)).to(dtype), (centre + randn(m, h) + 0.1).to(dtype)
    loss, margin = CASES[case]
    d0 = typical(a, b)
    if loss == "cosine":
        options["margin"] = cosine_margin(a, b)
    elif loss == "fisher":
        states = centre + randn(12, h), centre + randn(12, h) + 0.1
        options["whitening"] = Whitening.fit(*states, rank=4, shrinkage=0.3)
        options["scale"] = h**0.5
        options["margin"] = None if margin is None else margin * (2 * h) ** 0.5
    else:
        options |= dict(scale=0.7 * d0, margin=None if margin is None else margin * d0)
    if weights:
        options["harmful_weights"] = torch.rand(n, generator=gen) * (torch.arange(n) % 3 > 0)
        options["harmless_weights"] = torch.arange(m) % 4 > 0
    return Problem(a, b, {"loss": loss, **options})


def typical(a: Tensor, b: Tensor) -> float:
    if min(a.shape[0], b.shape[0]) == 0:
        return 1.0
    return (a.double()[:, None] - b.double()[None]).norm(dim=-1).mean().item()


def cosine_margin(a: Tensor, b: Tensor) -> float:
    """Below the typical cosine by the typical 1 - cosine, so that relu's argument has a size."""
    if min(a.shape[0], b.shape[0]) == 0:
        return 0.0
    x, y = (torch.nn.functional.normalize(t.double(), dim=1) for t in (a, b))
    cosines = x @ y.t()
    return (cosines.mean() - 0.5 * (1 - cosines).mean().clamp(max=0.5)).item()


def dense_covariance(whitening: Whitening) -> Tensor:
    """The covariance that a whitening stands for, in fp64: (W^T W)^-1."""
    h = whitening.inverse_std.shape[0]
    f = whitening.factor.double()
    w = (torch.eye(h, dtype=FP64) - f @ f.t()) * whitening.inverse_std.double()
    return torch.linalg.inv(w.t() @ w)


def _call(problem: Problem, function: Any, dtype: torch.dtype | None, **more: Any) -> Result:
    a, b = (
        t.detach().to(dtype or t.dtype).requires_grad_()
        for t in (problem.harmful, problem.harmless)
    )
    loss = function(a, b, **(problem.options | more))
    loss.backward()
    assert a.grad is not None and b.grad is not None
    return Result(loss.detach(), a.grad, b.grad)


def run(problem: Problem, backend: str | None = None, **more: Any) -> Result:
    return _call(problem, pairwise_separation, None, backend=backend, **more)


def oracle(problem: Problem) -> Result:
    """The definition in fp64, on the CPU, on the rounded inputs."""
    problem = problem.to("cpu")
    options = {k: v for k, v in problem.options.items() if k not in ("chunk_rows", "whitening")}
    if "whitening" in problem.options:
        options["covariance"] = dense_covariance(problem.options["whitening"])
    return _call(replace(problem, options=options), separation, FP64)


def relative(got: Tensor, want: Tensor) -> float:
    error = (got.double().cpu() - want).norm()
    return (error / want.norm()).item() if want.norm() > 0 else error.item()


def check(problem: Problem, backend: str | None, tolerance: float | None = None) -> Result:
    """Value and both gradients against the oracle."""
    got, want = run(problem, backend), oracle(problem)
    bound = TOLERANCE[problem.harmful.dtype] if tolerance is None else tolerance
    for name in ("loss", "da", "db"):
        made, true = getattr(got, name), getattr(want, name)
        rounding = relative(true.to(made.dtype), true)  # 1.7e-3 for a bf16 gradient, unavoidable
        error = relative(made, true)
        assert error <= (bound**2 + rounding**2) ** 0.5, f"{name}: {error}, rounding {rounding}"
    assert got.da.dtype == problem.harmful.dtype and got.db.dtype == problem.harmless.dtype
    return got
