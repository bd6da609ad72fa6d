"""Attacks on the hidden states of a model, by name.

To add one: a module with a subclass of `Attack`, and a line in `ATTACKS`.
"""

from __future__ import annotations

from collections.abc import Callable

from es2fast.attacks.direct import Direct
from es2fast.attacks.states.mean_difference import MeanDifference
from es2fast.attacks.states.pushes import Attack, Pushes
from es2fast.attacks.states.scav import Scav
from es2fast.config import EvaluateConfig
from es2fast.errors import UserError

__all__ = ["ATTACKS", "Attack", "Direct", "MeanDifference", "Pushes", "Scav", "make_attack"]

ATTACKS: dict[str, Callable[[EvaluateConfig], Attack]] = {
    "direct": lambda config: Direct(),
    "scav": lambda config: Scav(p0=config.scav_p0, p1=config.scav_p1, steps=config.attack_steps),
    "mean_difference": lambda config: MeanDifference(steps=config.attack_steps),
}


def make_attack(name: str, config: EvaluateConfig) -> Attack:
    """A fresh, unfitted attack.

    Raises:
        UserError: unknown name.
    """
    if name not in ATTACKS:
        raise UserError(f"evaluate.attacks: no attack {name!r}; there are {', '.join(ATTACKS)}")
    return ATTACKS[name](config)
