"""What the linear KL decides by a rule: where G waits, how exact it is, whether logits are stored.

For each backend this process has; test_linear_kl_triton.py runs it in the interpreter too.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from es2fast import linear_kl_div
from es2fast.ops import native, tokens
from es2fast.ops.backends import choose_backend
from es2fast.ops.gemms import TORCH_GEMMS
from es2fast.ops.linear_kl import op
from es2fast.ops.linear_kl.chunked import (
    FEW_TOKENS,
    KLProblem,
    RowBackend,
    RowGradient,
    buffered_rows,
    deciding_first,
    few_decide,
    run_chunked,
    run_torch,
)
from es2fast.ops.linear_kl.rows import KLSpec
from tests.ops.linear_kl.matrix import (
    BF16,
    FP16,
    FP32,
    check,
    gradient_bound,
    make_problem,
    oracle,
    relative,
    run,
)


@pytest.fixture(params=("torch", "native", "triton"))
def backend(request) -> str:
    try:
        return choose_backend(request.param, hidden=torch.empty(1, 1))
    except ValueError as error:
        pytest.skip(str(error))


# --- where G waits for dW -------------------------------------------------------------------------


def plan(rows: int, **change) -> KLProblem:
    x, w = torch.empty(rows, 64, device="meta"), torch.empty(1000, 64, device="meta")
    problem = KLProblem(
        x, w, None, x, None, None, None, torch.empty(rows), KLSpec(), 16, False, True, True, False
    )
    return dataclasses.replace(problem, **change)


def test_the_buffer_stays_within_its_budget():
    """V = 1000, H = 64: the default is what a float32 dW takes, 128 rows of a 16-bit G."""
    assert buffered_rows(plan(128), BF16, 16) == 128
    assert buffered_rows(plan(129), BF16, 16) == 64  # half, beside the float32 dW
    assert buffered_rows(plan(129), FP32, 16) == 32 and buffered_rows(plan(129), FP32, 20) == 0
    assert buffered_rows(plan(64), FP32, 16) == 64
    for budget in (0, 31 * 2000, 32 * 2000, 77 * 2000, 10**9):
        rows = buffered_rows(plan(100, buffer_bytes=budget), BF16, 16)
        assert rows == (0 if budget < 32 * 2000 else min(100, budget // 2000 // 16 * 16 or 100))
        assert rows * 2000 <= max(budget, 0)
    assert buffered_rows(plan(100, need_dw=False), BF16, 16) == 0
    assert buffered_rows(plan(100, exact=True), BF16, 16) == 0  # two parts would need two buffers


@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize("direction", ("forward", "reverse"))
def test_one_gemm_for_dw_or_several(backend, dtype, direction):
    """No buffer, one that is filled three times, one for all rows: each within the bounds."""
    weights = torch.tensor([1.0, 0, 2, 1, 1, 3, 1, 0.5, 2])
    item = 4 if dtype == FP32 or backend == "torch" else 2
    for budget in (0, 4 * 127 * item, None):
        problem = make_problem(
            dtype, n=9, separate=True, token_weights=weights, chunk_tokens=2, direction=direction,
            exact=False, grad_buffer_bytes=budget,
        )  # fmt: skip
        check(problem, backend)


# --- exactness ------------------------------------------------------------------------------------


def test_who_decides():
    """(sum w^2)^2 / sum w^4, the number of tokens that make a gradient's norm."""
    assert not few_decide(torch.ones(FEW_TOKENS)) and few_decide(torch.ones(FEW_TOKENS - 1))
    assert not few_decide(torch.zeros(5)) and not few_decide(torch.ones(500, dtype=torch.bool))
    one = torch.full((10_000,), 1e-5)
    one[7] = 1.0
    assert few_decide(one)
    one[one < 1] = 3e-3  # they sum to 30, but one token still has 92 % of the squared norm
    assert few_decide(one)
    one[one < 1] = 0.2
    assert not few_decide(one)
    assert few_decide(-torch.ones(3)) and not few_decide(torch.ones(0))


