"""The linear KL against its float64 oracle: accuracy, options, edges, autograd, compile, memory.

Every test runs for each backend this process has: ``torch``, and ``triton`` when the interpreter is
on (test_linear_kl_triton.py starts a process with it).
"""

from __future__ import annotations

import itertools
import os
import shutil

import pytest
import torch

from es2fast import linear_kl_div
from es2fast.ops.backends import choose_backend
from tests.ops.linear_kl.matrix import (
    BF16,
    DIRECTIONS,
    FP16,
    FP32,
    Problem,
    at_divergence,
    check,
    make_problem,
    option_problems,
    oracle,
    relative,
    run,
)

SWEEP = (0.4, 2e-2, 2e-3, 1e-4, 1e-6)
# What the interpreter, which is slow, sees of it: targets and temperatures by the logits' spread.
FEW = {
    0.5: ((0.4, 1.0), (0.4, 2.0), (1e-6, 1.0)),
    6.0: (*((target, 1.0) for target in SWEEP), (1e-6, 2.0)),
}


def _skip_unless_usable(name: str) -> str:
    try:
        return choose_backend(name, hidden=torch.empty(1, 1))
    except ValueError as error:
        pytest.skip(f"{error} (test_linear_kl_triton.py covers it in the interpreter)")


@pytest.fixture(params=("torch", "native", "triton"))
def backend(request) -> str:
    return _skip_unless_usable(request.param)


