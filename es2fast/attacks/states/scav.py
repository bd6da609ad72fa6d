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

from torch import Tensor

from es2fast.attacks.states.pushes import Attack
from es2fast.probing.probes import Probe, fit_probe


class Scav(Attack):
    """SCAV with target probability `p0` at layers whose probe accuracy exceeds `p1`."""

    name = "scav"

    def __init__(self, *, p0: float = 1e-4, p1: float = 0.9, steps: str = "all") -> None:
        self.p0, self.p1, self.steps = p0, p1, steps
        self.probes: dict[int, Probe] = {}

    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """One probe per layer."""
        self.probes = {i: fit_probe(harmful[i], harmless[i]) for i in sorted(harmful)}

    def layers(self) -> list[int]:
        return [i for i, probe in self.probes.items() if probe.accuracy > self.p1]

    def push(self, layer: int, states: Tensor) -> Tensor:
        probe = self.probes[layer]
        weight = probe.weight.to(states.device)
        eps = probe.steps_to(states, self.p0).clamp_max(0.0)  # 0 where P(e) <= P0
        return eps[:, None] * weight / weight.norm()
