"""The light row kernel's soft-cap with the errors of a GPU's instructions, in the interpreter.

On a GPU ``_exp2`` and ``_reciprocal`` are ``ex2.approx.ftz.f32`` and ``rcp.approx.ftz.f32``, which
the interpreter computes exactly. Here they err by what PTX's manual allows, 2^-22 and 2^-23 of the
result, up or down by a hash of the argument.
"""

from __future__ import annotations

import pytest

from tests.ops.interpreter import check_in_interpreter

triton = pytest.importorskip("triton", reason="the kernels need triton")

import torch  # noqa: E402
import triton.language as tl  # noqa: E402

from es2fast.ops.linear_kl import triton_light  # noqa: E402
from tests.ops.linear_kl.matrix import BF16, DIRECTIONS, at_divergence, check  # noqa: E402

INTERPRETED = bool(triton.knobs.runtime.interpret)
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter")
CAP = 30.0


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.slow
def test_in_the_interpreter():
    check_in_interpreter("tests/ops/linear_kl/test_softcap_approximation.py", "errors")


@triton.jit
def _off(x, y, largest):
    """y, wrong by ``largest`` of itself, up or down by the bits of x."""
    hashed = x.to(tl.int32, bitcast=True) * 747796405
    return y + y * tl.where((hashed >> 16) & 1 == 1, largest, -largest)


@triton.jit
def _exp2(x):
    return _off(x, tl.exp2(x), 2.0**-22)


@triton.jit
def _reciprocal(x):
    return _off(x, 1.0 / x, 2.0**-23)


@pytest.fixture
def approximate(monkeypatch):
    monkeypatch.setattr(triton_light, "_exp2", _exp2)
    monkeypatch.setattr(triton_light, "_reciprocal", _reciprocal)


@triton.jit
def _cap_kernel(t_ptr, s_ptr, out_ptr, cap_in, cap_out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    z, d, slope = triton_light._capped(tl.load(t_ptr + at), tl.load(s_ptr + at), cap_in, cap_out)
    tl.store(out_ptr + at, z)
    tl.store(out_ptr + SIZE + at, d)
    tl.store(out_ptr + 2 * SIZE + at, slope)


@needs_interpreter
def test_errors_of_the_transform(approximate):
    """Logits to 10 caps, differences from 1e-7 to 100: z to 1e-6 caps, the others relatively."""
    gen = torch.Generator().manual_seed(0)
    size = 2**14
    t = CAP * torch.randn(size, generator=gen) * 10 ** (2 * torch.rand(size, generator=gen) - 1)
    s = t + torch.randn(size, generator=gen) * 10 ** (9 * torch.rand(size, generator=gen) - 7)
    out = torch.empty(3, size)
    _cap_kernel[(1,)](t, s, out, 1 / CAP, CAP, SIZE=size)
    x_t, x_s = t.double() / CAP, s.double() / CAP
    z, slope = CAP * x_t.tanh(), x_s.cosh() ** -2
    d = CAP * (x_s - x_t).sinh() / (x_s.cosh() * x_t.cosh())
    assert (out[0] - z).abs().max() <= 1e-6 * CAP
    normal = (x_t.abs() < 20) & (x_s.abs() < 20)  # further out E is at its bound
    for got, wanted in ((out[1], d), (out[2], slope)):
        error = (got - wanted).abs()
        assert (error[normal] <= 5e-5 * wanted[normal].abs()).all()
        assert error[~normal].max() <= 1e-12


@needs_interpreter
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_errors_of_the_divergence(approximate, direction):
    for target in (2e-3, 1e-6):
        problem, _ = at_divergence(
            target, BF16, n=3, v=600, spread=8.0, separate=True, direction=direction, softcap=CAP
        )
        check(problem, "triton", "x")
