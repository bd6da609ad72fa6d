"""No attack: the harmful prompt as it is. The floor every other attack is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from es2fast.attacks.base import Answer, Attack, Target
from es2fast.data import Prompt


class Direct(Attack):
    """Asks, and does nothing else."""

    name = "direct"

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        return [[Answer(text)] for text in target.generate(prompts)]
