"""Statistics of all distances against brute force, and the whitening against its definition."""

from __future__ import annotations

import pytest
import torch

from es2fast import Whitening, pairwise_distance_stats
from es2fast.ops.separation import distance_stats


def groups(dtype: torch.dtype, n: int, m: int, mean: float) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    centre = mean * torch.randn(33, generator=gen, dtype=torch.float64)
    a, b = (torch.randn(k, 33, generator=gen, dtype=torch.float64) for k in (n, m))
    return (centre + a).to(dtype), (centre + 2 * b + 0.3).to(dtype)


@pytest.mark.parametrize("mean", (0.0, 1000.0))
@pytest.mark.parametrize("n,m", ((1, 1), (1, 300), (301, 200)))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_against_all_distances(dtype, n, m, mean):
    a, b = groups(dtype, n, m, mean)
    if n > 1:
        b[7] = a[5]  # the minimum is exactly 0
    got = pairwise_distance_stats(a, b, chunk_rows=64)
    a, b = a.double(), b.double()
    d = (a[:, None] - b[None]).norm(dim=-1).flatten()
    close = dict(rel=1e-5, abs=1e-6)
    assert got.pairs == n * m
    assert got.mean == pytest.approx(d.mean().item(), **close)
    assert got.std == pytest.approx(d.std(correction=0).item(), **close)
    assert got.min == pytest.approx(d.min().item(), **close)
    assert got.max == pytest.approx(d.max().item(), **close)
    assert got.within_a == pytest.approx(
        (a - a.mean(0)).square().sum(1).mean().sqrt().item(), **close
    )
    assert got.within_b == pytest.approx(
        (b - b.mean(0)).square().sum(1).mean().sqrt().item(), **close
    )
    assert got.between == pytest.approx((a.mean(0) - b.mean(0)).norm().item(), **close)
    for q, value in got.quantiles.items():
        exact = d.quantile(q, interpolation="lower").item()
        nearest = d.quantile(q, interpolation="higher").item()
        slack = got.quantile_error + 1e-5 * got.max
        assert exact - slack <= value <= nearest + slack


def test_tiles_do_not_change_the_result(monkeypatch):
    a, b = groups(torch.float32, 100, 90, 0.0)
    whole = pairwise_distance_stats(a, b)
    monkeypatch.setattr("es2fast.ops.separation.chunked.COLUMNS", 17)
    monkeypatch.setattr(distance_stats, "COLUMNS", 17)
    parts = pairwise_distance_stats(a, b, chunk_rows=13)
    assert parts.mean == pytest.approx(whole.mean) and parts.std == pytest.approx(whole.std)
    assert parts.quantiles == pytest.approx(whole.quantiles, rel=1e-4)


def test_mistakes():
    a = torch.zeros(3, 4)
    for b, match in ((a[:0], "at least one row"), (torch.zeros(3, 5), "one hidden size")):
        with pytest.raises(ValueError, match=match):
            pairwise_distance_stats(a, b)
    with pytest.raises(ValueError, match="quantiles"):
        pairwise_distance_stats(a, a, quantiles=(2.0,))


# --- whitening ------------------------------------------------------------------------------------


def covariance(a: torch.Tensor, b: torch.Tensor, rank: int, rho: float) -> torch.Tensor:
    """The model by its definition: dense, through eigenvectors."""
    degrees = a.shape[0] + b.shape[0] - 2
    scatter = sum((x - x.mean(0)).t() @ (x - x.mean(0)) for x in (a, b)) / degrees
    values, vectors = torch.linalg.eigh(scatter)
    low = vectors[:, -rank:] * values[-rank:] @ vectors[:, -rank:].t()
    rest = torch.diag((scatter - low).diagonal())
    return (1 - rho) * (low + rest) + rho * scatter.trace() / a.shape[1] * torch.eye(
        a.shape[1], dtype=a.dtype
    )


@pytest.mark.parametrize("n,m,rank", ((4, 3, 3), (100, 80, 5), (20, 20, 33)))
def test_whitened_distances_are_mahalanobis_distances(n, m, rank):
    a, b = groups(torch.float64, n, m, 0.0)
    whitening = Whitening.fit(a, b, rank=rank, shrinkage=0.2)
    difference = a[0] - b[1]
    inverse = torch.linalg.inv(covariance(a, b, rank, 0.2))
    got = whitening(a[:1]) - whitening(b[1:2])
    assert got.norm().item() == pytest.approx(
        (difference @ inverse @ difference).sqrt().item(), rel=1e-5
    )


def test_whitening_is_plain_tensors():
    a, b = groups(torch.float32, 9, 7, 0.0)
    a[:, 5] = b[:, 5] = 3.0  # a dimension that does not vary
    whitening = Whitening.fit(a, b)
    assert whitening.factor.shape == (33, 14)
    again = Whitening(**whitening.tensors()).to("cpu")
    assert torch.equal(again(a), whitening(a)) and whitening(a).isfinite().all()


def test_whitening_mistakes():
    a = torch.randn(3, 4)
    for arguments, options, match in (
        ((a[:1], a), {}, "n >= 2"),
        ((a, a), dict(shrinkage=0.0), "shrinkage=0.0"),
        ((a, a), dict(rank=-1), "rank=-1"),
        ((a, torch.zeros(3, 5)), {}, "5: take both"),
        ((a * float("nan"), a), {}, "NaN"),
        ((torch.ones(3, 4), torch.ones(2, 4)), {}, "do not vary"),
    ):
        with pytest.raises(ValueError, match=match):
            Whitening.fit(*arguments, **options)
