"""SCAV: the smallest push along the probe's normal that makes a state look harmless.

Per layer a logistic probe P(e) = sigmoid(w . e + b), label 1 = harmful. Where the probe's held-out
accuracy exceeds P1 and P(e) > P0,

    e <- e + eps * w / |w|,   eps = (logit(P0) - b - w . e) / |w|,

after which P(e) = P0 exactly. Layers ascend, last position only.

Source: Xu et al., "Uncovering Safety Risks of Large Language Models through Concept Activation
Vector", NeurIPS 2024; written from the formula. There every accurate block is pushed at every
decoding step with P0 = 1e-4, along scikit-learn's probe with C = 1 on the states as they are
(`states: raw`). How far a P0 pushes is up to the probe: ours are fitted on states scaled to a root
mean square of 1, where the same C is a heavier penalty and the push is two to three times as long
(SmolLM2-135M, 140 prompts a group, P0 = 1e-4: 2.1 to 2.6 times the groups' gap, raw 0.8 to 1.1).
With ours at every block and step the text breaks on models of 0.5B and less even before any
defence, and stays readable where P0 is near 0.5; at a single block the longer push gets more. So P0
is swept, and the attacker may push fewer blocks (`blocks`) and only while the prompt is read
(`steps`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor

from es2fast.attacks.states.pushes import PushAttack, PushSettings
from es2fast.probing.probes import Probe, fit_probe

Probability = Annotated[float, Field(gt=0, lt=0.5)]


class ScavSettings(PushSettings):
    strengths: list[Probability] = Field(
        [0.3, 0.05, 1e-2, 1e-3, 1e-4, 1e-5],
        min_length=1,
        description="probabilities P0 the push may aim at; the attacker tries them",
    )
    blocks: list[Literal["all", "middle", "single"]] = Field(
        ["all", "middle", "single"],
        min_length=1,
        description="as for every push; of the blocks whose probe is accurate",
    )
    p0: Probability | None = Field(None, description="a single P0, short for strengths: [p0]")
    states: Literal["scaled", "raw"] = Field(
        "scaled",
        description="what the probes are fitted on: states of root mean square 1, or as they are "
        "(the paper's code), where the same p0 is a shorter push",
    )
    p1: float = Field(0.9, ge=0.5, lt=1, description="probe accuracy a layer must exceed")

    @model_validator(mode="after")
    def _p0_is_the_strength(self) -> ScavSettings:
        if self.p0 is not None and self.strengths != [self.p0]:
            if "strengths" in self.model_fields_set:
                raise ValueError(f"p0 {self.p0:g} beside strengths; give one of the two")
            self.strengths = [self.p0]
        return self


class Scav(PushAttack):
    """SCAV at layers whose probe accuracy exceeds `p1`; the strength is the target probability."""

    name = "scav"
    Settings = ScavSettings
    settings: ScavSettings
    usual = 1e-4

    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """One probe per layer."""
        self.probes: dict[int, Probe] = {
            i: fit_probe(harmful[i], harmless[i], scaled=self.settings.states == "scaled")
            for i in sorted(harmful)
        }

    @property
    def gentlest_strength(self) -> float:
        """The largest probability."""
        return max(self.settings.strengths)

    def _no_block(self) -> str:
        if self.usable():
            return super()._no_block()
        best = max(probe.accuracy for probe in self.probes.values())
        return (
            f"the best probe is right for {best:.0%} of the held-out states, and p1 asks for more "
            f"than {self.settings.p1:.0%}; give more training prompts, or a smaller p1"
        )

    def usable(self) -> list[int]:
        return [i for i, probe in self.probes.items() if probe.accuracy > self.settings.p1]

    def push(self, layer: int, states: Tensor) -> Tensor:
        probe = self.probes[layer]
        weight = probe.weight.to(states.device)
        eps = probe.steps_to(states, self.strength).clamp_max(0.0)  # 0 where P(e) <= P0
        return eps[:, None] * weight / weight.norm()
