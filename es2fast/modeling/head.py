"""The fused KL inside `lm_head.forward`, and what each model family does to its logits.

Legend: N tokens, H hidden size, V vocabulary.

Under ZeRO-3 the LM head's weight exists only while its module runs, so the loss has to be computed
inside that module's forward: ZeRO's own hooks then gather and release it at the right moments.
`FusedHead` therefore replaces the *instance's* forward. Called with hidden states alone it still
returns logits; called with a `KLTask` it returns the KL divergence instead, and with a `CETask`
beside it (the refusal anchor) both losses of one call, as one tensor, so that ZeRO sees the module
run once per pass. A teacher with a head
of its own lends its weight by a nested call (`teacher_head(Borrow(...))`), so that both weights are
gathered at once without reading a parameter outside its module. A frozen head may also stay parted:
`sharded_head`.

Transforms of the logits (soft-cap, scale) are read from the model's config and then *checked*:
`parity_error` compares them with `model(...).logits`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.errors import UserError
from es2fast.modeling.taps import backbone, causal_lm
from es2fast.ops.linear_ce import linear_cross_entropy
from es2fast.ops.linear_kl.op import linear_kl_div
from es2fast.ops.moments.cache import TeacherMoments
from es2fast.ops.moments.op import moment_kl_div

_SOFTCAP_KEYS = ("final_logit_softcapping", "logits_soft_cap")
_MULTIPLY_KEYS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_MULTIPLIES_SCALING = ("hyperclovax",)  # multiplies by the key by which Granite divides


@dataclass(frozen=True)
class HeadTransform:
    """logits = softcap(logit_scale * (W h + b)), softcap(z) = c tanh(z / c).

    `keys` names the config entries the numbers came from.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    keys: tuple[str, ...] = ()

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


def read_transform(config: Any) -> HeadTransform:
    """The logit transform that a transformers config declares.

    Known keys: `final_logit_softcapping` (Gemma 2, 3, 4 ...), `logits_soft_cap` (RecurrentGemma),
    `logits_scaling` (Granite divides by it), `logit_scale` (Cohere multiplies), `output_multiplier`
    and `lm_head_multiplier` (Falcon-H1).
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale, softcap, keys = 1.0, None, []
    for key in _MULTIPLY_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, (int, float)) and value != 1.0:
            scale *= value
            keys.append(key)
    scaling = getattr(config, "logits_scaling", None)
    if isinstance(scaling, (int, float)) and scaling != 1.0:
        multiplies = str(getattr(config, "model_type", "")).startswith(_MULTIPLIES_SCALING)
        scale *= scaling if multiplies else 1.0 / scaling
        keys.append("logits_scaling")
    for key in _SOFTCAP_KEYS:
        value = getattr(config, key, None)
        if isinstance(value, (int, float)) and value:
            softcap = float(value)
            keys.append(key)
            break
    return HeadTransform(scale, softcap, tuple(keys))


@dataclass(frozen=True)
class KLTask:
    """What `FusedHead` computes in place of logits.

    teacher: (N, H) final hidden states of the base model, or its moments of N tokens.
    token_weights: (N,) fp32; tokens of weight zero are left out before the head.
    direction, temperature, beta: as `es2fast.linear_kl_div`.
    """

    teacher: Tensor | TeacherMoments
    token_weights: Tensor
    direction: str
    temperature: float
    beta: float = 0.5


@dataclass(frozen=True)
class CETask:
    """A cross-entropy that `FusedHead` computes beside the KL, in the same call.

    targets: (M,) int64, the next tokens of the last M hidden states.
    token_weights: (M,) fp32.
    counted: (M,) int64, where a target that is the likeliest token counts: 1, among the first kind
        of hits; 2, among the second; 0, nowhere.
    """

    targets: Tensor
    token_weights: Tensor
    counted: Tensor


def kl_options(task: KLTask, transform: HeadTransform) -> dict[str, Any]:
    """What the fused KL is told of a task, wherever the head lies."""
    return {
        "direction": task.direction,
        "beta": task.beta,
        "temperature": task.temperature,
        "logit_scale": transform.logit_scale,
        "softcap": transform.softcap,
        "token_weights": task.token_weights,
        "max_valid_tokens": task.token_weights.shape[0],  # none to drop, so none to count: no sync
        "reduction": "sum",
    }


def stacked_losses(kl: Tensor, loss: Tensor, hits: Tensor, task: CETask) -> Tensor:
    """(4,) KL, cross-entropy, hits of either kind, from those of each token, (M,) bool."""
    kinds = [(hits & (task.counted == kind)).sum().to(loss.dtype) for kind in (1, 2)]
    return torch.stack([kl, loss, *kinds])


@dataclass(frozen=True)
class Borrow:
    """For a `LendingHead`: runs `use(weight, bias)` inside the lending module's forward."""

    use: Callable[[Tensor, Tensor | None], None]


