"""A memory of recent embeddings: negatives for a micro-batch that is too small for many pairs.

With a bank the separation of one layer is, for the loss f of a pair and sg = without gradient,

    1/2 [ mean over a_i x (b and bank B) of f  +  mean over (a and bank A) x b_j of f ]

and its gradient is that of the two means added, the first with respect to a alone, the second with
respect to b alone. That is the unbiased estimate of what a larger batch would give: each embedding
of this micro-batch moves with full weight, held against more of the other group. (One mean over all
pairs, those within the bank included, would shrink the gradient by n / (n + k).) With an empty bank
value and gradient are those of the plain loss.

Each rank banks its own rows, the op gathers them with the others', so all ranks see one bank: the
last k rows of all of them. Rows of earlier micro-batches of the same step belong to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EmbeddingBank:
    """The last rows of both groups, per layer, of this rank.

    Args:
        size: k, rows per group over all ranks.
        world: ranks; each keeps ceil(k / world).
    """

    def __init__(self, size: int, world: int):
        self._world = world
        self._capacity = -(-size // world)
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._marked: dict[int, tuple[Tensor, Tensor]] = {}

    def rows(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """(k_a, H) harmful and (k_b, H) harmless rows of earlier micro-batches; None at first."""
        return self._rows.get(layer)

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`: layer -> the two groups' rows."""
        return {str(layer): list(pair) for layer, pair in self._rows.items()}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """As it was at `state_dict`, on `device`."""
        self._rows = {
            int(layer): (a[-self._capacity :].to(device), b[-self._capacity :].to(device))
            for layer, (a, b) in state.items()
        }

    def parted(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        """The state of `rank` from those of other ranks, in their order."""
        return part_rows(states, rank, self._world)

    def mark(self) -> None:
        """What `undo` goes back to."""
        self._marked = dict(self._rows)

    def undo(self) -> None:
        """Forgets what was added since `mark`."""
        self._rows = self._marked

    @torch.no_grad()
    def add(self, layer: int, harmful: Tensor, harmless: Tensor) -> None:
        """After the loss of a micro-batch: its embeddings (n, H) and (m, H)."""
        new = (harmful.detach(), harmless.detach())
        old = self._rows.get(layer, (new[0][:0], new[1][:0]))
        a, b = (torch.cat(pair)[-self._capacity :].clone() for pair in zip(old, new))
        self._rows[layer] = (a, b)


def part_rows(
    states: list[dict[str, list[Tensor]]], rank: int, world: int
) -> dict[str, list[Tensor]]:
    """What `rank` of `world` ranks keeps of the rows of other ranks: they are dealt out by age, the
    newest last, so that all ranks have as many and together the newest.

    Args:
        states: per earlier rank layer -> rows of both groups (k, H), oldest first, k the same.
    """
    return {
        layer: [
            _dealt([state[layer][group] for state in states], rank, world) for group in range(2)
        ]
        for layer in states[0]
    }


def _dealt(shards: list[Tensor], rank: int, world: int) -> Tensor:
    rows = torch.stack(shards, dim=1).flatten(0, 1)  # by age, and by rank where that is the same
    return rows[len(rows) % world :][rank::world].contiguous()
