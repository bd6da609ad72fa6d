"""Which rows an optimizer step sees: a pure function of (seed, step).

Each group is an endless stream: epoch after epoch, each a fresh permutation of all its rows. Global
micro-batch j of step s takes the next `micro_batch_size x world_size` rows of both streams, and a
rank its slice of them. Where some harmless rows are borderline ones, they are a stream of their
own, which fills a fixed share of the places, evenly spread. So there is no state to save, a resumed
run sees the same data, 1 rank x 2 rows equals 2 ranks x 1 row, and no rank is ever without a row of
either group.

With `lengths` and a window above 1, rows of like length share a micro-batch: each epoch's
permutation is cut into windows of so many global micro-batches, a window's rows are sorted by
length, cut into micro-batches, and these are shuffled. It is still a permutation of the epoch, and
a rank takes every `world_size`-th row of a micro-batch, so that all have alike work.

Permutations come from `random.Random` seeded with text, whose results Python keeps stable between
versions and platforms.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
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
        num_borderline: int = 0,
        borderline_share: float = 0.25,
        lengths: tuple[Sequence[int], Sequence[int]] | None = None,
        window: int = 1,
    ) -> None:
        """The last `num_borderline` of the harmless rows are borderline ones; without any, or
        without others, there is one stream. `lengths` are those of the harmful and of the harmless
        rows in tokens, `window` the micro-batches among which rows are sorted by them; 1: not.

        Raises:
            UserError: a group without rows, a size below 1, or a rank out of range.
        """
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
        self.borderline = num_borderline if num_borderline < num_harmless else 0
        self.share = borderline_share if self.borderline else 0.0
        self._exact_share = Fraction(self.share).limit_denominator(1000)
        self.seed = seed
        self.micro_batch_size = micro_batch_size
        self.gradient_accumulation = gradient_accumulation
        self.rank = rank
        self.world_size = world_size
        self._lengths: dict[str, Sequence[int]] = {}
        if lengths is not None and window > 1:
            ordinary = num_harmless - self.borderline
            self._lengths["harmful"] = lengths[0]
            self._lengths["harmless"] = lengths[1][:ordinary]
            self._lengths["borderline"] = lengths[1][ordinary:]
        self._window = window
        self._orders: dict[tuple[str, int], list[int]] = {}

    def indices(self, step: int) -> list[tuple[list[int], list[int]]]:
        """Per micro-batch of step 0, 1, ...: this rank's harmful and harmless row numbers."""
        if step < 0:
            raise UserError(f"step: {step} is negative")
        world = self.micro_batch_size * self.world_size
        start, batches = step * self.gradient_accumulation * world, []
        for places in self.places():
            harmful = [self._row("harmful", self.sizes["harmful"], start + p) for p in places]
            batches.append((harmful, [self._harmless(start + p) for p in places]))
        return batches

    def places(self) -> list[range]:
        """Per micro-batch of a step, which of the step's rows of either group are this rank's:
        0 .. (micro_batch_size x world_size x gradient_accumulation - 1), over all ranks."""
        world, found = self.micro_batch_size * self.world_size, []
        for start in range(0, self.gradient_accumulation * world, world):
            if self._lengths:
                found.append(range(start + self.rank, start + world, self.world_size))
            else:
                own = start + self.rank * self.micro_batch_size
                found.append(range(own, own + self.micro_batch_size))
        return found

    def epochs(self, steps: int) -> dict[str, float]:
        """How often `steps` optimizer steps go through each group."""
        seen = steps * self.gradient_accumulation * self.micro_batch_size * self.world_size
        ordinary = self.sizes["harmless"] - self.borderline
        found = {"harmful": seen / self.sizes["harmful"]}
        found["harmless"] = seen * (1 - self.share) / ordinary
        return found | ({"borderline": seen * self.share / self.borderline} if self.share else {})

    def _harmless(self, place: int) -> int:
        """The row at a place of the harmless places: borderline at every 1/share-th of them."""
        before = math.floor(place * self._exact_share)
        ordinary = self.sizes["harmless"] - self.borderline
        if math.floor((place + 1) * self._exact_share) > before:
            return ordinary + self._row("borderline", self.borderline, before)
        return self._row("harmless", ordinary, place - before)

    def _row(self, group: str, size: int, place: int) -> int:
        epoch = place // size
        if not self._lengths:
            return _permutation(self.seed, group, size, epoch)[place % size]
        if (group, epoch) not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if abs(k[1] - epoch) < 2}
            self._orders[group, epoch] = self._by_length(group, size, epoch)
        return self._orders[group, epoch][place % size]

    def _by_length(self, group: str, size: int, epoch: int) -> list[int]:
        """An epoch's rows, those of like length together; micro-batches that lie across two epochs
        are made whole by both."""
        rows, lengths = list(_permutation(self.seed, group, size, epoch)), self._lengths[group]
        share = {"harmless": 1 - self._exact_share, "borderline": self._exact_share}.get(group, 1)
        chunk = max(1, round(self.micro_batch_size * self.world_size * share))
        first = -epoch * size % chunk
        draw = random.Random(f"{self.seed}/{group}/{epoch}/lengths")
        found = sorted(rows[:first], key=lengths.__getitem__)
        for start in range(first, size, chunk * self._window):
            part = sorted(rows[start : start + chunk * self._window], key=lengths.__getitem__)
            chunks = [part[i : i + chunk] for i in range(0, len(part), chunk)]
            last = chunks.pop() if len(chunks[-1]) < chunk else []
            draw.shuffle(chunks)
            found += [row for some in [*chunks, last] for row in some]
        return found


@lru_cache(maxsize=8)
def _permutation(seed: int, group: str, size: int, epoch: int) -> tuple[int, ...]:
    rows = list(range(size))
    random.Random(f"{seed}/{group}/{epoch}").shuffle(rows)
    return tuple(rows)
