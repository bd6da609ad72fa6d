"""No attack: the harmful prompt as it is. The floor every other attack is compared with."""

from __future__ import annotations

from torch import Tensor

from es2fast.attacks.states.pushes import Attack


class Direct(Attack):
    """Pushes nothing."""

    name = "direct"

    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """Nothing to learn."""

    def layers(self) -> list[int]:
        return []

    def push(self, layer: int, states: Tensor) -> Tensor:
        return states.new_zeros(states.shape)
