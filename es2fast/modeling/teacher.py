"""Who plays the base model during training.

`adapters_off`: with LoRA the student without its adapters *is* the base model: no extra memory.
`twin`: a frozen copy that lives in the same engine (2 bytes per parameter, divided by the ranks
under ZeRO-3), for every other choice of trainable parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.config import TrainConfig
from es2fast.errors import UserError
from es2fast.modeling.taps import backbone, blocks, causal_lm


def resolve_teacher(train: TrainConfig) -> str:
    """`adapters_off` or `twin`, with `auto` resolved."""
    if train.teacher != "auto":
        return train.teacher
    return "adapters_off" if train.trainable == "lora" else "twin"


def head_is_shared(train: TrainConfig) -> bool:
    """The student's LM head is the base model's: it is frozen, or LoRA leaves it alone."""
    return train.trainable != "all"


def set_trainable(model: nn.Module, train: TrainConfig, deepest: int) -> nn.Module:
    """Chooses what trains; returns the model, wrapped by peft for `lora`.

    Args:
        model: a causal language model.
        train: `trainable` and, for LoRA, `lora`.
        deepest: the deepest separated block; `blocks` and `lora` train blocks 0..deepest, or with
            `trainable_blocks: all` every block.
    """
    if train.trainable == "all":
        return model.requires_grad_(True)
    if train.trainable_blocks == "all":
        deepest = len(blocks(model)) - 1
    if train.trainable == "blocks":
        model.requires_grad_(False)
        for block in blocks(model)[: deepest + 1]:
            block.requires_grad_(True)
        return model
    return _with_lora(model, train, deepest)


def _with_lora(model: nn.Module, train: TrainConfig, deepest: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    everywhere = train.lora.targets == "all-linear"
    lora = LoraConfig(
        r=train.lora.r,
        lora_alpha=train.lora.alpha,
        lora_dropout=train.lora.dropout,
        target_modules=_linear_modules(model, deepest) if everywhere else train.lora.targets,
        layers_to_transform=None if everywhere else list(range(deepest + 1)),
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"train.lora.targets: {error}") from None


def _linear_modules(model: nn.Module, deepest: int) -> list[str]:
    """Full names of the linear layers inside blocks 0..deepest."""
    wanted = {
        id(module)
        for block in blocks(model)[: deepest + 1]
        for module in block.modules()
        if isinstance(module, nn.Linear)
    }
    return [name for name, module in model.named_modules() if id(module) in wanted]


@contextmanager
def _adapters_off(student: nn.Module) -> Iterator[None]:
    with student.disable_adapter():  # type: ignore[operator]
        yield


@torch.no_grad()
def teacher_hidden(student: nn.Module, teacher: nn.Module | None, inputs: dict[str, Any]) -> Tensor:
    """The base model's final hidden states, (B, T, H), without gradient.

    Args:
        student: used with its adapters off when there is no twin.
        teacher: the frozen twin, or None.
        inputs: keyword arguments of the backbone.
    """
    if teacher is not None:
        return backbone(teacher)(**inputs).last_hidden_state
    with _adapters_off(student):
        return backbone(student)(**inputs).last_hidden_state


def freeze(teacher: nn.Module) -> nn.Module:
    """A twin that never trains: no gradients, no dropout."""
    causal_lm(teacher).requires_grad_(False)
    return teacher.eval()
