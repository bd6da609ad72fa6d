"""The matrix of the linear KL on a real GPU, compiled kernels and cuBLAS GEMMs."""

from __future__ import annotations

import pytest
import torch

from es2fast import linear_kl_div
from es2fast.ops.backends import choose_backend
from tests.ops.linear_kl.matrix import (
    BF16,
    DIRECTIONS,
    FP16,
    FP32,
    at_divergence,
    check,
    make_problem,
    option_problems,
    run,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


@pytest.fixture(params=("triton", "torch"))
def backend(request) -> str:
    try:
        return choose_backend(request.param, hidden=torch.empty(1, 1, device="cuda"))
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("separate", (False, True))
@pytest.mark.parametrize("spread", (0.5, 6.0), ids=("flat", "peaked"))
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_sweep_towards_the_teacher(backend, dtype, direction, spread, separate):
    for target in (0.4, 2e-2, 2e-3, 1e-4, 1e-6):
        for temperature in (1.0, 2.0):
            options = dict(direction=direction, temperature=temperature, chunk_tokens=17)
            if separate:
                spread = min(spread, 2.0)
            problem, _ = at_divergence(
                target, dtype, n=35, h=257, v=1000, spread=spread, separate=separate, **options
            )
            check(problem.to("cuda"), backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
@pytest.mark.parametrize("name", option_problems(FP32))
@pytest.mark.parametrize("h", (65, 80))  # the tile-fused kernel takes multiples of 16
def test_options(backend, h, name, direction, dtype):
    problem = option_problems(dtype, h)[name]
    problem.options["direction"] = direction
    check(problem.to("cuda"), backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("v", (32000, 128256, 128256 + 3))
def test_large_vocabulary(backend, v, direction):
    problem = make_problem(BF16, n=300, h=512, v=v, chunk_tokens=128, direction=direction)
    check(problem.to("cuda"), backend)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_inputs_give_exactly_zero(backend, direction):
    for dtype in (FP32, BF16, FP16):
        problem = make_problem(dtype, n=130, v=1000, distance=0.0, direction=direction)
        for separate in (False, True):
            problem.teacher_weight = problem.weight.clone() if separate else None
            got = run(problem.to("cuda"), backend)
            assert got.loss.item() == 0.0 and got.dx.abs().max().item() == 0.0
            with torch.no_grad():
                assert run(problem.to("cuda"), backend, "").loss.item() == 0.0


def test_default_is_triton_and_repeats_bit_by_bit():
    assert choose_backend(None, hidden=torch.empty(1, 1, device="cuda")) == "triton"
    problem = make_problem(BF16, n=3000, h=512, v=5003, separate=True).to("cuda")
    first, second = run(problem, None), run(problem, None)
    for a, b in ((first.loss, second.loss), (first.dx, second.dx), (first.dw, second.dw)):
        assert torch.equal(a, b)


def test_64_bit_offsets():
    """Rows beyond element 2^31 of the logits: 20000 x 128256 in one chunk."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    problem = make_problem(BF16, n=20000, h=16, v=128256).to("cuda")
    whole = run(problem, "triton", "x", chunk_tokens=20000, reduction="sum")
    parts = run(problem, "triton", "x", chunk_tokens=1000, reduction="sum")
    torch.testing.assert_close(whole.dx.float(), parts.dx.float(), rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("mode", ("frozen", "trainable", "trainable, no buffer", "no-grad"))
def test_memory_does_not_grow_with_tokens_times_vocabulary(mode):
    """A chunk of logits and, of a trained head, no more than its gradients: bounded at N and at 4N,
    and without a buffer for G not larger by any N V."""
    h, v, chunk = 1024, 128256, 512
    extra = []
    for n in (1024, 4096):
        problem = make_problem(BF16, n=n, h=h, v=v).to("cuda")
        x = problem.hidden.requires_grad_(mode != "no-grad")
        trains = mode.startswith("trainable")
        w = problem.weight.requires_grad_(trains)
        buffer = 0 if "no buffer" in mode else None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss = linear_kl_div(
            x, w, problem.teacher_hidden, chunk_tokens=chunk, grad_buffer_bytes=buffer
        )
        if mode != "no-grad":
            loss.backward()
        extra.append(torch.cuda.max_memory_allocated() - before)
        del loss, x, w, problem
    heads = 12 * h * v if trains else 0  # float32 dW, its bf16 copy, the scaled one
    for n, found in zip((1024, 4096), extra):
        assert found < 8 * chunk * v + heads + 64 * n * h, f"{found / 1e9:.2f} GB"
    if mode != "trainable":
        assert extra[1] - extra[0] < 64 * 3072 * h, f"grew by {(extra[1] - extra[0]) / 1e9:.2f} GB"


def test_another_gpu_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    check(make_problem(BF16).to("cuda:1"), None)


def test_no_synchronization():
    """Neither without weights, nor with weights on the CPU, nor with a hint."""
    problem = make_problem(BF16, n=64, v=1000).to("cuda")
    x = problem.hidden.requires_grad_()
    weights = torch.arange(64) % 2
    cases = (
        {},
        dict(token_weights=weights.pin_memory()),
        dict(token_weights=weights.cuda(), max_valid_tokens=32),
        dict(token_weights=weights.cuda(), max_valid_tokens=64),  # as the LM head calls it
    )
    for options in cases:
        for check_it in (False, True):
            torch.cuda.set_sync_debug_mode("error" if check_it else "default")
            try:
                linear_kl_div(x, problem.weight, problem.teacher_hidden, **options).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
