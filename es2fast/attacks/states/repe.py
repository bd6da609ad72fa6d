"""Representation Engineering: push along the first principal component of paired differences.

    h <- h + c g s v    at about five middle blocks or a single one, all positions.

Legend: n harmful, m harmless prompts, k = min(n, m) pairs, H hidden size.

    D (k, H)   rows harmful - harmless, the pairs drawn at random by the seed
    v          first right singular vector of D, |v| = 1, its largest entry positive
    s          the sign that leads from harmful to harmless in most pairs (half and half: that of
               the means)
    g          |(mean harmless - mean harmful) . v|, the target's own gap along v, so c = 1 moves
               one group's mean to the other's along v

Source: Zou et al., "Representation Engineering: A Top-Down Approach to AI Transparency", 2023;
written from the description. Its PCA centres the differences, which, were the pairs not given in
random order of harmful and harmless, would take out the mean difference, the very thing looked for;
so D is not centred here (which is the same as centring D together with -D). The sources use a fixed
length (4.0 on 7B models), which means nothing on a model whose space was stretched; hence g. Each
block adds its push to what the blocks below have added, so with k blocks the strengths of use are
about k times smaller than for a push at one block. The sources choose the blocks by hand; here the
attacker tries the five, and single ones over the whole depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from es2fast.attacks.states.pushes import PushAttack, PushSettings, Strength

DEPTHS = (0.5, 0.7)  # relative depths between which blocks are pushed
BLOCKS = 5  # at most, spread evenly


class RepESettings(PushSettings):
    strengths: list[Strength] = Field(
        [0.125, 0.25, 0.5, 1.0, 2.0],
        min_length=1,
        description="what the attacker tries, in units of the target's own gap along the direction",
    )
    blocks: list[Literal["all", "middle", "single"]] = Field(
        ["all", "single"],
        min_length=1,
        description="as for every push, but that all are about five in the middle unless `layers` "
        "names them",
    )
    positions: Literal["last", "all"] = Field(
        "all", description="positions of each pass that are pushed"
    )


@dataclass(frozen=True)
class Direction:
    """vector (H,) fp32, of length 1, from harmful to harmless; gap: of the means along it."""

    vector: Tensor
    gap: float


def direction(harmful: Tensor, harmless: Tensor, seed: int = 0) -> Direction:
    """s v and g of the module's formula: states (n, H), (m, H)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [group.detach().cpu().double() for group in (harmful, harmless)]
    pairs = min(map(len, rows))
    a, b = (group[torch.randperm(len(group), generator=generator)[:pairs]] for group in rows)
    vector = torch.linalg.svd(a - b, full_matrices=False).Vh[0]
    vector = vector * vector[vector.abs().argmax()].sign()
    along = float((rows[1].mean(0) - rows[0].mean(0)) @ vector)
    votes = int(((b - a) @ vector).sign().sum())
    sign = math.copysign(1.0, votes or along)
    return Direction((sign * vector).float(), abs(along))


def middle_blocks(depth: int) -> list[int]:
    """At most `BLOCKS` blocks whose outputs lie at relative depths `DEPTHS`; at least one."""
    low, high = DEPTHS
    found = [i for i in range(depth) if low <= (i + 1) / depth <= high]
    found = found or [max(round(sum(DEPTHS) / 2 * depth) - 1, 0)]
    count = min(len(found), BLOCKS)
    return [found[i * (len(found) - 1) // max(count - 1, 1)] for i in range(count)]


class RepE(PushAttack):
    """Adds c g s v, at all positions of about five middle blocks or of a single one."""

    name = "repe"
    Settings = RepESettings
    settings: RepESettings

    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """One direction per block that may be pushed; both have every block of the model."""
        wanted = self.settings.layers or harmful
        self.directions: dict[int, Direction] = {
            i: direction(harmful[i], harmless[i], self.seed) for i in sorted(set(wanted))
        }

    def usable(self) -> list[int]:
        return list(self.directions)

    def together(self, depth: int) -> list[int]:
        return self.allowed() if self.settings.layers else middle_blocks(depth)

    def push(self, layer: int, states: Tensor) -> Tensor:
        found = self.directions[layer]
        return (self.strength * found.gap * found.vector.to(states.device)).expand_as(states)
