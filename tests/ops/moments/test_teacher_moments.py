"""The loss against teacher moments: accuracy towards the teacher, options, edges, autograd."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from es2fast import half_head, moment_kl_div, teacher_moments
from es2fast.ops.backends import choose_backend
from es2fast.ops.moments.chunked import head_input, split_gradient
from tests.ops.linear_kl.matrix import (
    BF16,
    FP16,
    FP32,
    at_divergence,
    make_problem,
    oracle,
    relative,
)
from tests.ops.moments.matrix import check, moments_of, options_without_softcap, run

SHAPE = dict(n=4, h=96, v=2003, chunk_tokens=3)
PEAKED, FLAT = 7.0, 0.5  # standard deviation of the logits


def _usable(name: str) -> str:
    try:
        return name if name == "rounded" else choose_backend(name, hidden=torch.empty(1, 1))
    except ValueError as error:
        pytest.skip(f"{error} (test_teacher_moments_triton.py covers it in the interpreter)")


@pytest.fixture(params=("torch", "native", "triton"))
def backend(request) -> str:
    return _usable(request.param)


@pytest.fixture(params=("torch", "rounded", "native", "triton"))
def rounding(request) -> str:
    """The backends, and a GPU's rounding on the CPU."""
    return _usable(request.param)


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", (1.0, 2.0))
@pytest.mark.parametrize("head", ("own", "half"))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("target", (0.4, 2e-2, 2e-3, 2e-4))
def test_peaked_teacher(rounding, target, dtype, head, temperature):
    if (head == "half") and dtype == FP32:
        pytest.skip("a float16 head goes with 16-bit states")
    spread = PEAKED * temperature
    problem, _ = at_divergence(target, dtype, spread=spread, temperature=temperature, **SHAPE)
    half = half_head(problem.weight).weight if head == "half" else None
    assert moments_of(problem).anchor_mass.mean() >= 0.95
    check(problem, rounding, 1e-2 if dtype == BF16 else 1e-3, head=half)


@pytest.mark.parametrize("head", ("own", "half"))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("target", (0.4, 2e-2, 2e-3))
def test_flat_teacher(rounding, target, dtype, head):
    if (head == "half") and dtype == FP32:
        pytest.skip("a float16 head goes with 16-bit states")
    problem, _ = at_divergence(target, dtype, spread=FLAT, **SHAPE)
    half = half_head(problem.weight).weight if head == "half" else None
    assert moments_of(problem).anchor_mass.max() <= 0.1
    check(problem, rounding, 1e-2 if dtype == BF16 else 1e-3, head=half)


@pytest.mark.parametrize("target", (2e-3, 2e-4))
def test_teacher_in_between_needs_a_half_head(rounding, target):
    """Neither flat nor peaked: the most noise per anchor, 1 to 4 % with a bfloat16 head."""
    problem, _ = at_divergence(target, BF16, spread=2.0, **SHAPE)
    check(problem, rounding, head=half_head(problem.weight).weight)


def test_half_head_is_what_a_flat_teacher_needs():
    """bfloat16 p_s leaves 8 times the noise of float16; without either, none."""
    problem, _ = at_divergence(2e-4, BF16, spread=FLAT, **SHAPE)
    expected = oracle(problem).dx
    half = half_head(problem.weight)
    assert half.exact or half.largest_change <= 2**-25
    bf16 = relative(run(problem, "rounded").dx, expected)
    fp16 = relative(run(problem, "rounded", head=half.weight).dx, expected)
    assert fp16 < 5e-3 < bf16 and bf16 > 4 * fp16, (bf16, fp16)


def test_anchors_are_what_a_peaked_teacher_needs():
    """The plain cache (no anchors) against 16, at KL 2e-4."""
    problem, _ = at_divergence(2e-4, BF16, spread=PEAKED, **SHAPE)
    expected = oracle(problem).dx
    plain = relative(run(problem, "rounded", top_k=0).dx, expected)
    anchored = relative(run(problem, "rounded", top_k=16).dx, expected)
    assert plain > 10 * anchored and anchored <= 1e-2, (plain, anchored)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("name", options_without_softcap(FP32))
def test_options(backend, name, dtype):
    """bfloat16 states with a float16 head: some options make a flat teacher close by."""
    problem = options_without_softcap(dtype)[name]
    check(problem, backend, head=problem.weight.half() if dtype == BF16 else None)


