"""The pairwise separation against its float64 definition: losses, options, edges, autograd.

Every test runs for each backend this process has: ``torch``, ``native`` when built, and ``triton``
when the interpreter is on (test_separation_triton.py starts a process with it).
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from es2fast import pairwise_separation
from es2fast.ops.backends import WHY_NOT, choose_backend
from tests.ops.separation.matrix import (
    BF16,
    CASES,
    FP16,
    FP32,
    FP64,
    PAIR_CASES,
    SIZES,
    Problem,
    check,
    make_problem,
    oracle,
    relative,
    run,
)


@pytest.fixture(params=(*WHY_NOT, "triton gemm"))
def backend(request, monkeypatch) -> str:
    """Triton twice: small groups have kernels of their own, which ``triton gemm`` turns off."""
    name = request.param.split()[0]
    try:
        chosen = choose_backend(name, harmful=torch.empty(1, 1))
    except ValueError as error:
        pytest.skip(f"{error} (test_separation_triton.py covers it in the interpreter)")
    if request.param == "triton gemm":
        module = "es2fast.ops.separation.triton"
        monkeypatch.setattr(f"{module}.SMALL", 0)
        for name in ("PREPARE", "PAIRS", "FINISH", "CLOSE"):  # several tiles of everything
            monkeypatch.setattr(f"{module}.{name}", triton_config(16, 4))
        for name in ("WIDTH", "SUM_ROWS", "SUM_COLUMNS"):
            monkeypatch.setattr(f"{module}.{name}", 32)
    return chosen


def triton_config(block: int, num_warps: int):
    from es2fast.ops.separation.triton import LaunchConfig

    return LaunchConfig(block, num_warps)


def few(backend: str, case: str, cases: tuple[str, ...] = ("hinge", "log")) -> None:
    """Closed forms know no backend, and the interpreter gets a selection."""
    if backend != "torch" and case not in PAIR_CASES:
        pytest.skip("no pairs: the same for every backend")
    if backend == "triton" and case not in cases:
        pytest.skip("the interpreter is slow")


def sized(backend: str, case: str, dtype: torch.dtype, **options) -> Problem:
    n, m, h = SIZES[backend]
    return make_problem(case, dtype, **(dict(n=n, m=m, h=h) | options))


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", (False, True), ids=("plain", "weights"))
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_losses(backend, case, dtype, weights):
    if backend == "triton" and (dtype == FP16 or not weights):
        pytest.skip("the interpreter is slow")
    few(backend, case, tuple(CASES))
    check(sized(backend, case, dtype, weights=weights, chunk_rows=4), backend)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("case", CASES)
def test_large_common_mean(backend, case, dtype):
    """The anisotropic case: ||mean|| = 1000 x spread. bf16 rounds the inputs, not the result."""
    bound = 1e-3 if dtype == BF16 else 2e-4  # float32 inputs carry no rounding the oracle lacks
    few(backend, case, ("hinge", "log", "cosine"))
    check(sized(backend, case, dtype, mean=1000.0), backend, bound)


@pytest.mark.parametrize("case", PAIR_CASES)
def test_sum_is_mean_times_total_weight(backend, case):
    few(backend, case)
    problem = sized(backend, case, FP32, weights=True)
    u, v = problem.options["harmful_weights"], problem.options["harmless_weights"]
    total = run(problem, backend, reduction="sum").loss
    assert relative(total, oracle(problem).loss * u.sum() * v.sum()) < 2e-5


@pytest.mark.parametrize("n,m", ((1, 1), (1, 20), (20, 1), (3, 2)))
@pytest.mark.parametrize("case", CASES)
def test_few_rows(backend, case, n, m):
    few(backend, case, ("hinge",))
    for dtype in (BF16, FP32):
        check(sized(backend, case, dtype, n=n, m=m), backend)


@pytest.mark.parametrize("case", CASES)
def test_no_rows(backend, case):
    few(backend, case)
    for n, m in ((0, 4), (4, 0), (0, 0)):
        got = run(make_problem(case, FP32, n=n, m=m), backend)
        assert got.loss == 0 and not got.da.any() and not got.db.any()


@pytest.mark.parametrize("case", CASES)
def test_duplicates_and_close_pairs(backend, case):
    """Equal rows, and rows far closer than their norms, where the Gram form has no digits."""
    few(backend, case, ("hinge", "log", "l2"))
    for dtype in (FP32, BF16):
        problem = sized(backend, case, dtype, n=14)
        a, b = problem.harmful, problem.harmless
        b[:5] = a[:5]
        b[5] = b[6] = a[0]
        for i, distance in enumerate((1e-1, 1e-2, 1e-3, 1e-4)):
            b[10 + i] = a[10 + i] + distance * torch.randn_like(a[0])
        got = check(problem, backend)
        assert got.da.isfinite().all() and got.db.isfinite().all()


@pytest.mark.parametrize("case", CASES)
def test_all_equal(backend, case):
    few(backend, case)
    problem = sized(backend, case, FP32, n=4, m=6)
    problem.harmful[:] = problem.harmless[:] = problem.harmful[0].clone()
    got, want = run(problem, backend), oracle(problem)
    assert got.da.isfinite().all() and got.db.isfinite().all()
    torch.testing.assert_close(got.loss.double(), want.loss, rtol=2e-5, atol=2e-5)
    if case not in ("cosine", "centroid", "centroid hinged"):  # whose means differ by rounding
        assert not got.da.any() and not got.db.any()


@pytest.mark.parametrize("case", CASES)
def test_rows_of_weight_zero_are_ignored(backend, case):
    few(backend, case)
    problem = sized(backend, case, FP32, weights=True)
    want = oracle(problem)
    problem.harmful[problem.options["harmful_weights"] == 0] = float("nan")
    problem.harmless[problem.options["harmless_weights"] == 0] = float("inf")
    got = run(problem, backend)
    for name in ("loss", "da", "db"):
        assert relative(getattr(got, name), getattr(want, name)) < 2e-5
    nothing = run(problem, backend, harmful_weights=torch.zeros_like(problem.harmful[:, 0]))
    assert nothing.loss == 0 and not nothing.da.any() and not nothing.db.any()


@pytest.mark.parametrize("margin", (0.2, -0.5))
def test_cosine_of_zero_rows_is_zero(backend, margin):
    problem = sized(backend, "cosine", FP32)
    problem.options["margin"] = margin
    problem.harmful[3] = 0
    got, want = run(problem, backend), oracle(problem)
    assert relative(got.loss, want.loss) < 2e-5
    assert not got.da[3].any() and relative(got.db, want.db) < 2e-5


def test_the_hinge_rests_beyond_the_margin(backend):
    problem = sized(backend, "hinge", BF16)
    problem.harmful += 100
    got = run(problem, backend)
    assert got.loss == 0 and not got.da.any() and not got.db.any()


# --- autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    problem = make_problem(case, FP64, n=5, m=7, h=6, weights=True, chunk_rows=2)
    rows = [t.requires_grad_() for t in (problem.harmful, problem.harmless)]
    assert torch.autograd.gradcheck(
        lambda a, b: pairwise_separation(a, b, backend="torch", **problem.options), rows
    )


@pytest.mark.parametrize("case", ("hinge", "cosine", "squared"))
def test_double_use_retain_graph_and_one_sided(backend, case):
    few(backend, case)
    problem = sized(backend, case, FP32)
    want = oracle(problem)
    a = problem.harmful.requires_grad_()
    loss = pairwise_separation(a, problem.harmless, backend=backend, **problem.options)
    (2 * loss + loss).backward(retain_graph=True)
    loss.backward()
    assert relative(a.grad, 4 * want.da) < 2e-5 and problem.harmless.grad is None
    with torch.no_grad():
        value = pairwise_separation(a, problem.harmless, backend=backend, **problem.options)
    assert not value.requires_grad and relative(value, want.loss) < 2e-5


@pytest.mark.parametrize("case", CASES)
def test_bitwise_repeatable(backend, case):
    few(backend, case, ("hinge",))
    problem = sized(backend, case, BF16, n=20, weights=True, chunk_rows=8)
    problem.harmless[:9] = problem.harmful[:9]
    first, second = run(problem, backend), run(problem, backend)
    for name in ("loss", "da", "db"):
        assert torch.equal(getattr(first, name), getattr(second, name))


def test_chunks_do_not_change_the_result(backend, monkeypatch):
    monkeypatch.setattr("es2fast.ops.separation.chunked.COLUMNS", 20)
    for case in ("hinge", "log"):
        check(sized(backend, case, FP32, weights=True, chunk_rows=7), backend)


@pytest.mark.parametrize("case", CASES)
def test_compiled_equals_eager(case):
    problem = make_problem(case, BF16, weights=True)
    eager = run(problem, "torch")
    torch._dynamo.reset()
    compiled = torch.compile(pairwise_separation, fullgraph=True, backend="aot_eager")
    rows = [t.clone().requires_grad_() for t in (problem.harmful, problem.harmless)]
    loss = compiled(*rows, backend="torch", **problem.options)
    loss.backward()
    assert torch.equal(loss, eager.loss)
    assert torch.equal(rows[0].grad, eager.da) and torch.equal(rows[1].grad, eager.db)


def test_opcheck():
    a, b = torch.randn(5, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    u, v = torch.full((5,), 0.2), torch.full((4,), 0.25)
    arguments = (a, b, u, v, "hinge", 4.0, 1.0, False, False, None, "torch", True, True)
    torch.library.opcheck(torch.ops.es2fast.separation.default, arguments)


def test_second_derivatives_are_refused(backend):
    problem = sized(backend, "l2", FP32)
    a = problem.harmful.requires_grad_()
    loss = pairwise_separation(a, problem.harmless, backend=backend, **problem.options)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, a, create_graph=True)


def test_non_contiguous_rows(backend):
    problem = sized(backend, "hinge", BF16)
    n, h = problem.harmful.shape
    wide = torch.randn(n, 2 * h).to(BF16)
    wide[:, ::2] = problem.harmful
    strided = Problem(wide[:, ::2], problem.harmless.t().contiguous().t(), problem.options)
    check(strided, backend)


def test_rows_far_apart(backend):
    """The last one begins 2**31 elements and more behind the first: as the last tokens of a large
    batch's states. What lies between is never touched, and so takes no memory."""
    width, apart = 16, 2**26
    flat = torch.empty(40 * apart, dtype=BF16)
    far = flat.as_strided((40, width), (apart, 1))
    far.copy_(torch.randn(40, width))
    near = torch.randn(5, width).to(BF16)
    for one, other in ((far, near), (near, far)):
        check(Problem(one, other, dict(loss="hinge", margin=9.0)), backend)


