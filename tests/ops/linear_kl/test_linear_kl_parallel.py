"""A vocabulary over two gloo processes, against one process and against float64."""

from __future__ import annotations

import pytest
import torch

from es2fast import vocab_parallel_linear_kl_div
from es2fast.ops.backends import choose_backend
from tests.ops.interpreter import check_in_interpreter
from tests.ops.linear_kl import ranks
from tests.ops.linear_kl.matrix import VALUE_BOUND, gradient_bound, oracle, relative, run

try:
    choose_backend("triton", hidden=torch.empty(1, 1))
    BACKEND = "triton"  # this process has the interpreter, or the CPU tensors would be refused
    CASES, WORKER = ranks.half_cases(), ranks.triton_worker
except ValueError:
    BACKEND, CASES, WORKER = "torch", ranks.cases(), ranks.worker


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(WORKER, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.skipif(BACKEND == "triton", reason="starts the interpreter")
@pytest.mark.slow
def test_row_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="the kernels need triton")
    check_in_interpreter("tests/ops/linear_kl/test_linear_kl_parallel.py", "not refused")


@pytest.mark.parametrize("name", CASES)
def test_equal_to_float64_and_to_one_process(found, name):
    problem = CASES[name]
    a, b = (rank[name] for rank in found)
    assert torch.equal(a["loss"], b["loss"]) and torch.equal(a["loss"], a["again"])
    trains = problem.options.get("reduction") != "none"
    want, one = oracle(problem), run(problem, BACKEND, "xwb" if trains else "x")
    kl = float(want.loss.abs().mean())
    bound = gradient_bound(problem.hidden.dtype, kl)
    assert a["loss"].dtype == one.loss.dtype and a["loss"].shape == one.loss.shape
    assert torch.equal(a["dx"], b["dx"])  # complete on both
    got = dict(dx=a["dx"])
    if trains:
        got |= {key: torch.cat([a[key], b[key]]) for key in ("dw", "db") if a[key] is not None}
    assert relative(a["loss"], want.loss) <= VALUE_BOUND
    assert relative(a["loss"], one.loss) <= VALUE_BOUND
    for key, gradient in got.items():
        expected, alone = getattr(want, key), getattr(one, key)
        assert gradient.dtype == alone.dtype
        assert relative(gradient, expected) <= bound, key
        assert relative(gradient, alone) <= 2 * bound, key


@pytest.mark.parametrize("direction", ("forward", "jsd"))
def test_bytes_on_the_wire(found, direction):
    """Per token statistics, and to an all-reduce H float32 and what the docstring says."""
    tokens, h = 20, 48
    statistics = 28 if BACKEND == "triton" else 24
    more = {("triton", "forward"): 1, ("triton", "jsd"): 2, ("torch", "jsd"): 3}
    for rank in found:
        reduced = 4 * (h + more.get((BACKEND, direction), 0)) * tokens
        assert rank[f"bytes {direction}"] == (statistics * tokens, reduced)


def test_a_head_that_trains_without_reduction_is_refused():
    x, w = torch.randn(5, 8), torch.randn(20, 8, requires_grad=True)
    with pytest.raises(ValueError, match="reduction='none' with a head that trains"):
        vocab_parallel_linear_kl_div(x, w, x, reduction="none")


def test_a_row_pass_that_cannot_be_is_refused():
    x, w = torch.randn(5, 8), torch.randn(20, 8)
    with pytest.raises(ValueError, match=r"'triton' with torch\.float32"):
        vocab_parallel_linear_kl_div(x, w, x, backend="triton")
    with pytest.raises(ValueError, match="expected 'triton', 'torch'"):
        vocab_parallel_linear_kl_div(x, w, x, backend="native")
