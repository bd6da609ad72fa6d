"""Buffers that calls on a CPU leave to the next one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from es2fast import linear_kl_div, moment_kl_div, teacher_moments
from es2fast.ops import scratch
from es2fast.ops.linear_ce import linear_cross_entropy
from es2fast.ops.scratch import Scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scratch, "_kept", scratch._Kept())
    yield


def sizes() -> list[int]:
    return sorted(len(buffer) for buffer in scratch._kept.buffers)


def test_the_next_call_gets_what_a_call_leaves() -> None:
    with Scratch() as own:
        first = own.logit_rows(4, 100, torch.float32, CPU)
        second = own.logit_rows(4, 100, torch.float32, CPU)
        assert first.shape == (4, 100) and first.stride() == (128, 1)
        places = {first.data_ptr(), second.data_ptr()}
        assert len(places) == 2 and not sizes()
        with Scratch() as inner:  # of a call within this one
            assert inner.logit_rows(4, 100, torch.float32, CPU).data_ptr() not in places
    assert sizes() == [2048] * 3
    with Scratch() as own:
        smaller = own.logit_rows(2, 128, torch.float64, CPU)
        assert smaller.dtype == torch.float64 and smaller.data_ptr() % 64 == 0
        assert sizes() == [2048] * 2
        larger = own.logit_rows(8, 100, torch.float32, CPU)
        assert larger.shape == (8, 100) and sizes() == [2048]  # one that was too small is gone
    assert sizes() == [2048, 2048, 4096]


def test_a_call_in_inference_mode_leaves_what_others_can_write() -> None:
    with torch.inference_mode(), Scratch() as own:
        own.logit_rows(4, 100, torch.float32, CPU)
    with Scratch() as own:
        assert not own.logit_rows(4, 100, torch.float32, CPU).zero_().is_inference()


def test_huge_ones_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "MOST", 2048)
    with Scratch() as own:
        for rows in (4, 5):
            own.logit_rows(rows, 100, torch.float32, CPU)
    assert sizes() == [2048]


def test_a_call_that_fails_leaves_them_too_and_threads_share_none() -> None:
    with pytest.raises(ZeroDivisionError), Scratch() as own:
        own.logit_rows(1, 1, torch.float32, CPU)
        raise ZeroDivisionError
    assert sizes() == [512]
    seen = []
    thread = threading.Thread(target=lambda: seen.append(sizes()))
    thread.start()
    thread.join()
    assert seen == [[]] and sizes() == [512]


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_lies_in_a_kept_buffer_changes_nothing(
    backend: str, dtype: torch.dtype, trains: bool
) -> None:
    torch.manual_seed(0)
    weight, teacher = torch.randn(300, 16, dtype=dtype), torch.randn(40, 16, dtype=dtype)
    weight.requires_grad_(trains)
    sums = teacher_moments(teacher, weight.detach(), chunk_tokens=16)
    targets = torch.randint(0, 300, (40,))

    def results() -> list[torch.Tensor]:
        hidden = teacher.clone().mul_(1.1).requires_grad_()
        kl = linear_kl_div(hidden, weight, teacher, chunk_tokens=16, backend=backend)
        ce, hits = linear_cross_entropy(hidden, weight, targets, torch.ones(40), chunk_tokens=16)
        moments = moment_kl_div(hidden, weight.detach(), sums, chunk_tokens=16, backend=backend)
        loss = kl + ce + moments
        wanted = [hidden, weight] if trains else [hidden]
        return [kl, ce, hits, moments, *torch.autograd.grad(loss, wanted)]

    fresh = results()
    assert len(sizes()) >= 1
    for buffer in scratch._kept.buffers:
        buffer.fill_(0xFF)  # nan in every dtype
    for one, other in zip(results(), fresh, strict=True):
        assert torch.equal(one, other)