def test_forbidden_columns(backend):
    """A bias of -inf over the whole first tile leaves the student's row finite."""
    problem = make_problem(FP32, v=1300, h=16, n=3, bias=torch.zeros(1300))
    moments = moments_of(problem)
    problem.options["bias"][:600] = -200.0
    expected = run(problem, backend, moments=moments, top_k=0)
    problem.options["bias"][:600] = -torch.inf
    got = run(problem, backend, moments=moments, top_k=0)
    assert got.dx.isfinite().all() and relative(got.dx, expected.dx) <= 1e-5


@pytest.mark.parametrize("top_k", (0, 1, 5, 127))
def test_number_of_anchors(backend, top_k):
    check(make_problem(FP32), backend, 1e-3, top_k=top_k)


def test_float16(backend):
    for spread in (FLAT, PEAKED):
        problem, _ = at_divergence(2e-3, FP16, spread=spread, **SHAPE)
        check(problem, backend)


@pytest.mark.parametrize("v", (32000, 128256 + 3))
def test_large_vocabulary(backend, v):
    check(make_problem(BF16, n=1 if backend == "triton" else 3, h=33, v=v), backend)


def test_logits_up_to_80_and_a_common_offset(backend):
    """The value stays within 1e-5 however large what is common to all logits."""
    problem = make_problem(FP32, spread=25.0, distance=0.05, v=1000)
    problem.weight *= 80 / (problem.hidden @ problem.weight.t()).abs().max()
    check(problem, backend)
    flat = make_problem(FP32, spread=FLAT, v=1000, bias=torch.full((1000,), 64.0))
    check(flat, backend)


def test_far_apart(backend):
    problem = make_problem(FP32, spread=8.0, distance=3.0, v=300)
    check(problem, backend)


def test_scaled_states_beside_a_half_head():
    """Rows far beyond float16's range are scaled by powers of two, without a rounding."""
    x = (torch.randn(6, 50) * torch.tensor([[1e-30], [1e-6], [1.0], [1e5], [1e20], [0.0]])).to(BF16)
    scaled, unit = head_input(x, torch.empty(3, 50, dtype=FP16))
    assert scaled.dtype == FP16 and scaled.isfinite().all()
    back = scaled.double() * unit.double()[:, None]
    small = x.abs() < x.abs().amax(1, keepdim=True) * 2.0**-31
    assert torch.equal(back[~small], x.double()[~small])
    assert scaled[:5].abs().amax(1).min() >= 2**14


@pytest.mark.parametrize("dtype", (BF16, FP16), ids=str)
def test_split_gradient_keeps_sixteen_bits(dtype):
    p = torch.softmax(3 * torch.randn(4, 500), -1)
    w = torch.randn(500, 32).to(dtype)
    exact = p.double() @ w.double()
    assert relative(split_gradient(p, w), exact) <= 2.0**-15


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("n", (0, 1))
def test_no_and_one_token(backend, n, reduction):
    problem = make_problem(n=n, reduction=reduction)
    if n:
        check(problem, backend)
        return
    got = run(problem, backend)
    assert got.loss.shape == ((0,) if reduction == "none" else ())
    assert got.loss.sum().item() == 0.0 and got.dx.shape == (0, 65)


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("hint", (None, 2))
def test_all_tokens_masked(backend, reduction, hint):
    mask = torch.zeros(5, dtype=torch.bool)
    got = run(make_problem(token_weights=mask, max_valid_tokens=hint, reduction=reduction), backend)
    assert got.loss.abs().sum().item() == 0.0 and got.dx.abs().max().item() == 0.0


def test_masked_tokens_and_padding_are_not_computed(backend):
    problem = make_problem(token_weights=torch.tensor([1, 0, 1, 1, 0]), vocab_size=100)
    moments = moments_of(problem)
    clean = run(problem, backend, moments=moments)
    problem.hidden[1] = float("nan")
    problem.weight[100:] = float("nan")
    moments.tail_moment[4] = float("inf")
    poisoned = run(problem, backend, moments=moments)
    assert torch.equal(clean.loss, poisoned.loss) and torch.equal(clean.dx, poisoned.dx)


def test_default_backend_on_a_cpu_has_a_row_pass():
    assert choose_backend(None, hidden=torch.empty(1, 1)) in ("torch", "native")


