"""Who plays the base model during training.

`adapters_off`: with LoRA the student without its adapters *is* the base model: no extra memory.
`twin`: a frozen copy that lives in the same engine, for every other choice of trainable parameters.
Below ZeRO-3 only of what trains: the rest of the student is the base model's own. Under ZeRO-3 it
is whole (2 bytes per parameter, divided by the ranks), since its hooks want every module once.
`cache`, `moments`: nobody; what the base model says was written to disk before the training.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.config import TrainConfig
from es2fast.distributed.zero import gathered
from es2fast.errors import UserError
from es2fast.modeling.head import Borrow, LendingHead, lm_head_of
from es2fast.modeling.taps import backbone, blocks, causal_lm
from es2fast.ops.moments.cache import TeacherMoments, half_head
from es2fast.ops.moments.op import teacher_moments

ALL_LINEAR = "all-linear"
ANCHORS = 16  # likeliest tokens that the moments keep apart


def resolve_teacher(train: TrainConfig) -> str:
    """`adapters_off`, `twin`, `cache` or `moments`: `train.teacher` with `auto` resolved."""
    if train.teacher != "auto":
        return train.teacher
    return "adapters_off" if train.trainable == "lora" else "twin"


def head_is_shared(train: TrainConfig) -> bool:
    """The student's LM head is the base model's: it is frozen, or LoRA leaves it alone."""
    return train.trainable != "all"


def set_trainable(
    model: nn.Module, train: TrainConfig, deepest: int, revision: str | None = None
) -> nn.Module:
    """Chooses what trains; returns the model, wrapped by peft for `lora`.

    Args:
        model: a causal language model.
        train: `trainable` and, for LoRA, `lora`.
        deepest: the deepest separated block; `blocks` and `lora` train blocks 0..deepest, or with
            `trainable_blocks: all` every block.
        revision: of the model's Hugging Face id; an adapter remembers what it belongs on.
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
    return _with_lora(model, train, deepest, revision)


def _with_lora(
    model: nn.Module, train: TrainConfig, deepest: int, revision: str | None
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    from es2fast.modeling.lora import fuse_adapters

    targets = train.lora.targets
    named = isinstance(targets, list)
    lora = LoraConfig(
        r=train.lora.r,
        lora_alpha=train.lora.alpha,
        lora_dropout=train.lora.dropout,
        target_modules=targets if named else _linear_modules(model, deepest, str(targets)),
        layers_to_transform=list(range(deepest + 1)) if named else None,
        task_type="CAUSAL_LM",
    )
    try:  # in the weights' precision, as DeepSpeed makes them at stages 1 and 2
        student = get_peft_model(model, lora, revision=revision, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(f"train.lora.targets: {error}") from None
    fuse_adapters(student)
    return student


def _linear_modules(model: nn.Module, deepest: int, pattern: str = ALL_LINEAR) -> list[str]:
    """Full names of the linear layers inside blocks 0..deepest, all or those that a regular
    expression fits; without the routers that are one (Llama 4, Phi MoE), of another output.

    Raises:
        UserError: it fits none.
    """
    wanted = {
        id(module)
        for block in blocks(model)[: deepest + 1]
        for module in block.modules()
        if isinstance(module, nn.Linear) and "Router" not in type(module).__name__
    }
    names = [name for name, module in model.named_modules() if id(module) in wanted]
    if pattern == ALL_LINEAR:
        return names
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        raise UserError(
            f"train.lora.targets: {pattern!r} fits no linear layer of blocks 0..{deepest}, which "
            f"are named as {names[0]!r}"
        )
    return found


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
        with evaluating(teacher):
            return backbone(teacher)(**inputs).last_hidden_state
    with evaluating(student), _adapters_off(student):
        return backbone(student)(**inputs).last_hidden_state


def make_twin(student: nn.Module) -> nn.Module:
    """A copy of a student that has not been trained yet; it shares the modules that will not be.

    Args:
        student: with its trainable parameters chosen, none of them partitioned.
    """
    shared = {
        id(module): module
        for module in student.modules()
        if (weights := list(module.parameters())) and not any(w.requires_grad for w in weights)
    }
    return freeze(copy.deepcopy(student, dict(shared)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode while this lasts, then each of its modules in the mode it had: a twin
    shares some with the student."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode


def freeze(teacher: nn.Module) -> nn.Module:
    """A twin that never trains: no gradients, no dropout."""
    causal_lm(teacher).requires_grad_(False)
    return teacher.eval()


@dataclass(frozen=True)
class MomentOptions:
    """What the moments of a teacher hold for: temperature and logit scale of the KL."""

    temperature: float
    logit_scale: float
    top_k: int = ANCHORS


@torch.no_grad()
def teacher_tokens(
    model: nn.Module, index: Tensor, moments: MomentOptions | None = None, **inputs: Any
) -> Tensor | TeacherMoments:
    """What a cache keeps of the base model at some tokens.

    Args:
        model: the base model.
        index: (N,) positions in the flattened (B, T) tokens.
        moments: reduce the teacher to moments; a bf16 head is taken in fp16.
        inputs: keyword arguments of the backbone.

    Returns:
        final hidden states (N, H), or the moments of N tokens.

    Raises:
        UserError: a bf16 head with an entry beyond fp16's range.
    """
    hidden = backbone(model)(**inputs).last_hidden_state.flatten(0, 1)[index]
    if moments is None:
        return hidden
    made: list[TeacherMoments] = []

    def reduce(weight: Tensor, bias: Tensor | None) -> None:
        try:
            head = half_head(weight).weight if weight.dtype == torch.bfloat16 else weight
        except ValueError as error:
            raise UserError(f"train.teacher: moments: {error}; use teacher=cache") from None
        made.append(
            teacher_moments(
                hidden,
                head,
                bias=bias,
                temperature=moments.temperature,
                logit_scale=moments.logit_scale,
                top_k=moments.top_k,
            )
        )

    with _lending(lm_head_of(model)) as head:
        head(Borrow(reduce))
    return made[0]


@contextmanager
def _lending(head: nn.Linear) -> Iterator[nn.Module]:
    """The head, whose forward lends its weight while this lasts."""
    own = head.forward
    head.forward = LendingHead(head)  # type: ignore[method-assign,assignment]
    try:
        yield head
    finally:
        head.forward = own  # type: ignore[method-assign]


def frozen_head(model: nn.Module) -> nn.Linear:
    """A copy of the LM head that never trains, whole on every rank; call on every rank."""
    head = lm_head_of(model)
    with gathered(list(head.parameters())):
        weight = head.weight.detach().clone()
        bias = None if head.bias is None else head.bias.detach().clone()
    frozen = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    frozen.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        frozen.bias = nn.Parameter(bias, requires_grad=False)
    return frozen
