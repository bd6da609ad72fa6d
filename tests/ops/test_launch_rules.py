"""How much is launched, and where: chunks and ranges that fill whole waves, guards, autocast."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from es2fast import pairwise_separation
from es2fast.ops.tokens import DX_TILE, full_wave_chunk

SMS = 132  # H100, H200


def filled(chunk: int, width: int) -> float:
    """Share of the SMs busy over the waves of dX's tiles."""
    tiles = -(-chunk // DX_TILE[0]) * -(-width // DX_TILE[1])
    return tiles / (-(-tiles // SMS) * SMS)


@pytest.mark.parametrize("width", (2048, 2304, 2560, 3072, 3584, 4096, 5120, 8192))
@pytest.mark.parametrize("least", (1024, 2048))
def test_chunks_fill_the_gpu(width, least):
    chunk = full_wave_chunk(width, SMS, least)
    assert least <= chunk <= 2 * least and chunk % 128 == 0
    assert filled(chunk, width) >= 0.9
    assert filled(chunk, width) >= filled(least, width)


def test_chunks_of_known_widths():
    """H=2048, 2560 and 5120 filled 48, 61 and 61 % with 1024 rows."""
    chunks = {width: full_wave_chunk(width, SMS, 1024) for width in (2048, 2560, 4096, 5120)}
    assert chunks == {2048: 2048, 2560: 1664, 4096: 1024, 5120: 1664}
    assert full_wave_chunk(64, SMS, 1024) == 2048  # bounded: the buffers do not grow as H shrinks


def test_column_ranges_fit_two_waves():
    kernels = pytest.importorskip("es2fast.ops.linear_kl.triton", reason="needs triton")
    for rows in range(1, 600):
        count = kernels.splits(rows, 1002, SMS)
        assert count == 1 or rows * count <= 2 * SMS
    assert kernels.splits(64, 1002, SMS) == 4 and kernels.splits(16, 1002, SMS) == 16
    assert kernels.splits(1, 3, SMS) == 3 and kernels.splits(1000, 1002, SMS) == 1


class Entered(Exception):
    """The guard was entered, with this device."""


@pytest.mark.parametrize("op", ("linear_kl", "moments", "separation"))
def test_launchers_guard_their_device(op, monkeypatch):
    """Kernels start on the tensors' GPU: its guard is entered before anything else happens."""
    pytest.importorskip("triton", reason="needs triton")
    launcher = importlib.import_module(f"es2fast.ops.{op}.triton").run_triton

    def enter(device):
        raise Entered(device)

    monkeypatch.setattr(torch.cuda, "device", enter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, ones = torch.empty(3, 4, device="cuda:1"), torch.empty(3, device="cuda:1")
    if op == "separation":
        from es2fast.ops.separation.chunked import PairProblem, PairSpec

        spec = PairSpec("hinge", 1.0, 1.0)
        problem = PairProblem(x, x, ones, ones, spec, False, False, None, True, True)
    else:
        problem = SimpleNamespace(hidden=x)
    with pytest.raises(Entered) as found:
        launcher(problem)
    assert found.value.args[0] == torch.device("cuda:1")


@pytest.mark.parametrize("backend", ("torch", None))
@pytest.mark.parametrize("loss", ("hinge", "l2", "squared", "centroid", "cosine"))
def test_separation_ignores_autocast(loss, backend):
    """Gram GEMMs rounded to bfloat16 moved the loss by 8.5e-4."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 64, generator=generator).requires_grad_() for _ in range(2))
    margin = None if loss in ("l2", "squared", "centroid") else 0.1 if loss == "cosine" else 15.0
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = pairwise_separation(a, b, loss=loss, margin=margin, backend=backend)
        results.append((value.detach(), *torch.autograd.grad(value, (a, b))))
    for plain, cast in zip(*results, strict=True):
        assert cast.dtype == plain.dtype and torch.equal(cast, plain)
