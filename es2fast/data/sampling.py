"""Which rows an optimizer step sees: a pure function of (seed, step).

Each group is an endless stream: epoch after epoch, each a fresh permutation of all its rows. Global
micro-batch j of step s takes the next `micro_batch_size x world_size` rows of both streams, and a
rank its slice of them. So there is no state to save, a resumed run sees the same data, 1 rank x 2
rows equals 2 ranks x 1 row, and no rank is ever without a row of either group.

Permutations come from `random.Random` seeded with text, whose results Python keeps stable between
versions and platforms.
"""

from __future__ import annotations

import random
from functools import lru_cache

from es2fast.errors import UserError


class PairedSampler:
    """Row numbers of both groups, for one rank."""

    def __init__(
        self,
        num_harmful: int,
        num_harmless: int,
        *,
        seed: int,
        micro_batch_size: int,
        gradient_accumulation: int,
        rank: int,
        world_size: int,
    ) -> None:
        """Raises UserError: a group without rows, a size below 1, or a rank out of range."""
        for name, value in (
            ("data.harmful", num_harmful),
            ("data.harmless", num_harmless),
            ("train.micro_batch_size", micro_batch_size),
            ("train.gradient_accumulation", gradient_accumulation),
            ("world size", world_size),
        ):
            if value < 1:
                raise UserError(f"{name}: {value} is too few; at least 1 is needed")
        if not 0 <= rank < world_size:
            raise UserError(f"rank: {rank} is out of range; there are {world_size} ranks")
        self.sizes = {"harmful": num_harmful, "harmless": num_harmless}
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation = gradient_accumulation
        self.rank = rank
        self.world_size = world_size

    def indices(self, step: int) -> list[tuple[list[int], list[int]]]:
        """Per micro-batch of step 0, 1, ...: this rank's harmful and harmless row numbers."""
        if step < 0:
            raise UserError(f"step: {step} is negative")
        world = self.micro_batch_size * self.world_size
        batches = []
        for j in range(self.gradient_accumulation):
            start = (step * self.gradient_accumulation + j) * world
            start += self.rank * self.micro_batch_size
            batches.append((self._rows("harmful", start), self._rows("harmless", start)))
        return batches

    def epochs(self, steps: int) -> dict[str, float]:
        """How often `steps` optimizer steps go through each group."""
        seen = steps * self.gradient_accumulation * self.micro_batch_size * self.world_size
        return {group: seen / size for group, size in self.sizes.items()}

    def _rows(self, group: str, start: int) -> list[int]:
        size = self.sizes[group]
        places = range(start, start + self.micro_batch_size)
        return [_permutation(self.seed, group, size, p // size)[p % size] for p in places]


@lru_cache(maxsize=8)
def _permutation(seed: int, group: str, size: int, epoch: int) -> tuple[int, ...]:
    rows = list(range(size))
    random.Random(f"{seed}/{group}/{epoch}").shuffle(rows)
    return tuple(rows)
