"""A frozen head that ZeRO-3 has parted, and tokens that differ from rank to rank.

DeepSpeed cuts a weight (V, H), flattened, into one slice of S = ceil(V H / p) elements per rank,
the last one padded. Here a rank owns the rows that begin in its slice; the end of a row that is cut
in two comes from the next rank. An op gathers the tokens of all ranks, works on them with the rows
of its own, and hands each rank the sum of the parts of its tokens' gradients, by a reduce-scatter.
DeepSpeed's slices: ``Init._partition_param`` in deepspeed/runtime/zero/partition_parameters.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from es2fast.ops.checks import refuse


@dataclass(frozen=True)
class Shard:
    """Which rows of (V, H) begin in the slice of a rank, and where they lie in it."""

    first: int  # row
    stop: int  # row
    lead: int  # elements before the first row: the end of the row before
    missing: int  # elements of the last row that lie in the next slice

    @staticmethod
    def of(rank: int, size: int, vocab: int, width: int) -> Shard:
        first, stop = (min(-(-at * size // width), vocab) for at in (rank, rank + 1))
        end = (rank + 1) * size
        return Shard(first, stop, first * width - rank * size, max(0, stop * width - end))


def own_rows(
    flat: Tensor,  # (S,) this rank's slice
    vocab: int,
    width: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, slice]:  # (R, H), which of the V rows
    """The rows of a head (vocab, width) that begin in this rank's slice, whole, and which they are.

    A view of ``flat`` where no rank cuts a row; else a copy, after an all-gather of H elements from
    every rank.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    shards = [Shard.of(r, flat.numel(), vocab, width) for r in range(ranks)]
    own = shards[rank]
    body = flat[own.lead : min(flat.numel(), own.lead + (own.stop - own.first) * width)]
    if any(shard.missing for shard in shards):
        leads = all_gathered(flat[:width].contiguous(), group)
        if own.missing:
            body = torch.cat([body, leads[rank + 1][: own.missing]])
    return body.view(-1, width), slice(own.first, own.stop)


def whole_bias(
    flat: Tensor | None,  # (ceil(V / p),) this rank's slice
    vocab: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Tensor | None:  # (V,)
    """A parted bias, gathered: V elements are little beside V x H, and its cuts are not those of
    the weight's rows."""
    if flat is None:
        return None
    return torch.cat(all_gathered(flat.to(device), group))[:vocab]


def check_slices(
    hidden: Tensor, flat_weight: Tensor, flat_bias: Tensor | None, vocab: int, ranks: int
) -> None:
    """ValueError unless the slices are those of a head for ``hidden`` (N, H) over ``ranks``."""
    width = hidden.shape[1]
    for name, flat, count, what in (
        ("flat_weight", flat_weight, vocab * width, f"{vocab} x {width}"),
        ("flat_bias", flat_bias, vocab, f"{vocab}"),
    ):
        if flat is None:
            continue
        refuse(
            flat.dtype != hidden.dtype,
            f"{name} is {flat.dtype} and hidden {hidden.dtype}: cast hidden",
        )
        size = -(-count // ranks)
        refuse(
            flat.dim() != 1 or flat.numel() < size,
            f"{name} has shape {tuple(flat.shape)}: expected ({size},), a rank's share of "
            f"{what} over {ranks} ranks ({name.removeprefix('flat_')}.ds_tensor)",
        )
    last = Shard.of(ranks - 1, flat_weight.numel(), vocab, width)
    refuse(
        flat_weight.numel() < width or last.first >= last.stop,
        f"vocab_size={vocab}: too few rows for {ranks} ranks, one of which has none; gather the "
        "head instead",
    )


@dataclass(frozen=True)
class RankTokens:
    """How many tokens each rank brings.

    Tensors travel padded to the largest of the counts; a sum travels back the same way.
    """

    counts: list[int]
    group: dist.ProcessGroup | None

    def gathered(self, own: Tensor) -> Tensor:
        """Rows (counts[rank], ...) of every rank, one after the other: (sum(counts), ...)."""
        padded = own.new_zeros(max(self.counts), *own.shape[1:])
        padded[: own.shape[0]] = own
        parts = all_gathered(padded, self.group)
        return torch.cat([part[:n] for part, n in zip(parts, self.counts, strict=True)])

    def own(self, rows: Tensor) -> Tensor:
        """This rank's of the rows of all ranks (sum(counts), ...)."""
        return rows.split(self.counts)[dist.get_rank(self.group)]

    def scattered_sum(self, rows: Tensor) -> Tensor:
        """The own (counts[rank], H) of rows of all ranks (sum(counts), H), added up over them."""
        most = max(self.counts)
        padded = rows.new_zeros(len(self.counts), most, rows.shape[1])
        for place, part in zip(padded, rows.split(self.counts), strict=True):
            place[: part.shape[0]] = part
        out = torch.empty_like(padded[0])
        dist.reduce_scatter_tensor(out, padded.flatten(0, 1), group=self.group)
        return out[: self.counts[dist.get_rank(self.group)]]


def exchanged(
    numbers: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> list[list[int]]:  # one list per rank
    """A few numbers of every rank, on the host: on a GPU this synchronizes."""
    return torch.stack(all_gathered(torch.tensor(numbers, device=device), group)).tolist()


def all_gathered(mine: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """A tensor of the same shape from every rank."""
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    return parts