class FusedHead:
    """The forward of an LM head: logits for hidden states alone, the summed KL for a `KLTask`.

    Args:
        lm_head: the module that maps hidden states to logits.
        transform: what the model does to its logits afterwards.
        teacher_head: the base model's LM head when it is not this one.
    """

    def __init__(
        self, lm_head: nn.Linear, transform: HeadTransform, teacher_head: nn.Module | None = None
    ):
        self._module = lm_head
        self._logits = lm_head.forward
        self._transform = transform
        self._teacher_head = teacher_head

    def __call__(
        self, hidden: Tensor, task: KLTask | None = None, refusal: CETask | None = None
    ) -> Tensor:
        """Logits (..., V) of hidden (..., H); with a task for hidden (N, H) its KL, (); with both
        for hidden (N + M, H), KL rows first: (4,) KL, cross-entropy, hits of either kind."""
        if task is None:
            return self._logits(hidden)
        if refusal is None:
            return self._divergence(hidden, task)
        count = task.token_weights.shape[0]
        kl = self._divergence(hidden[:count], task)
        loss, hits = linear_cross_entropy(
            hidden[count:],
            self._module.weight,
            refusal.targets,
            refusal.token_weights,
            bias=getattr(self._module, "bias", None),
            logit_scale=self._transform.logit_scale,
            softcap=self._transform.softcap,
        )
        return stacked_losses(kl, loss, hits, refusal)

    def _divergence(self, hidden: Tensor, task: KLTask) -> Tensor:
        """The KL, with the teacher's own head where it has one."""
        if isinstance(task.teacher, TeacherMoments):
            return self._moment_kl(hidden, task.teacher, task.token_weights)
        if self._teacher_head is None:
            return self._kl(hidden, task, task.teacher, None, None)
        out: list[Tensor] = []
        target = task.teacher
        self._teacher_head(
            Borrow(lambda weight, bias: out.append(self._kl(hidden, task, target, weight, bias)))
        )
        return out[0]

    def _moment_kl(self, hidden: Tensor, moments: TeacherMoments, weights: Tensor) -> Tensor:
        """A bf16 head goes in as fp16, as it did when the moments were made: an eighth of the
        noise in the gradient, for a copy that lives as long as the call."""
        weight, bias = self._module.weight, getattr(self._module, "bias", None)
        return moment_kl_div(
            hidden,
            weight.half() if weight.dtype == torch.bfloat16 else weight,
            moments,
            bias=bias,
            token_weights=weights,
            max_valid_tokens=weights.shape[0],
            reduction="sum",
        )

    def _kl(
        self,
        hidden: Tensor,
        task: KLTask,
        target: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        return linear_kl_div(
            hidden,
            self._module.weight,
            target,
            weight,
            bias=getattr(self._module, "bias", None),
            teacher_bias=bias,
            **kl_options(task, self._transform),
        )


class LendingHead:
    """The forward of a frozen teacher's LM head: logits as usual, or its weight lent to a call."""

    def __init__(self, lm_head: nn.Linear):
        self._module = lm_head
        self._logits = lm_head.forward

    def __call__(self, hidden: Tensor | Borrow) -> Tensor | None:
        if not isinstance(hidden, Borrow):
            return self._logits(hidden)
        bias = getattr(self._module, "bias", None)
        hidden.use(self._module.weight.detach(), None if bias is None else bias.detach())
        return None


def lm_head_of(model: nn.Module) -> nn.Linear:
    """The linear layer that makes logits.

    Raises:
        UserError: the model has none, or peft has wrapped it.
    """
    head = causal_lm(model).get_output_embeddings()
    if head is None:
        raise UserError(
            f"model: {type(causal_lm(model)).__name__} has no LM head; use an AutoModelForCausalLM"
        )
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"model: the LM head is a {type(head).__name__}, not a plain linear layer; "
            "leave lm_head out of train.lora.targets"
        )
    return head


def install(model: nn.Module, teacher_head: nn.Linear | None) -> tuple[nn.Module, HeadTransform]:
    """Replaces `lm_head.forward` of the student (and of a teacher with its own head).

    Args:
        model: the student.
        teacher_head: the base model's; None where the two heads are equal and frozen, so that the
            student's serves both.

    Returns:
        the student's LM head module and its transform.
    """
    head = lm_head_of(model)
    transform = read_transform(causal_lm(model).config)
    if teacher_head is not None:
        lender = LendingHead(teacher_head)
        teacher_head.forward = lender  # type: ignore[method-assign,assignment]
    fused = FusedHead(head, transform, teacher_head)
    head.forward = fused  # type: ignore[method-assign,assignment]
    return head, transform


@torch.no_grad()
def parity_error(model: nn.Module, transform: HeadTransform, input_ids: Tensor) -> Tensor:
    """Largest |difference| between `model(...).logits` and the transform of W h + b.

    Args:
        model: a causal language model.
        transform: as read from its config.
        input_ids: (B, T).

    Returns:
        scalar fp32, relative to the largest |logit|.
    """
    inner = causal_lm(model)
    expected = inner(input_ids=input_ids, use_cache=False).logits.float()
    hidden = backbone(model)(input_ids=input_ids, use_cache=False).last_hidden_state
    found = transform(lm_head_of(model)(hidden).float())
    return (found - expected).abs().max() / expected.abs().max().clamp_min(1e-20)


def check_parity(error: float, dtype: torch.dtype, config: Any) -> None:
    """Refuses to train on logits that are not the model's own.

    Raises:
        UserError: names the config keys that were read and those that look like a logit transform.
    """
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    if error <= tolerance:
        return
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    used = read_transform(config).keys
    unread = [
        key
        for key, value in sorted(config.to_dict().items())
        if isinstance(value, (int, float))
        and key not in used
        and any(part in key for part in ("logit", "softcap", "soft_cap", "multiplier", "scaling"))
    ]
    raise UserError(
        f"model: logits of {config.model_type!r} differ from the fused head's by {error:.1e} "
        f"relative (config keys read: {', '.join(used) or 'none'}; unread candidates: "
        f"{', '.join(unread) or 'none'}); this model family is not supported yet"
    )


__all__ = [
    "Borrow",
    "CETask",
    "FusedHead",
    "HeadTransform",
    "KLTask",
    "check_parity",
    "install",
    "kl_options",
    "lm_head_of",
    "parity_error",
    "read_transform",
    "stacked_losses",
]
