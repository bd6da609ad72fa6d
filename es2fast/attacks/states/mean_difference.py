"""Mean difference: move a state by the difference of the group means.

    e <- e + (mean harmless - mean harmful)    at chosen layers, last position only.

The attack a rank-1 defence cannot survive: shifting all harmful states along one direction beats
a push of fixed size, and this push undoes exactly that shift. The means are those of the model
under attack.

The difference at one block already holds what the blocks below contributed, so one block is enough,
and which one is the attacker's choice: it tries them on a few training prompts. On the toy any
block from the first one that separates the groups does as well as all of them together.
"""

from __future__ import annotations

from torch import Tensor

from es2fast.attacks.states.pushes import PushAttack


class MeanDifference(PushAttack):
    """Adds mean_B - mean_A at the blocks `at` (default: every fitted block)."""

    name = "mean_difference"

    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """Differences of the means, layer -> (H,)."""
        self.shift: dict[int, Tensor] = {
            i: harmless[i].float().mean(0) - harmful[i].float().mean(0) for i in sorted(harmful)
        }

    def candidates(self) -> list[int]:
        return sorted(self.shift)

    def layers(self) -> list[int]:
        return [i for i in self.shift if self.at is None or i in self.at]

    def push(self, layer: int, states: Tensor) -> Tensor:
        return self.shift[layer].to(states.device).expand_as(states)
