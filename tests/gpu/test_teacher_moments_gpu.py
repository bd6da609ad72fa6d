"""The teacher moments on a real GPU: compiled row kernel, 16-bit GEMMs."""

from __future__ import annotations

import pytest
import torch

from es2fast import half_head, moment_kl_div, teacher_moments
from es2fast.ops.backends import choose_backend
from tests.ops.linear_kl_matrix import BF16, FP16, FP32, at_divergence, make_problem
from tests.ops.moments_matrix import check, moments_of, options_without_softcap, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
SHAPE = dict(n=35, h=257, v=2003, chunk_tokens=17)


@pytest.fixture(params=("triton", "torch"))
def backend(request) -> str:
    try:
        return choose_backend(request.param, hidden=torch.empty(1, 1, device="cuda"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("head", ("own", "half"))
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize(
    ("spread", "targets"), ((7.0, (0.4, 2e-2, 2e-3, 2e-4)), (0.5, (0.4, 2e-2, 2e-3)))
)
def test_sweep_towards_the_teacher(backend, dtype, spread, targets, head):
    if head == "half" and dtype != BF16:
        pytest.skip("a float16 head goes with bfloat16 states")
    for target in targets:
        problem, _ = at_divergence(target, dtype, spread=spread, **SHAPE)
        problem = problem.to("cuda")
        half = half_head(problem.weight).weight if head == "half" else None
        check(problem, backend, 1e-3 if dtype == FP32 else 1e-2, head=half)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("name", options_without_softcap(FP32))
def test_options(backend, name, dtype):
    problem = options_without_softcap(dtype)[name].to("cuda")
    check(problem, backend, head=problem.weight.half() if dtype == BF16 else None)


@pytest.mark.parametrize("v", (32000, 128256, 128256 + 3))
def test_large_vocabulary(backend, v):
    """Long sums of one sign in the tensor cores' accumulators; a real width."""
    problem = make_problem(BF16, n=300, h=1024, v=v, chunk_tokens=128).to("cuda")
    check(problem, backend, head=half_head(problem.weight).weight)


def test_default_is_triton_and_repeats_bit_by_bit():
    assert choose_backend(None, hidden=torch.empty(1, 1, device="cuda")) == "triton"
    problem = make_problem(BF16, n=3000, h=512, v=5003).to("cuda")
    moments = moments_of(problem)
    first, second = (run(problem, None, moments=moments) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.dx, second.dx)


def test_64_bit_offsets():
    """Rows beyond element 2^31 of the logits: 20000 x 128256 in one chunk."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    problem = make_problem(BF16, n=20000, h=16, v=128256).to("cuda")
    moments = teacher_moments(problem.teacher_hidden, problem.weight)
    whole, parts = (run(problem, "triton", moments=moments, chunk_tokens=c) for c in (20000, 1000))
    torch.testing.assert_close(whole.dx.float(), parts.dx.float(), rtol=2e-2, atol=1e-6)


def test_memory_is_a_chunk():
    n, h, v, chunk = 4096, 1024, 128256, 1024
    problem = make_problem(BF16, n=n, h=h, v=v).to("cuda")
    x, moments = problem.hidden.requires_grad_(), moments_of(problem)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    moment_kl_div(x, problem.weight, moments, chunk_tokens=chunk).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 4 * chunk * v + 64 * n * h, f"{extra / 1e9:.2f} GB"


def test_no_synchronization():
    problem = make_problem(BF16, n=64, v=1000).to("cuda")
    x, moments = problem.hidden.requires_grad_(), moments_of(problem)
    half = half_head(problem.weight).weight
    weights = torch.arange(64) % 2
    cases = ({}, dict(token_weights=weights.pin_memory()), dict(weight=half))
    for options in cases:
        arguments = dict(hidden=x, weight=problem.weight, moments=moments) | options
        for check_it in (False, True):
            torch.cuda.set_sync_debug_mode("error" if check_it else "default")
            try:
                moment_kl_div(**arguments).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