def test_where_the_rule_looks():
    assert op.decided_by_few(torch.ones(63), None, None)
    assert not op.decided_by_few(torch.ones(64), None, None)
    weights = torch.full((1000,), 1e-5)
    weights[0] = 1.0
    assert op.decided_by_few(weights, weights, None) and op.decided_by_few(weights, weights, 1000)


def test_the_deciding_tokens_come_first():
    weights = torch.ones(420)
    weights[100:124] = 8.0  # 79 % of the squared norm, 26 tokens' worth
    order, count = deciding_first(weights)
    assert few_decide(weights) and set(order[:count].tolist()) <= set(range(100, 124))
    assert sorted(order.tolist()) == list(range(420))
    left = weights[order[count:]].square().sum() / weights.square().sum()
    assert left <= 0.5 < left + 64 / weights.square().sum()  # one fewer would be more than half
    order, count = deciding_first(-torch.ones(41))
    assert count == 21 and order.tolist() == list(range(41))
    one = torch.full((10_000,), 1e-5)
    one[7] = 1.0
    order, count = deciding_first(one)
    assert order[0] == 7 and count == 1
    assert deciding_first(torch.ones(FEW_TOKENS))[1] == 0
    weights[:] = 1.0
    weights[5] = 3.0  # 2 % of the norm, and yet 62 tokens' worth without 66
    rest = deciding_first(weights[:80])[1]
    assert rest == 1 and few_decide(weights[:80])


@pytest.mark.parametrize("bound", [None, 500])
def test_a_bound_on_their_number_leaves_the_deciding_rows_to_be_found(monkeypatch, bound):
    """The weights are on the CPU, so that looking at them waits for nothing."""
    seen = []
    monkeypatch.setitem(op.RUN, "torch", lambda p: seen.append(p) or run_torch(p))
    weights = torch.full((500,), 0.1)
    weights[40:60] = 10.0
    x, w = torch.randn(500, 8, requires_grad=True), torch.randn(40, 8)
    loss = linear_kl_div(
        x, w, torch.randn(500, 8), token_weights=weights, max_valid_tokens=bound, backend="torch"
    )
    loss.backward()
    assert seen[0].exact and 10 <= seen[0].exact_rows <= 20
    assert set(seen[0].index[: seen[0].exact_rows].tolist()) <= set(range(40, 60))
    assert sorted(seen[0].index.tolist()) == list(range(500))