def test_chunks_do_not_matter(backend):
    problem = make_problem(FP32, n=7)
    whole, parts = (run(problem, backend, chunk_tokens=c) for c in (7, 2))
    assert relative(whole.dx, parts.dx) <= 1e-5


# --- autograd and torch.compile -------------------------------------------------------------------


def test_gradcheck():
    problem = make_problem(torch.float64, n=3, h=4, v=11, distance=0.5)
    weights = torch.tensor([1.0, 0.0, 0.5])
    x, bias = problem.hidden.requires_grad_(), torch.randn(11, dtype=torch.float64)
    options = dict(temperature=1.5, logit_scale=0.7, vocab_size=10, top_k=3)
    moments = teacher_moments(problem.teacher_hidden, problem.weight, bias=bias, **options)
    for reduction in ("mean", "none"):

        def f(x, reduction=reduction):
            return moment_kl_div(
                x, problem.weight, moments, bias=bias, token_weights=weights, reduction=reduction
            )

        assert torch.autograd.gradcheck(f, (x,))


def test_bitwise_repeatable_and_double_use(backend):
    problem = make_problem(BF16, v=1000, chunk_tokens=2)
    moments = moments_of(problem)
    first, second = (run(problem, backend, moments=moments) for _ in range(2))
    assert torch.equal(first.loss, second.loss) and torch.equal(first.dx, second.dx)
    x = problem.hidden.float().requires_grad_()
    loss = moment_kl_div(x, problem.weight.float(), moments, backend=backend)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (both,) = torch.autograd.grad(2 * loss + 2 * loss, x, retain_graph=True)
    torch.testing.assert_close(both, 4 * once, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_nothing_saved_aliases_the_head(backend):
    """ZeRO-3 partitions a gathered weight again after forward."""
    problem = make_problem()
    moments = moments_of(problem)
    expected = run(problem, backend, moments=moments)
    x, saved = problem.hidden.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss = moment_kl_div(x, problem.weight, moments, backend=backend)
    assert problem.weight.data_ptr() not in {t.data_ptr() for t in saved}
    problem.weight.fill_(float("nan"))
    (8.0 * loss).backward()
    assert torch.equal(x.grad, expected.dx)


_needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=_needs_compiler)))
def test_compiled_equals_eager(backend, compiler):
    problem = make_problem(BF16)
    moments, weights = moments_of(problem), torch.tensor([1.0, 0, 2, 1, 1])

    def step(x, moments):
        return 2.0 * moment_kl_div(
            x * 1.0, problem.weight, moments, token_weights=weights, backend=backend
        )

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        x = problem.hidden.clone().requires_grad_()
        loss = f(x, moments)
        loss.backward()
        results.append((loss.detach(), x.grad))
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_rounds_nothing(backend):
    """The inputs' dtype decides: a float32 head stays float32 under autocast."""
    problem = make_problem(FP32)
    expected = run(problem, backend)
    with torch.autocast("cpu", dtype=BF16):
        got = run(problem, backend)
    assert torch.equal(got.loss, expected.loss) and torch.equal(got.dx, expected.dx)


def test_custom_op_contract():
    problem = make_problem(n=3, h=8, v=20)
    m = moments_of(problem)
    arguments = (
        problem.hidden.clone().requires_grad_(), problem.weight, None, m.tail_moment, m.top_ids,
        m.top_probs, m.tail_sums, None, None, 1.0, 20, "mean", None, "torch", True,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.es2fast.moment_kl.default, arguments, test_utils=tests)


# --- memory ---------------------------------------------------------------------------------------

_MEMORY = """
import torch
from es2fast import moment_kl_div, teacher_moments
V, H, C = 16000, 16, 32
w = torch.randn(V, H)
def peak(n):
    x, t = torch.randn(n, H, requires_grad=True), torch.randn(n, H)
    moments = teacher_moments(t, w, chunk_tokens=C)
    moment_kl_div(x, w, moments, chunk_tokens=C).backward()
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
peak(256)  # warm
small = peak(256)
print(peak(1024) - small, 768 * V * 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_does_not_grow_with_tokens_times_vocabulary():
    # every tensor a mapping of its own: what malloc keeps of freed ones would count as ours
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _MEMORY]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    growth, logits = map(int, done.stdout.split())
    assert growth < 0.1 * logits, f"peak grew by {growth} bytes from N=256 to 1024"