# --- accuracy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", (0.5, 6.0), ids=("flat", "peaked"))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_sweep_towards_the_teacher(backend, dtype, direction, spread):
    cases = FEW[spread] if backend == "triton" else itertools.product(SWEEP, (1.0, 2.0))
    for target, temperature in cases:
        problem, _ = at_divergence(
            target,
            dtype,
            n=3 if backend == "triton" else 5,
            v=400 if backend == "triton" else 1000,
            spread=spread,
            direction=direction,
            temperature=temperature,
            chunk_tokens=2,
        )
        check(problem, backend)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sweep_with_two_heads(backend, dtype, direction):
    for target in SWEEP:
        problem, _ = at_divergence(
            target, dtype, separate=True, direction=direction, chunk_tokens=3
        )
        check(problem, backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float16(backend, direction):
    """No bound is promised; held to bfloat16's. The loss is scaled, as float16 training does."""
    for target in (0.4, 1e-2, 1e-4):
        problem, _ = at_divergence(target, FP16, separate=True, direction=direction)
        check(problem, backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", option_problems(FP32))
def test_options(backend, name, direction):
    problem = option_problems(FP32)[name]
    problem.options["direction"] = direction
    check(problem, backend)


@pytest.mark.parametrize("name", option_problems(BF16))
def test_options_in_bfloat16(backend, name):
    check(option_problems(BF16)[name], backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("shared", (True, False), ids=("shared head", "two heads"))
def test_every_input_strided(backend, dtype, direction, shared):
    """Rows, columns and vectors that lie apart in memory, in the teacher and the biases too."""
    gen = torch.Generator().manual_seed(5)

    def sparse(*shape: int, factor: float = 1.0) -> torch.Tensor:
        return (factor * torch.randn(*shape, generator=gen)).to(dtype)[..., ::2]

    head, other = sparse(127, 130, factor=0.25), sparse(127, 66, factor=0.25)
    options = dict(bias=sparse(254), token_weights=torch.tensor([1.0, 9, 0, 9, 2, 9, 1, 9])[::2])
    if shared:
        problem = Problem(sparse(4, 130), head, sparse(65, 8).t(), None, options)
    else:
        options |= dict(teacher_bias=sparse(254))
        problem = Problem(sparse(65, 8).t(), head, sparse(4, 66), other, options)
    tensors = (problem.hidden, head, problem.teacher_hidden, other, *options.values())
    assert not any(t.is_contiguous() for t in tensors)
    problem.options |= dict(direction=direction, chunk_tokens=2)
    check(problem, backend)


@pytest.mark.parametrize("lie", ("apart", "once"))
def test_weights_that_are_not_dense_and_not_packed(backend, lie):
    """`max_valid_tokens` that leaves all rows in place leaves the caller's weights in place too."""
    gen = torch.Generator().manual_seed(6)
    head, tokens, teacher = (
        torch.randn(*shape, generator=gen) for shape in ((90, 16), (6, 16), (6, 16))
    )
    dense = torch.tensor([1.0, 9, 0, 9, 2, 9, 1, 9, 3, 9, 1, 9])
    weights = dense[::2] if lie == "apart" else torch.tensor(2.0).expand(6)
    assert not weights.is_contiguous()
    options = dict(token_weights=weights, max_valid_tokens=6, reduction="sum")
    check(Problem(tokens, head, teacher, None, options), backend)


@pytest.mark.parametrize("softcap", (1.5, 30.0, 3000.0), ids=("saturated", "gemma", "wide"))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sweep_with_softcap(backend, direction, softcap):
    """Most of a vocabulary near the cap, none of it, and a cap of another kernel."""
    for target in (0.05, 1e-6):
        problem, _ = at_divergence(
            target, BF16, n=2, v=400, spread=3.0, direction=direction, softcap=softcap
        )
        check(problem, backend, "x")


@pytest.mark.parametrize("logits", (0.0, 60.0, 1e3, 1e5))
def test_softcap_of_any_logit(backend, logits):
    """Powers of e of any size, on either side, at both ends."""
    problem = make_problem(BF16, softcap=2.0, separate=True)
    problem.weight[:8] *= logits
    problem.teacher_weight[4:16] *= -logits
    check(problem, backend, "x")


@pytest.mark.parametrize("beta", (0.05, 0.9))
def test_jsd_beta(backend, beta):
    check(make_problem(direction="jsd", beta=beta), backend)


@pytest.mark.parametrize("v", (127, 8192 + 3, 32000, 128256 + 3))
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_sweep_over_vocabularies(backend, dtype, v):
    """The ends and the knee of the sweep at every vocabulary (1000 is the sweep's own)."""
    slow = backend == "triton"
    cases = itertools.product(DIRECTIONS, (0.4, 2e-3, 1e-6), (1.0, 2.0))
    if slow and v > 10000 and "ES2FAST_LONG" not in os.environ:
        pytest.skip("a minute in the interpreter; ES2FAST_LONG=1 runs it")
    if slow and v > 1000:
        cases = [("forward", 1e-6, 2.0), ("jsd", 2e-3, 1.0)][: 2 if v < 10000 else 1]
    for direction, target, temperature in cases:
        problem, _ = at_divergence(
            target,
            dtype,
            n=1 if slow else 3,
            h=33,
            v=v,
            direction=direction,
            temperature=temperature,
        )
        check(problem, backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("shared", (True, False), ids=("shared head", "two heads"))
def test_logits_up_to_80(backend, dtype, direction, shared):
    for distance in (0.05, 1e-3):
        problem = make_problem(
            FP32, spread=25.0, distance=distance, v=1000, direction=direction, separate=not shared
        )
        factor = 80 / (problem.hidden @ problem.weight.t()).abs().max()
        problem.weight *= factor
        if problem.teacher_weight is not None:
            problem.teacher_weight *= factor
        problem = problem.cast(dtype)
        largest = (problem.hidden.double() @ problem.weight.double().t()).abs().max()
        assert 79 < largest < 81
        check(problem, backend)


def test_autocast_does_not_round_float32(backend):
    """GEMMs inside the op follow the inputs' dtype, not the region they are called from."""
    with torch.autocast("cpu", torch.bfloat16):
        check(make_problem(), backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_far_apart(backend, direction):
    """Ratios p_s/p_t beyond float32's range: finite, and the value is right."""
    problem = make_problem(spread=8.0, distance=3.0, v=300, direction=direction)
    got, expected = run(problem, backend), oracle(problem)
    assert relative(got.loss, expected.loss) <= 1e-5
    assert torch.isfinite(got.dx).all() and torch.isfinite(got.dw).all()


def test_far_apart_on_a_few_tokens(backend):
    """Close but for one unlikely token, whose e^u overflows: S cannot be used, the value stands."""
    problem = make_problem(v=200, distance=0.0, bias=torch.zeros(200))
    teacher_bias = torch.zeros(200)
    teacher_bias[17] = -130.0
    problem.teacher_weight = problem.weight.clone()
    problem.options |= dict(teacher_bias=teacher_bias)
    check(problem, backend)


@pytest.mark.parametrize("gap", (100.0, 800.0))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_all_mass_elsewhere(backend, direction, gap):
    """Each side has its mass where the other's is e^-gap, 0 in double at 800, in another block."""
    logits = torch.zeros(2, 1024)
    logits[0, 512:] = logits[1, :512] = -gap
    weight = logits.t().contiguous().requires_grad_()
    student = torch.tensor([[0.0, 1.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0]])
    loss = linear_kl_div(student, weight, teacher, direction=direction, backend=backend)
    loss.backward()
    wide = logits.double().requires_grad_()
    log_p, log_q = (row.log_softmax(-1) for row in wide)
    half = (log_p.exp() / 2 + log_q.exp() / 2).log()
    wanted = {
        "forward": (log_p.exp() * (log_p - log_q)).sum(),
        "reverse": (log_q.exp() * (log_q - log_p)).sum(),
        "jsd": (log_p.exp() * (log_p - half) + log_q.exp() * (log_q - half)).sum() / 2,
    }[direction]
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    (by_logits,) = torch.autograd.grad(wanted, wide)
    found = weight.grad[:, 1].double()  # the student's state is 1 there
    torch.testing.assert_close(found, by_logits[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(student.grad[0, 1].double(), by_logits[1] @ logits[1].double(),
                               rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("softcap", (None, 5.0))
def test_equal_inputs_give_exactly_zero(backend, dtype, direction, softcap):
    for separate, scale in itertools.product((False, True), (1.0, 0.3)):
        bias = torch.linspace(-3, 3, 127).to(dtype)
        problem = make_problem(
            dtype, distance=0.0, direction=direction, softcap=softcap, bias=bias, logit_scale=scale,
            temperature=1.7,
        )  # fmt: skip
        if separate:
            problem.teacher_weight = problem.weight.clone()
            problem.options["teacher_bias"] = bias.clone()
        got = run(problem, backend)
        assert got.loss.item() == 0.0
        assert not any(g.count_nonzero() for g in (got.dx, got.dw, got.db))
        for extra in ({"chunk_tokens": 2}, {"low_memory": True}):
            assert run(problem, backend, "", **extra).loss.item() == 0.0


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
    assert got.loss.sum().item() == 0.0
    assert got.dx.shape == (0, 65) and got.dw.abs().max().item() == 0.0


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("hint", (None, 2))
def test_all_tokens_masked(backend, reduction, hint):
    for dtype in (FP32, BF16):
        problem = make_problem(
            dtype,
            token_weights=torch.zeros(5, dtype=torch.bool),
            max_valid_tokens=hint,
            reduction=reduction,
            bias=torch.ones(127, dtype=dtype),
        )
        got = run(problem, backend)
        assert got.loss.abs().sum().item() == 0.0
        for gradient, like in ((got.dx, problem.hidden), (got.dw, problem.weight)):
            assert gradient.shape == like.shape and gradient.count_nonzero() == 0
        assert got.db.count_nonzero() == 0
        assert run(problem, backend, "").loss.abs().sum().item() == 0.0


def test_masked_tokens_are_not_computed(backend):
    """A masked token may hold anything: its states are never multiplied."""
    problem = make_problem(token_weights=torch.tensor([1, 0, 1, 1, 0]))
    clean = run(problem, backend)
    problem.hidden[1] = float("nan")
    problem.teacher_hidden[4] = float("inf")
    poisoned = run(problem, backend)
    assert torch.equal(clean.loss, poisoned.loss) and torch.equal(clean.dx, poisoned.dx)


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_states_that_are_no_numbers_are_loud(backend, dtype, direction):
    """A diverged student's loss is no number either: the training stops by it."""
    for value in (float("nan"), float("inf")):
        problem = make_problem(dtype, n=3, direction=direction)
        problem.hidden[1] = value
        got = run(problem, backend, "x")
        assert not got.loss.isfinite() and not got.dx[1].isfinite().all()


def test_hint_too_small_is_loud(backend):
    problem = make_problem(token_weights=torch.ones(5), max_valid_tokens=3)
    assert run(problem, backend).loss.isnan().all()
    none = make_problem(token_weights=torch.ones(5), max_valid_tokens=0)
    assert run(none, backend).loss.isnan().all()
    zeros = make_problem(token_weights=torch.zeros(5), max_valid_tokens=0)
    assert run(zeros, backend).loss == 0


def test_padding_gets_no_gradient(backend):
    problem = make_problem(vocab_size=100)
    problem.weight[100:] = float("nan")
    got = run(problem, backend)
    assert got.loss.isfinite() and torch.count_nonzero(got.dw[100:]) == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_forbidden_columns(backend, direction):
    """A shared bias of -inf, over a whole tile and more, is the head without those columns."""
    cut = 600
    problem = make_problem(v=1300, h=16, n=3, direction=direction, bias=torch.zeros(1300))
    kept = Problem(problem.hidden, problem.weight[cut:], problem.teacher_hidden)
    kept.options = {"direction": direction, "bias": torch.zeros(1300 - cut)}
    problem.options["bias"][:cut] = -torch.inf
    got, expected = run(problem, backend, "x"), oracle(kept)
    assert relative(got.loss, expected.loss) <= 1e-3 and relative(got.dx, expected.dx) <= 2e-3


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
@pytest.mark.parametrize(
    "direction,sides",
    [(d, "both") for d in DIRECTIONS]
    + [("forward", "teacher"), ("jsd", "teacher"), ("reverse", "student"), ("jsd", "student")],
)
def test_columns_that_a_head_of_its_own_forbids(backend, dtype, direction, sides):
    """0 log 0 = 0, wherever the divergence is finite; a whole tile, the first column included."""
    cut, v = 600, 1300
    problem = make_problem(
        dtype, v=v, h=16, n=3, separate=True, direction=direction,
        bias=torch.zeros(v), teacher_bias=torch.zeros(v),
    )  # fmt: skip
    for side, name in (("student", "bias"), ("teacher", "teacher_bias")):
        if sides in (side, "both"):
            problem.options[name][:cut] = -torch.inf
    hidden = problem.hidden.double().requires_grad_()
    s = _log_probs(hidden, problem.weight, problem.options["bias"])
    t = _log_probs(problem.teacher_hidden, problem.teacher_weight, problem.options["teacher_bias"])
    if direction == "jsd":
        m = 0.5 * (_exp(s) + _exp(t))
        log_m = torch.where(m > 0, m, 1.0).log()
        rows = 0.5 * (_divergence(t, log_m) + _divergence(s, log_m))
    else:
        rows = _divergence(t, s) if direction == "forward" else _divergence(s, t)
    (8 * rows.mean()).backward()  # as `run` does
    got = run(problem, backend, "xb")
    assert got.loss.item() == pytest.approx(rows.mean().item(), rel=1e-3)
    # One side alone: d is 128 in the first column, from which Triton counts the others'.
    counted = backend == "triton" and sides != "both"
    bound = 4e-3 if dtype == BF16 else 1e-4 if counted else 2e-5
    assert relative(got.dx, hidden.grad) <= bound
    if sides != "teacher":
        assert got.db[:cut].abs().max() <= 1e-30


def test_finite_biases_count_as_they_are(backend):
    """However low; only -inf has a floor, below the lowest other one."""
    problem = make_problem(separate=True, bias=torch.zeros(127), teacher_bias=torch.zeros(127))
    problem.options["bias"][:60] = -200.0
    check(problem, backend, "x")
    low = make_problem(bias=torch.full((127,), -200.0))
    low.options["bias"][3] = -torch.inf
    kept = Problem(low.hidden, torch.cat([low.weight[:3], low.weight[4:]]), low.teacher_hidden)
    got, expected = run(low, backend, "x"), oracle(kept)
    assert relative(got.loss, expected.loss) <= 1e-3 and relative(got.dx, expected.dx) <= 2e-3


def _log_probs(hidden, weight, bias):
    return (hidden.double() @ weight.double().T + bias.double()).log_softmax(-1)


def _exp(x):
    return torch.where(x > -torch.inf, x, 0.0).exp() * (x > -torch.inf)


def _divergence(a, b):
    """sum p_a (a - b) where p_a is not 0."""
    seen = a > -torch.inf
    gap = torch.where(seen, a, 0.0) - torch.where(seen, b, 0.0)
    return (_exp(a) * gap).sum(-1)


def test_heads_of_different_padding(backend):
    problem = make_problem(separate=True, vocab_size=100)
    problem.teacher_weight = problem.teacher_weight[:103]
    check(problem, backend)


def test_only_what_is_asked_for(backend):
    for gradients in ("x", "w", "b", "xw", ""):
        problem = make_problem(bias=torch.randn(127))
        check(problem, backend, gradients)


# --- autograd -------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", (None, 4.0))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(direction, softcap):
    gen = torch.Generator().manual_seed(3)
    x, t, w = (torch.randn(n, 4, generator=gen, dtype=torch.float64) for n in (3, 3, 11))
    b = torch.randn(11, generator=gen, dtype=torch.float64)
    wt = torch.randn(11, 4, generator=gen, dtype=torch.float64)
    for tensor in (x, w, b):
        tensor.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 0.5])

    for reduction in ("mean", "none"):

        def f(x, w, b, reduction=reduction):
            return linear_kl_div(
                x,
                w,
                t,
                wt,
                bias=b,
                direction=direction,
                temperature=1.5,
                logit_scale=0.7,
                softcap=softcap,
                token_weights=weights,
                reduction=reduction,
                vocab_size=10,
                chunk_tokens=2,
            )

        assert torch.autograd.gradcheck(f, (x, w, b))


def test_bitwise_repeatable(backend):
    for dtype in (FP32, BF16):
        problem = make_problem(dtype, v=1000, chunk_tokens=2)
        first, second = run(problem, backend), run(problem, backend)
        assert torch.equal(first.loss, second.loss)
        assert torch.equal(first.dx, second.dx) and torch.equal(first.dw, second.dw)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_retain_graph_and_double_use(backend, reduction):
    problem = make_problem()
    x, w = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    loss = linear_kl_div(x, w, problem.teacher_hidden, backend=backend, reduction=reduction).sum()
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    again = torch.autograd.grad(4 * loss, (x, w), retain_graph=True)
    both = torch.autograd.grad(2 * loss + 2 * loss, (x, w))
    for first, second, third in zip(once, again, both, strict=True):  # powers of two: exact
        assert torch.equal(second, 4 * first) and torch.equal(third, 4 * first)


def test_second_derivatives_are_refused(backend):
    problem = make_problem()
    x = problem.hidden.clone().requires_grad_()
    loss = linear_kl_div(x, problem.weight, problem.teacher_hidden, backend=backend)
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_heads_may_vanish_before_backward(backend, reduction):
    """ZeRO-3 partitions a gathered weight again after forward: nothing saved may alias it."""
    problem = make_problem(separate=True, reduction=reduction)
    expected = run(problem, backend)
    x, w = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        loss = linear_kl_div(
            x,
            w,
            problem.teacher_hidden,
            problem.teacher_weight,
            reduction=reduction,
            backend=backend,
        )
    heads = {w.data_ptr(), problem.teacher_weight.data_ptr()}
    assert not heads & {t.data_ptr() for t in saved}
    w.data.fill_(float("nan"))
    problem.teacher_weight.fill_(float("nan"))
    (8.0 * loss).backward()
    assert torch.equal(x.grad, expected.dx) and torch.equal(w.grad, expected.dw)


def test_trainable_shared_head_has_no_gradient_through_the_teacher(backend):
    """The shared head is one tensor; only the student's use of it is trained."""
    problem: Problem = make_problem()
    got, expected = run(problem, backend), oracle(problem)
    assert relative(got.dw, expected.dw) <= 2e-5


# --- torch.compile --------------------------------------------------------------------------------

_needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")


@pytest.mark.parametrize("compiler", ("aot_eager", pytest.param("inductor", marks=_needs_compiler)))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_compiled_equals_eager(backend, compiler, reduction):
    dtype, separate = (BF16, True) if reduction == "mean" else (FP32, False)
    problem = make_problem(
        dtype,
        separate=separate,
        token_weights=torch.tensor([1.0, 0, 2, 1, 1]),
        reduction=reduction,
    )

    def step(x, w):
        loss = linear_kl_div(
            x * 1.0, w, problem.teacher_hidden, problem.teacher_weight, backend=backend,
            **problem.options,
        )  # fmt: skip
        return 2.0 * loss.sum()

    results = []
    for f in (step, torch.compile(step, fullgraph=True, backend=compiler)):
        x, w = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
        loss = f(x, w)
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad))
    torch._dynamo.reset()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