@pytest.mark.parametrize("lie", ("apart", "once"))
def test_weights_that_are_not_dense(backend, lie):
    problem = sized(backend, "l2", FP32)
    n = problem.harmful.shape[0]
    weights = torch.rand(2 * n)[::2] if lie == "apart" else torch.tensor(0.5).expand(n)
    assert not weights.is_contiguous()
    own = Problem(
        problem.harmful, problem.harmless, problem.options | dict(harmful_weights=weights)
    )
    got, mean = run(own, backend, reduction="sum"), oracle(own)
    pairs = weights.double().sum() * problem.harmless.shape[0]
    for made, one in ((got.loss, mean.loss), (got.da, mean.da), (got.db, mean.db)):
        assert relative(made, pairs * one) < 1e-5


# --- mistakes -------------------------------------------------------------------------------------

ROWS = torch.zeros(3, 8)


@pytest.mark.parametrize(
    "match,change",
    [
        ("loss='huber'", dict(loss="huber")),
        ("needs a margin", dict(loss="hinge")),
        ("needs a margin", dict(loss="softplus")),
        ("needs a margin, a cosine", dict(loss="cosine")),
        ("takes none", dict(loss="l2", margin=1.0)),
        ("margin=-1", dict(margin=-1.0)),
        ("scale=0", dict(margin=1.0, scale=0.0)),
        ("Whitening.fit", dict(loss="fisher")),
        ("reduction='none'", dict(margin=1.0, reduction="none")),
        ("reduction='sum'", dict(loss="centroid", reduction="sum")),
        ("chunk_rows=0", dict(margin=1.0, chunk_rows=0)),
        ("max_rows", dict(margin=1.0, max_rows=(1, 1))),
        ("harmful_weights has shape", dict(margin=1.0, harmful_weights=torch.ones(4))),
        ("backend='cuda'", dict(margin=1.0, backend="cuda")),
        ("harmless is 7|8 wide", dict(margin=1.0, harmless=torch.zeros(3, 7))),
        ("two dimensions", dict(margin=1.0, harmless=torch.zeros(8))),
        ("has dtype", dict(margin=1.0, harmless=torch.zeros(3, 8, dtype=torch.int64))),
        ("cast or move", dict(margin=1.0, harmless=torch.zeros(3, 8, dtype=BF16))),
    ],
)
def test_mistakes(match, change):
    with pytest.raises(ValueError, match=match):
        pairwise_separation(ROWS, **({"harmless": ROWS} | change))


# --- memory ---------------------------------------------------------------------------------------

PEAK = """
from pathlib import Path
import torch
from es2fast import pairwise_separation
def resident(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if key in x)
    return int(line.split()[1]) * 1024
def call(n):
    a, b = torch.randn(n, 16, requires_grad=True), torch.randn(n, 16, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    pairwise_separation(a, b, margin=6.0, backend="torch").backward()
    return resident("VmHWM") - before
call(64)
print(call(8192))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_memory_is_a_tile():
    """8192 x 8192 float32 distances are 268 MB; a tile and its temporaries are about 30 MB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80e6
