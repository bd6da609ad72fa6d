"""Orthogonalisation: the refusal direction taken out of the weights.

    W <- W - r̂ r̂ᵀ W

for every matrix that writes to the residual stream: embeddings, attention output, MLP output, with
their biases and adapters. Nothing in the model can then write along r̂, which is `ablation` with the
zero form, done once; the result is an ordinary model, the way "abliterated" models are made and
passed on. The direction is searched with the zero form on the activations.

The edited tensors stand in for the original parameters while the model answers (about a third of
the model's memory more), and the very same parameters are put back. Where the LM head is tied to
the embedding, only the embedding is edited: the head reads the stream.

Where a family normalises what a sublayer adds (Gemma), the norm's weights turn the direction, and
some of it comes back; `component_left` in the summary is the largest share |r̂ᵀh| / |h| at a block's
output on training prompts.

Source: Arditi et al., "Refusal in Language Models Is Mediated by a Single Direction", 2024, section
4; written from the formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from es2fast.attacks.base import Answer, Attack, Cost, Target
from es2fast.attacks.states.ablation import ablated
from es2fast.attacks.states.directions import (
    Choice,
    DirectionSettings,
    choose_direction,
    search_cost,
)
from es2fast.data import Prompt
from es2fast.errors import UserError
from es2fast.modeling.states import last_token_states
from es2fast.modeling.sublayers import embeddings, fused, sublayers, writers
from es2fast.modeling.taps import blocks, causal_lm
from es2fast.run.export import save_model

Written = tuple[nn.Module, str, int]  # owner, parameter, axis of H
CHECKED = 8  # prompts on which the component that is left is measured


class AblationWeightsSettings(DirectionSettings):
    save: str | None = Field(
        None,
        description="folder for the orthogonalised model; with several models under attack, each "
        "gets a folder of its name in it. Written when the attack is prepared",
    )


class AblationWeights(Attack):
    """Answers with weights that cannot write along the refusal direction."""

    name = "ablation_weights"
    Settings = AblationWeightsSettings
    settings: AblationWeightsSettings

    def __init__(self, settings: AblationWeightsSettings | None = None):
        super().__init__(settings or AblationWeightsSettings())
        self.choice: Choice | None = None
        self.component_left: float | None = None

    def cost(self, target: Target, prompts: int) -> Cost:
        search = search_cost(target, self.settings)
        return search._replace(answers=prompts)

    def prepare(self, target: Target) -> None:
        """Chooses the direction; raises UserError when a matrix cannot be found or changed."""
        written_by(target.model)  # what cannot be done is said before the search
        if self.settings.save is not None and _is_adapter(target.model):
            raise UserError(
                "evaluate.attacks: ablation_weights.save: the model is an adapter on its base "
                "model; merge it first (es2fast export --merge) and evaluate the result"
            )
        self.choice = choose_direction(
            target, self.label, self.settings, {"zero": lambda model, r: ablated(model, r.unit)}
        )
        with orthogonalised(target.model, self.choice.direction.unit):
            self.component_left = self._left(target, self.choice.direction.unit)
            if self.settings.save is not None:
                folder = Path(self.settings.save) / target.name
                with _untied(target.model):
                    save_model(target.model, target.formatter.tokenizer, folder, main=True)

    @staticmethod
    def _left(target: Target, unit: Tensor) -> float:
        batches = target.formatter.prompt_batches(target.harmful[:CHECKED], CHECKED)
        states = last_token_states(target.model, batches, range(target.depth))
        return max(((h @ unit).abs() / h.norm(dim=-1)).max().item() for h in states.values())

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        with self.applied(target.model):
            return [[Answer(text)] for text in target.generate(prompts)]

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        assert self.choice is not None, "prepare() comes first"
        return orthogonalised(model, self.choice.direction.unit)

    def summary(self) -> dict[str, Any]:
        found = self.choice.summary() if self.choice else {}
        return found | {"component_left": self.component_left}


def _is_adapter(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)


def written_by(model: nn.Module) -> list[Written]:
    """Every parameter that writes to the residual stream.

    Raises:
        UserError: they cannot be found, or are not plain (quantised, DoRA, an adapter on the
            embedding).
    """
    _check_embedding(model)
    found: list[Written] = [(table, "weight", -1) for table in embeddings(model)]
    for block in blocks(model):
        for part in sublayers(block):
            for module in writers(part):
                found += _tensors(module)
    return found


@contextmanager
def orthogonalised(model: nn.Module, unit: Tensor) -> Iterator[None]:
    """Weights without any output along `unit`, (H,) of length 1, while the context lasts.

    Raises:
        UserError: as `written_by`.
    """
    edits = written_by(model)
    before = [(module, name, module._parameters[name]) for module, name, _ in edits]
    try:
        for module, name, axis in edits:
            new = _projected(getattr(module, name).detach(), unit, axis)
            module._parameters[name] = nn.Parameter(new, requires_grad=False)
        yield
    finally:
        for module, name, parameter in before:
            module._parameters[name] = parameter


def _projected(weight: Tensor, unit: Tensor, axis: int) -> Tensor:
    """`weight` without its component along `unit`, which lies along `axis`; at least in fp32."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32)).movedim(axis, -1)
    unit = unit.to(wide)
    return (wide - (wide @ unit)[..., None] * unit).movedim(-1, axis).to(weight.dtype).contiguous()


def _tensors(module: nn.Module) -> list[Written]:
    """All that makes up one writer's output."""
    experts = fused(module)
    if experts is not None:
        transposed = getattr(module, "is_transposed", False)  # (E, I, H)
        names = [("down_proj", -1 if transposed else 1), ("down_proj_bias", -1)]
        return [(module, name, axis) for name, axis in names if name in module._parameters]
    if getattr(module, "lora_magnitude_vector", None):
        raise UserError(
            "model: a DoRA adapter cannot be orthogonalised; merge it (es2fast export --merge)"
        )
    base = getattr(module, "base_layer", module)
    parts = [base, *getattr(module, "lora_B", {}).values()]
    found: list[Written] = []
    for part in parts:
        weight = part._parameters.get("weight")
        if weight is None or not weight.is_floating_point() or weight.dim() != 2:
            raise UserError(
                f"model: the weight of a {type(part).__name__} is quantised or not a matrix; use "
                "the attack `ablation`, which leaves weights alone"
            )
        transposed = type(part).__name__ == "Conv1D"  # (in, out), as GPT-2 has it
        found.append((part, "weight", 1 if transposed else 0))
        if part._parameters.get("bias") is not None:
            found.append((part, "bias", -1))
    return found


def _check_embedding(model: nn.Module) -> None:
    table = causal_lm(model).get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise UserError(
            f"model: the embedding is a {type(table).__name__}, not a plain table; merge the "
            "adapter (es2fast export --merge)"
        )


@contextmanager
def _untied(model: nn.Module) -> Iterator[None]:
    """Lets a model be saved whose tied weights differ now."""
    config = causal_lm(model).config
    parts = list({id(part): part for part in (config, config.get_text_config())}.values())
    before = [getattr(part, "tie_word_embeddings", False) for part in parts]
    tied = getattr(model, "all_tied_weights_keys", None)
    try:
        for part in parts:
            part.tie_word_embeddings = False
        if tied is not None:
            model.all_tied_weights_keys = {}  # type: ignore[assignment]
        yield
    finally:
        for part, value in zip(parts, before):
            part.tie_word_embeddings = value
        if tied is not None:
            model.all_tied_weights_keys = tied
