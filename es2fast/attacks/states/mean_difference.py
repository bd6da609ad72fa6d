"""Mean difference: move a state by a multiple of the difference of the group means.

    e <- e + c (mean harmless - mean harmful)    at chosen layers; c = 1 puts mean onto mean.

The attack a rank-1 defence cannot survive: shifting all harmful states along one direction beats
a push of fixed size, and this push undoes exactly that shift. The means are those of the model
under attack.

The difference at one block already holds what the blocks below contributed, so one block is enough,
and which one is the attacker's choice, as is c. On the toy any block from the first one that
separates the groups does as well as all of them together.
"""

from __future__ import annotations

from torch import Tensor

from es2fast.attacks.states.pushes import PushAttack


class MeanDifference(PushAttack):
    """Adds c (mean_B - mean_A) at one block of those fitted."""

    name = "mean_difference"
    one_block = True

    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """Differences of the means, layer -> (H,)."""
        self.shift: dict[int, Tensor] = {
            i: harmless[i].float().mean(0) - harmful[i].float().mean(0) for i in sorted(harmful)
        }

    def usable(self) -> list[int]:
        return list(self.shift)

    def push(self, layer: int, states: Tensor) -> Tensor:
        return (self.strength * self.shift[layer].to(states.device)).expand_as(states)
