"""SCAV: the smallest push along the probe's normal that makes a state look harmless.

Per layer a logistic probe P(e) = sigmoid(w . e + b), label 1 = harmful. Where the probe's held-out
accuracy exceeds P1 and P(e) > P0,

    e <- e + eps * w / |w|,   eps = (logit(P0) - b - w . e) / |w|,

after which P(e) = P0 exactly. Layers ascend, last position only.

Source: Xu et al., "Uncovering Safety Risks of Large Language Models through Concept Activation
Vector", NeurIPS 2024; written from the formula. On models as small as the toy, pushing at every
decoding step breaks the text (the probe was fitted on prompt states), hence `steps`.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from es2fast.attacks.states.pushes import PushAttack, PushSettings
from es2fast.probing.probes import Probe, fit_probe


class ScavSettings(PushSettings):
    p0: float = Field(1e-4, gt=0, lt=0.5, description="probability the push aims at")
    p1: float = Field(0.9, ge=0.5, lt=1, description="probe accuracy a layer must exceed")


class Scav(PushAttack):
    """SCAV with target probability `p0` at layers whose probe accuracy exceeds `p1`."""

    name = "scav"
    Settings = ScavSettings
    settings: ScavSettings

    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """One probe per layer."""
        self.probes: dict[int, Probe] = {
            i: fit_probe(harmful[i], harmless[i]) for i in sorted(harmful)
        }

    def layers(self) -> list[int]:
        return [i for i, probe in self.probes.items() if probe.accuracy > self.settings.p1]

    def push(self, layer: int, states: Tensor) -> Tensor:
        probe = self.probes[layer]
        weight = probe.weight.to(states.device)
        eps = probe.steps_to(states, self.settings.p0).clamp_max(0.0)  # 0 where P(e) <= P0
        return eps[:, None] * weight / weight.norm()