def test_a_heads_gradient_that_is_made_in_backward_is_not_made_before(monkeypatch):
    seen = []
    monkeypatch.setitem(op.RUN, "torch", lambda p: seen.append(p) or run_torch(p))
    x, w = torch.randn(9, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    loss = linear_kl_div(x, w, torch.randn(9, 8), reduction="none", backend="torch")
    assert [(p.need_dx, p.need_dw) for p in seen] == [(False, False)]
    loss.sum().backward()
    assert [(p.need_dx, p.need_dw) for p in seen[1:]] == [(True, True)]


def test_the_second_gemm_has_the_deciding_rows_only():
    """Chunks of 8 rows, 11 of 20 exact: 8 and 3 rows, and no second part in the last chunk."""
    rows = []

    def input_gradient(g: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows.append(len(g))
        return g.to(dtype) @ weight.to(dtype)

    def two_parts(zt, zs, scale, place, p):
        g = torch.ones_like(zs)
        return zs[:, 0], RowGradient(g, 2 * g if p.exact else None)

    x, w = torch.randn(20, 4), torch.randn(6, 4)
    problem = KLProblem(
        x, w, None, x, None, None, None, torch.ones(20), KLSpec(), 8, False, True, False, True
    )
    gemms = dataclasses.replace(TORCH_GEMMS, input_gradient=input_gradient)
    backend = RowBackend(two_parts, lambda p: BF16, gemms)
    for count, wanted in ((11, [8, 8, 8, 3, 4]), (None, [8, 8, 8, 8, 4, 4]), (0, [8, 8, 4])):
        rows.clear()
        result = run_chunked(dataclasses.replace(problem, exact=True, exact_rows=count), backend)
        exact = 20 if count is None else count
        parts = torch.tensor([3.0] * exact + [1.0] * (20 - exact))
        assert rows == wanted and result.dx is not None and result.db is not None
        torch.testing.assert_close(result.dx, parts[:, None] * w.sum(0))
        torch.testing.assert_close(result.db, parts.sum().expand(6))


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_a_common_prefix_decides(backend, reduction):
    """What a packed micro-batch has: 6 tokens of weight 8 and 60 of weight 1, some of weight 0."""
    worst = 0.0
    weights = torch.cat([torch.ones(20), torch.zeros(4), torch.full((6,), 8.0), torch.ones(40)])
    for seed in range(4 if backend == "native" else 1):
        problem = make_problem(
            BF16, n=70, h=64, v=1000, spread=6.0, distance=0.05, separate=True, seed=seed,
            token_weights=weights, chunk_tokens=32, reduction=reduction,
        )  # fmt: skip
        got, expected = run(problem, backend, "x"), oracle(problem)
        torch.testing.assert_close(got.loss.double(), expected.loss, rtol=0.02, atol=1e-6)
        worst = max(worst, relative(got.dx, expected.dx))
    assert worst <= gradient_bound(BF16, 1.0) / 1.25


@pytest.mark.parametrize("direction", ("forward", "reverse", "jsd"))
def test_one_token_of_many_decides(backend, direction):
    """Weights 1 and 1e-5 in bfloat16: 0.44 % with a G of one part, at some of these seeds."""
    n, worst = 8 if backend == "triton" else 66, 0.0
    weights = torch.full((n,), 1e-5)
    weights[3] = 1.0
    for seed in range(12 if backend == "native" else 2):
        problem = make_problem(
            BF16, n=n, h=64, v=1000, spread=6.0, distance=0.05, separate=True, seed=seed,
            token_weights=weights, direction=direction, chunk_tokens=32,
        )  # fmt: skip
        got, expected = run(problem, backend, "xw"), oracle(problem)
        worst = max(worst, relative(got.dx, expected.dx), relative(got.dw, expected.dw))
    assert worst <= gradient_bound(BF16, 1.0) / 1.25


def test_two_parts_err_less_than_one(backend):
    """Before dX is rounded to bfloat16 only a float32 sum's error is left."""
    if backend == "torch" or (backend == "native" and not native.HAS_GEMM_BF16):
        pytest.skip("its G is float32 here")
    problem = make_problem(BF16, n=3, h=64, v=1000, spread=6.0, separate=True, reduction="sum")
    expected = oracle(problem).dx
    errors = {e: relative(run(problem, backend, "x", exact=e).dx, expected) for e in (False, True)}
    rounding = relative(expected.to(BF16), expected)
    assert errors[True] < 1.1 * rounding < errors[False]


# --- no gradients ---------------------------------------------------------------------------------


def test_logits_are_stored_unless_memory_is_short(monkeypatch):
    triton = pytest.importorskip("es2fast.ops.linear_kl.triton", reason="needs triton")
    seen: list[bool] = []

    def fake(p: KLProblem):
        seen.append(triton._fused_reason(p) is None)
        return op.RUN["torch"](p)

    monkeypatch.setattr(triton, "run_triton", fake)
    monkeypatch.setattr(op.backends, "choose_backend", lambda *_, **__: "triton")
    problem = make_problem(BF16, n=32, h=64, v=512)
    logits = 8 * 32 * 512
    cases = (
        (2 * logits, {}, False),
        (2 * logits - 1, {}, True),
        (2 * logits - 1, dict(chunk_tokens=16), False),  # the caller knows what he wants
        (0, dict(low_memory=False), False),
        (10**12, dict(low_memory=True, chunk_tokens=16), True),
        (None, {}, False),
    )
    for free, options, fused in cases:
        monkeypatch.setattr(tokens, "free_bytes", lambda device, free=free: free)
        with torch.no_grad():
            run(problem, None, "", **options)
        assert seen.pop() is fused, (free, options)
    monkeypatch.setattr(tokens, "free_bytes", lambda device: 0)
    run(problem, None, "x", low_memory=True)
    assert seen.pop() is False  # gradients need the logits


# --- sizes ----------------------------------------------------------------------------------------

FAR = 2**30 + 128  # elements from one row to the next: the third is beyond 2^31


def far_rows(values: torch.Tensor) -> torch.Tensor:
    """``values`` with rows FAR apart; memory that is never touched is never taken."""
    rows, columns = values.shape
    try:
        base = torch.empty(rows * FAR, dtype=values.dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    far = base.as_strided((rows, columns), (FAR, 1))
    far.copy_(values)
    return far


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_heads_beyond_2_31_elements(backend, dtype):
    """Heads, hidden states and their gradients' reads, all with offsets beyond 32 bits."""
    problem = make_problem(dtype, n=3, h=32, v=3, separate=True)
    expected = run(problem, backend, "xw")
    for name in ("weight", "teacher_weight", "hidden", "teacher_hidden"):
        setattr(problem, name, far_rows(getattr(problem, name)))
    x, w = (t.detach().requires_grad_() for t in (problem.hidden, problem.weight))
    loss = op.linear_kl_div(x, w, problem.teacher_hidden, problem.teacher_weight, backend=backend)
    dx, dw = torch.autograd.grad(8.0 * loss, (x, w))
    assert torch.equal(loss, expected.loss)
    assert torch.equal(dx, expected.dx) and torch.equal(dw, expected.dw)
    with torch.no_grad():
        fused = run(problem, backend, "", low_memory=True).loss
        assert relative(fused, expected.loss) <= 1e-3


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_logits_beyond_2_31_elements(backend, dtype):
    """A row pass over rows of logits FAR apart, in place and to a place of its own."""
    v, n = 200, 3
    z_t, z_s = torch.randn(n, v), torch.randn(n, v)
    x, w = torch.empty(n, 16, dtype=dtype), torch.empty(v, 16, dtype=dtype)
    problem = KLProblem(
        x, w, None, x, w, None, None, torch.ones(n), KLSpec(), n, False, True, False, False
    )
    row_pass = op_row_pass(backend)
    results = []
    for make in (torch.clone, far_rows):
        for own in (False, True):
            rows, gradient = row_pass(make(z_t), make(z_s), problem.scale, None, problem)
            if own:
                place = make(torch.zeros(n, v, dtype=gradient.g.dtype))
                zs = make(z_s)
                if gradient.g.dtype == FP32:  # one place for both
                    place.copy_(zs)
                    zs = place
                rows, gradient = row_pass(make(z_t), zs, problem.scale, place, problem)
                assert gradient.g.data_ptr() == place.data_ptr()
            results.append((rows, gradient.g.clone()))
    for rows, g in results[1:]:
        assert torch.equal(rows, results[0][0]) and torch.equal(g, results[0][1])


def op_row_pass(backend: str):
    if backend == "triton":
        from es2fast.ops.linear_kl.triton import row_pass

        return row_pass
    if backend == "native":
        from es2fast.ops.linear_kl.native import kl_row_pass

        return kl_row_pass
    from es2fast.ops.linear_kl.chunked import torch_row_pass

    return torch_row_pass


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_vocabulary_of_2_18_with_softcap(backend, dtype):
    """Gemma 2 and 3: 262144 columns; the soft-cap is Gemma 2's."""
    if backend == "triton":
        pytest.skip("minutes in the interpreter; V is one of its numbers, 128259 is tested")
    problem = make_problem(dtype, n=1, h=32, v=2**18, softcap=30.0, distance=0.05)
    check(problem, backend, "x")
