"""Rows of all ranks for losses on pairs: an all-gather in which own rows keep their gradient.

Ranks may have different numbers of rows, also none. Counts are exchanged first (one host
synchronization, the sizes must be known), unless the caller knows an upper bound: then every rank
pads to it with rows of weight 0 and nothing synchronises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One group's embeddings and their weights in the accumulation dtype."""

    x: Tensor  # (N, H)
    w: Tensor  # (N,)
    equal: bool  # all weights are 1

    @staticmethod
    def of(x: Tensor, weights: Tensor | None) -> Rows:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if weights is None:
            return Rows(x, torch.ones(x.shape[0], dtype=dtype, device=x.device), True)
        return Rows(x, weights.to(x.device, dtype).contiguous(), False)  # kernels count by 1

    def detached(self) -> Rows:
        return Rows(self.x.detach(), self.w, self.equal)


def _counts(harmful: Rows, harmless: Rows, group: dist.ProcessGroup) -> list[tuple[int, int]]:
    """(n, m) of every rank. Raises ValueError on all ranks when their rows do not fit together."""
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    h, dtype = harmful.x.shape[1], kinds.index(harmful.x.dtype)
    mine = torch.tensor(
        [harmful.x.shape[0], harmless.x.shape[0], h, dtype], device=harmful.x.device
    )
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    table = torch.stack(parts).tolist()
    different = {(row[2], kinds[row[3]]) for row in table}
    if len(different) > 1:
        raise ValueError(
            f"harmful and harmless differ between the ranks of group in hidden size or dtype: "
            f"{sorted(map(str, different))}; every rank must pass the same"
        )
    return [(row[0], row[1]) for row in table]


def _padded(rows: Tensor, size: int) -> Tensor:
    """(N, ...) -> (size, ...) with zeros below."""
    full = rows.new_zeros(size, *rows.shape[1:])
    full[: rows.shape[0]] = rows
    return full


def gather_groups(
    harmful: Rows,
    harmless: Rows,
    group: dist.ProcessGroup,
    max_rows: tuple[int, int] | None,
) -> tuple[Rows, Rows]:
    """Both groups of all ranks in rank order, this rank's rows with their gradient.

    Two collectives (rows, weights), and one more for the counts when ``max_rows`` is None.
    """
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    own = (harmful.x.shape[0], harmless.x.shape[0])
    if max_rows is None:
        counts = _counts(harmful, harmless, group)
        most = (max(n for n, _ in counts), max(m for _, m in counts))
    else:
        most = max_rows
        if own[0] > most[0] or own[1] > most[1]:
            raise ValueError(
                f"max_rows={max_rows}: this rank has {own[0]} harmful and {own[1]} harmless rows; "
                "raise it on every rank, or pass None"
            )
        counts = [most] * world  # own rows are padded too: the same sums on every rank
    with torch.no_grad():
        x = torch.cat([_padded(harmful.x, most[0]), _padded(harmless.x, most[1])])
        w = torch.cat([_padded(harmful.w, most[0]), _padded(harmless.w, most[1])])
        xs, ws = ([torch.empty_like(t) for _ in range(world)] for t in (x, w))
        dist.all_gather(xs, x, group=group)
        dist.all_gather(ws, w, group=group)
    gathered = []
    for side, mine in enumerate((harmful, harmless)):
        first = 0 if side == 0 else most[0]
        parts = [slice(first, first + count[side]) for count in counts]
        rows = [x[part] for x, part in zip(xs, parts)]
        rows[rank] = torch.cat([mine.x, rows[rank][own[side] :]])  # with its gradient
        weights = torch.cat([w[part] for w, part in zip(ws, parts)])
        gathered.append(Rows(torch.cat(rows), weights, mine.equal and max_rows is None))
    return gathered[0], gathered[1]


def sum_over_ranks(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a detached scalar over the ranks, the same bits on all of them."""
    total = value.clone()
    dist.all_reduce(total, group=group)
    return total
