"""Sampling: the plain question, answered several times at several temperatures; any of them counts.

A greedy answer is the likeliest beginning and what follows from it. A model that was taught one
first token refuses greedily and may answer a draw in ten, and whoever asks may draw as often as
they like, so the rate belongs to its k: `samples` times the variants, with k in the report.

Source: decoding parameters as an attack, Huang et al., "Catastrophic Jailbreak of Open-source LLMs
via Exploiting Generation", ICLR 2024, and as a measure of shallow alignment, Qi et al. 2025,
"Safety Alignment Should Be Made More Than Just a Few Tokens Deep".
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Annotated

from pydantic import Field

from es2fast.attacks.base import Answer, Attack, AttackSettings, Cost, Target
from es2fast.data import Prompt

Temperature = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class SamplingSettings(AttackSettings):
    samples: int = Field(4, ge=1, description="answers per temperature and top_p")
    temperatures: list[Temperature] = Field([0.7, 1.0], min_length=1)
    top_p: list[Share] = Field(
        [1.0], min_length=1, description="shares of the distribution that are drawn from"
    )


class Sampling(Attack):
    """Asks, and draws the answers."""

    name = "sampling"
    Settings = SamplingSettings
    settings: SamplingSettings

    def cost(self, target: Target, prompts: int) -> Cost:
        return Cost(prompts * len(self._draws()))

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        rows = [target.formatter.prompt_ids(prompt) for prompt in prompts]
        found: list[list[Answer]] = [[] for _ in prompts]
        for number, (temperature, top_p, _) in enumerate(self._draws()):
            texts = target.generate_rows(
                rows, temperature=temperature, top_p=top_p, seed=1000 * target.seed + number
            )
            parameters = {"temperature": temperature, "top_p": top_p}
            for answers, text in zip(found, texts):
                answers.append(Answer(text, parameters, sample=number))
        return found

    def _draws(self) -> list[tuple[float, float, int]]:
        settings = self.settings
        return list(product(settings.temperatures, settings.top_p, range(settings.samples)))
