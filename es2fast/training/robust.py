"""A simulated attack during training: the separation is demanded after it.

In a share of the steps the harmful states are pushed as the evaluation's attack would push them,
e <- e + push(e), at the last prompt token of the separated blocks' outputs, inside the student's
forward. It enters there, and not in the loss alone, because an attacker's push is carried on by the
blocks above: what is tapped at the next separated block has read the pushed state, and the loss
there asks the blocks between to take the harmful prompt away again. The push is a constant of the
step, so the gradient is that of the pushed states.

The attack is fitted on states of recent clean steps, of all ranks, every few steps: SCAV pushes at
every separated block (where its probe is accurate enough), the mean difference at one of them,
drawn per step, as the real attacker picks one. Whether a step is attacked, and at which block, is a
function of (seed, step), so it is the same on all ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from es2fast.attacks.registry import make_attack
from es2fast.attacks.states.pushes import PushAttack
from es2fast.config import Config
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.taps import Push


class SimulatedAttack:
    """Decides, per step, whether and how the harmful states are pushed.

    Args:
        config: `separation.robust` and the seed.
        layers: the separated blocks.
        runtime: ranks that share the states.
    """

    def __init__(self, config: Config, layers: Sequence[int], runtime: Runtime):
        self._settings = config.separation.robust
        self._config = config
        self._layers = list(layers)
        self._runtime = runtime
        self._attack: PushAttack | None = None
        self._fitted = 0
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def for_step(self, step: int) -> Push | None:
        """The push of optimizer step `step`, or None for a clean one; call on every rank."""
        if not self._settings.probability:
            return None
        draw = random.Random(f"{self._config.train.seed}/robust/{step}")
        attacked = draw.random() < self._settings.probability
        layer = draw.choice(self._layers)
        if not attacked or not self._kept:
            return None
        if self._attack is None or step - self._fitted >= self._settings.refit_every:
            self._attack, self._fitted = self._fit(), step
        attack = self._attack
        if attack.one_block:
            attack.at = [layer]
        return lambda i, states: attack.push(i, states) if i in attack.layers() else states * 0.0

    def observe(self, outputs: dict[int, Tensor], num_harmful: int) -> None:
        """Keeps the block outputs (layer -> (n + m, H), harmful first) of a clean micro-batch."""
        if not self._settings.probability:
            return
        most = -(-self._settings.states // self._runtime.world_size)
        for layer, rows in outputs.items():
            new = (rows[:num_harmful].float().cpu(), rows[num_harmful:].float().cpu())
            old = self._kept.get(layer, (new[0][:0], new[1][:0]))
            a, b = (torch.cat(pair)[-most:] for pair in zip(old, new))
            self._kept[layer] = (a, b)

    def _fit(self) -> PushAttack:
        """Fitted on rank 0 and sent to the others, so that all ranks push alike."""
        groups: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for layer in self._layers:
            for group, rows in zip(groups, self._kept[layer]):
                if shards := self._runtime.gather_rows(rows):
                    group[layer] = torch.cat(shards)
        return self._runtime.on_main(self._fitted_to, *groups)

    def _fitted_to(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> PushAttack:
        attack = make_attack(self._settings.attack)
        assert isinstance(attack, PushAttack)
        attack.fit(harmful, harmless)
        return attack
