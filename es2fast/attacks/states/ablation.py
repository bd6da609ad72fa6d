"""Ablation of the refusal direction at every position of every block.

    zero     h <- h - r̂ (r̂ᵀh)                              (Arditi et al. 2024)
    affine   h <- h - r̂ (r̂ᵀh) + r̂ (r̂ᵀ mean_harmless)       (ACE, arXiv 2411.09003)

The direction r̂ is a mean difference of training prompts (`directions`). The edit is applied to the
residual stream wherever it is read or written: the input of every block and the output of the last,
and what attention and MLP add to it.

The mean of the affine form is that of *the tensor which is edited*, over all tokens of harmless
prompts. The mean of the one block and position at which r̂ was found, put in everywhere, is far from
what other blocks and positions ever see: on the toy it turns every answer into "sure sure sure",
where the tensors' own means make 12 of 12 useful (zero form: 1 of 12). It is the stream that is to
carry this component, so it is set at the blocks' inputs and the last output, and what the sublayers
add along r̂ is removed as in the zero form; to add the mean there as well would sum up within a
block. So after either form nothing in the model sees more of h along r̂ than a constant.

Against a defence that moves harmful prompts along few directions (the shift of ES2 has an effective
rank of about 1) this is an attack whatever the distance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from es2fast.attacks.base import Answer, Attack, Cost, OneOrSeveral, Target
from es2fast.attacks.states.directions import (
    Choice,
    Direction,
    DirectionSettings,
    Edit,
    choose_direction,
    search_cost,
)
from es2fast.data import Prompt
from es2fast.modeling.sublayers import added
from es2fast.modeling.taps import blocks, hidden_of, hooks, with_hidden


class AblationSettings(DirectionSettings):
    form: Annotated[list[Literal["affine", "zero"]], OneOrSeveral] = Field(
        ["affine", "zero"],
        min_length=1,
        description="one or several: the component is set to the harmless prompts' mean, or to "
        "zero; of both the attacker takes the one that makes more training prompts come out useful",
    )


class Ablation(Attack):
    """Takes the refusal direction out of every state while the model answers."""

    name = "ablation"
    Settings = AblationSettings
    settings: AblationSettings

    def __init__(self, settings: AblationSettings | None = None):
        super().__init__(settings or AblationSettings())
        self.choice: Choice | None = None

    def cost(self, target: Target, prompts: int) -> Cost:
        search = search_cost(target, self.settings, len(self.settings.form))
        return search._replace(answers=prompts)

    def prepare(self, target: Target) -> None:
        edits: dict[str, Edit] = {form: partial(_edit, form=form) for form in self.settings.form}
        self.choice = choose_direction(target, self.label, self.settings, edits)

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        with self.applied(target.model):
            return [[Answer(text)] for text in target.generate(prompts)]

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        assert self.choice is not None, "prepare() comes first"
        return _edit(model, self.choice.direction, self.choice.form)

    def summary(self) -> dict[str, Any]:
        return self.choice.summary() if self.choice else {}


def _edit(model: nn.Module, direction: Direction, form: str) -> AbstractContextManager[None]:
    return ablated(model, direction.unit, direction.levels if form == "affine" else None)


def without(hidden: Tensor, unit: Tensor, level: float = 0.0) -> Tensor:
    """`hidden` (..., H) with its component along `unit` (H,) set to `level`; at least in fp32."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    unit = unit.to(wide)
    return (wide + (level - wide @ unit)[..., None] * unit).to(hidden.dtype)


@contextmanager
def ablated(
    model: nn.Module, unit: Tensor, levels: Sequence[float] | None = None
) -> Iterator[None]:
    """Keeps the residual stream's component along `unit` fixed while the context lasts.

    Args:
        model: a causal language model, possibly wrapped by peft.
        unit: (H,) of length 1.
        levels: the component that is left at the input of every block and the output of the last;
            default: zero.

    Raises:
        UserError: the model's attention or MLP cannot be found.
    """
    every = list(blocks(model))
    parts = [part for block in every for part in added(block)]
    unit = unit.to(next(model.parameters()).device)
    levels = levels or [0.0] * (len(every) + 1)
    handles = [
        block.register_forward_pre_hook(_on_input(unit, level), with_kwargs=True)
        for block, level in zip(every, levels)
    ]
    handles += [part.register_forward_hook(_on_output(unit, 0.0)) for part in parts]
    handles.append(every[-1].register_forward_hook(_on_output(unit, levels[-1])))
    with hooks(handles):
        yield


def _on_input(unit: Tensor, level: float) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (without(args[0], unit, level), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": without(kwargs["hidden_states"], unit, level)}

    return hook


def _on_output(unit: Tensor, level: float) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return with_hidden(output, without(hidden_of(output), unit, level))

    return hook
