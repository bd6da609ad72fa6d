"""The matrix of the pairwise separation on a real GPU, compiled kernels and cuBLAS GEMMs."""

from __future__ import annotations

import pytest
import torch

from es2fast import pairwise_distance_stats, pairwise_separation
from es2fast.ops.backends import choose_backend
from tests.ops.separation_matrix import (
    BF16,
    CASES,
    FP16,
    FP32,
    PAIR_CASES,
    check,
    make_problem,
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]
SHAPES = {"small": (37, 53, 129), "GEMM": (300, 517, 1000), "aligned": (512, 256, 4096)}


@pytest.fixture(params=("triton", "torch"))
def backend(request) -> str:
    try:
        return choose_backend(request.param, harmful=torch.empty(1, 1, device="cuda"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", (0.0, 1000.0))
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses(backend, case, dtype, mean, shape):
    n, m, h = SHAPES[shape]
    weights = shape == "GEMM"
    if mean and dtype == FP16:
        pytest.skip("float16 ends at 65504")
    problem = make_problem(case, dtype, n=n, m=m, h=h, mean=mean, weights=weights)
    bound = {FP32: 2e-4 if mean else 2e-5, BF16: 1e-3, FP16: 1e-3}[dtype]
    check(problem.to("cuda"), backend, bound)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("case", PAIR_CASES)
def test_duplicates_and_close_pairs(backend, case, dtype):
    problem = make_problem(case, dtype, n=300, m=517, h=257, chunk_rows=128)
    a, b = problem.harmful, problem.harmless
    b[:50] = a[:50]
    b[50] = b[51] = a[0]
    for i, distance in enumerate((1e-1, 1e-2, 1e-3, 1e-4)):
        b[100 + i] = a[100 + i] + distance * torch.randn_like(a[0])
    check(problem.to("cuda"), backend)


@pytest.mark.parametrize("n", (64, 3000))
@pytest.mark.parametrize("case", PAIR_CASES)
def test_repeats_bit_by_bit(backend, case, n):
    problem = make_problem(case, BF16, n=n, m=n - 3, h=512).to("cuda")
    problem.harmless[:9] = problem.harmful[:9]
    first, second = run(problem, backend), run(problem, backend)
    for name in ("loss", "da", "db"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_default_is_triton():
    assert choose_backend(None, harmful=torch.empty(1, 1, device="cuda")) == "triton"


@pytest.mark.parametrize("n", (64, 1000))
@pytest.mark.parametrize("case", CASES)
def test_no_synchronization(case, n):
    problem = make_problem(case, BF16, n=n, m=n, h=256, weights=True).to("cuda")
    for mode in ("default", "error"):  # the first call compiles
        torch.cuda.set_sync_debug_mode(mode)
        try:
            run(problem, "triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_compiled_equals_eager():
    for n in (64, 300):
        problem = make_problem("hinge", BF16, n=n, m=n, h=512).to("cuda")
        eager = run(problem)
        torch._dynamo.reset()
        rows = [t.clone().requires_grad_() for t in (problem.harmful, problem.harmless)]
        compiled = torch.compile(pairwise_separation, fullgraph=True)
        compiled(*rows, **problem.options).backward()
        assert torch.equal(rows[0].grad, eager.da) and torch.equal(rows[1].grad, eager.db)


def test_memory_is_a_chunk():
    """16384 x 16384: 1 GB of float32 distances; the chunk is 2^24 pairs of 6 bytes."""
    n, h = 16384, 1024
    a, b = (torch.randn(n, h, device="cuda", dtype=BF16, requires_grad=True) for _ in range(2))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    pairwise_separation(a, b, margin=(2 * h) ** 0.5).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 8 * 2**24 + 32 * n * h, f"{extra / 1e9:.2f} GB"


def test_statistics():
    a, b = torch.randn(5000, 300), torch.randn(4100, 300) + 0.1
    here, there = pairwise_distance_stats(a, b), pairwise_distance_stats(a.cuda(), b.cuda())
    for name in ("mean", "std", "min", "max", "within_a", "between"):
        assert getattr(there, name) == pytest.approx(getattr(here, name), rel=1e-5)
    assert there.quantiles == pytest.approx(here.quantiles, rel=1e-4)
