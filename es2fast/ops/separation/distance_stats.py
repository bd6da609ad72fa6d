"""Statistics of all n x m distances of two groups, for whole data sets, in the memory of a tile.

Two passes over the tiles of the Gram form (:mod:`es2fast.ops.separation.chunked`): the first gives
mean, standard deviation, minimum and maximum, the second a histogram of ``BINS`` equal bins between
minimum and maximum from which the quantiles are read. A quantile is the middle of the bin that
holds its order statistic: off by half a bin, ``(max - min) / (2 BINS)``, at most.

A standard deviation far below the mean would cancel in ``mean d^2 - (mean d)^2``: the sums are of
``d - c`` with c the distance scale of the centred groups, and in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.ops.separation.chunked import COLUMNS, CPU_ROWS, GPU_ROWS, distance_tiles

BINS = 65536
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class DistanceStats:
    """Euclidean distances between two groups, in the units of the input."""

    mean: float  # of all n m distances; the d0 of a base model
    std: float  # population, of the same
    min: float
    max: float
    quantiles: dict[float, float]  # each within quantile_error
    quantile_error: float
    within_a: float  # root mean square distance of a's rows to their mean
    within_b: float
    between: float  # distance of the two means
    pairs: int


def _check(a: Tensor, b: Tensor, quantiles: Sequence[float]) -> None:
    for name, rows in (("a", a), ("b", b)):
        if rows.dim() != 2 or rows.shape[0] == 0 or not rows.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(rows.shape)} and dtype {rows.dtype}: expected (N, H) "
                "floating point with at least one row"
            )
    if a.shape[1] != b.shape[1] or a.device != b.device:
        raise ValueError(
            f"a is {tuple(a.shape)} on {a.device} and b {tuple(b.shape)} on {b.device}: distances "
            "need one hidden size and one device"
        )
    for q in quantiles:
        if not 0 <= q <= 1:
            raise ValueError(f"quantiles={tuple(quantiles)}: expected numbers between 0 and 1")


def _mean_and_spread(rows: Tensor) -> tuple[Tensor, float]:
    """(mean (H,) in float64, root mean square distance to it), block by block."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[0], COLUMNS):
        total += rows[start : start + COLUMNS].sum(0, dtype=torch.float64)
    mean = total / rows.shape[0]
    square = torch.zeros((), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[0], COLUMNS):
        square += (rows[start : start + COLUMNS].double() - mean).square().sum()
    return mean, (square / rows.shape[0]).sqrt().item()


def _moments(tiles: Iterator[Tensor], origin: float, pairs: int) -> tuple[float, ...]:
    """(mean, std, min, max) of the distances."""
    first = second = 0.0
    low, high = float("inf"), 0.0
    for d in tiles:
        low, high = min(low, d.min().item()), max(high, d.max().item())
        shifted = d - origin
        first += shifted.sum(dtype=torch.float64).item()
        second += shifted.square_().sum(dtype=torch.float64).item()
    mean = first / pairs
    return origin + mean, max(second / pairs - mean**2, 0.0) ** 0.5, low, high


def _quantiles(
    tiles: Iterator[Tensor], low: float, high: float, pairs: int, wanted: Sequence[float]
) -> dict[float, float]:
    if high <= low:
        return dict.fromkeys(wanted, low)
    counts = torch.zeros(BINS, dtype=torch.int64)
    width = (high - low) / BINS
    for d in tiles:
        bins = d.sub_(low).div_(width).to(torch.int32).clamp_(0, BINS - 1)
        counts += torch.bincount(bins.flatten(), minlength=BINS).cpu()
    reached = counts.cumsum(0)
    found = {}
    for q in wanted:
        rank = min(int(q * pairs), pairs - 1)  # the order statistic that it names
        bin_ = int(torch.searchsorted(reached, torch.tensor(rank), right=True))
        found[q] = low + (bin_ + 0.5) * width
    return found


def pairwise_distance_stats(
    a: Tensor,  # (n, H)
    b: Tensor,  # (m, H)
    *,
    quantiles: Sequence[float] = QUANTILES,
    chunk_rows: int | None = None,
) -> DistanceStats:
    """Statistics of the n m distances ``||a_i - b_j||``; extra memory is a few tiles.

    Args:
        a, b: (n, H) and (m, H), any floating dtype, n and m up to 1e5 and beyond. Rounded to
            float32 after centring (float64 inputs stay so).
        quantiles: numbers in [0, 1].
        chunk_rows: rows of a tile of at most 2048 columns; None: 512 on a CPU, 4096 on a GPU.

    Raises:
        ValueError: empty groups, shapes or devices that do not fit, quantiles out of range.
    """
    _check(a, b, quantiles)
    a, b = a.detach(), b.detach()
    with torch.no_grad():
        (mean_a, within_a), (mean_b, within_b) = _mean_and_spread(a), _mean_and_spread(b)
        between = torch.linalg.vector_norm(mean_a - mean_b).item()
        pairs = a.shape[0] * b.shape[0]
        rows = chunk_rows or (CPU_ROWS if a.device.type == "cpu" else GPU_ROWS)
        origin = (within_a**2 + within_b**2 + between**2) ** 0.5  # root of the mean d^2
        mean, std, low, high = _moments(distance_tiles(a, b, rows), origin, pairs)
        found = _quantiles(distance_tiles(a, b, rows), low, high, pairs, quantiles)
    error = (high - low) / (2 * BINS)
    return DistanceStats(mean, std, low, high, found, error, within_a, within_b, between, pairs)
