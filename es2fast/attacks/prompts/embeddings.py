"""Batches of prompts with a slot of free embeddings: layout, target loss, answers from embeddings.

Legend: B rows, P prompt columns, L target columns, K columns of the slot, H hidden size, N target
tokens of all rows.

A batch is aligned at the border between prompt and target,

    [padding] before [slot] after | target [padding]
    0                             P                P + L

so the last prompt token of every row, the one whose state decides how the answer starts, stands in
column P - 1, the target is predicted at columns P - 1 ... P + L - 2, and generation starts from the
first P columns as they are. Both kinds of padding are masked, and positions start at 0 on a row's
first token, so a row's loss does not depend on what it shares a batch with.

    loss of a row = mean over its target tokens of -log p(token | all before it), nats

Logits are made at target tokens only: (N, V) instead of (B, P + L, V). Weights never get a
gradient, and `frozen` takes them out of autograd's graph altogether.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from es2fast.attacks.base import AttackSettings, Target
from es2fast.data import Formatter, Prompt
from es2fast.errors import UserError
from es2fast.modeling.generate import continued
from es2fast.modeling.head import read_transform
from es2fast.modeling.taps import backbone, causal_lm, position_ids

QUOTED = 100  # characters of a prompt that a target repeats
IGNORED = -100
SAMPLED = 1024  # embeddings whose size stands for the vocabulary's


class TargetSettings(AttackSettings):
    target: str = Field(
        'Sure, here is a detailed answer to "{prompt}":\n\n',
        min_length=1,
        description="start of an answer that is made likely; {prompt}: the prompt's first words",
    )


@dataclass(frozen=True)
class Row:
    """Token ids of one prompt around the slot, and of the answer that is aimed at."""

    before: Sequence[int]
    after: Sequence[int]
    target: Sequence[int]


@dataclass(frozen=True)
class Batch:
    """Rows as one left- and right-padded batch; what stands in the slot is up to the caller."""

    embeddings: Tensor  # (B, P + L - 1, H) of the model's dtype; the last target token is not read
    mask: Tensor  # (B, P + L - 1) int64, 1 for real tokens and the slot
    labels: Tensor  # (B, L) int64, IGNORED behind a shorter target
    slot: Tensor  # (B, K) int64 columns
    width: int  # P

    def filled(self, soft: Tensor) -> Tensor:
        """(B, K, H) free embeddings put into the slot -> (B, P + L - 1, H)."""
        rows = torch.arange(len(soft), device=soft.device)[:, None]
        return self.embeddings.index_put((rows, self.slot), soft.to(self.embeddings.dtype))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and weights outside of autograd, put back as they were whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


def split_prompt(formatter: Formatter, prompt: Prompt, place: str) -> tuple[list[int], list[int]]:
    """A prompt's ids before and after the slot.

    Args:
        place: "user", behind the user's text and before what the template writes after it; "end",
            behind the whole prompt.
    """
    ids = formatter.prompt_ids(prompt)
    cut = len(ids) - (formatter.tail_length(ids) if place == "user" else 0)
    return ids[:cut], ids[cut:]


def target_ids(formatter: Formatter, target: str, prompt: Prompt) -> list[int]:
    """Ids of the wanted start of the answer; `{prompt}` stands for the start of the user's text.

    Raises:
        UserError: the tokenizer makes nothing of it.
    """
    quoted = " ".join(prompt.text.split())[:QUOTED].rstrip(" .?!")
    text = target.replace("{prompt}", quoted)
    ids = list(formatter.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError(
            f"evaluate.attacks: target: {target!r} has no tokens; give the first words of an answer"
        )
    return ids


def plain_ids(target: Target) -> Tensor:
    """(n,) ids of the vocabulary that are neither special nor added, ascending."""
    tokenizer = target.formatter.tokenizer
    size = causal_lm(target.model).config.get_text_config().vocab_size
    apart = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return torch.tensor([i for i in range(min(size, len(tokenizer))) if i not in apart])


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """(...) ids -> (..., H), as the model itself embeds them, a family's scaling included."""
    return causal_lm(model).get_input_embeddings()(ids).detach()


def typical_size(target: Target) -> float:
    """Root mean square of the entries of the vocabulary's embeddings, of `SAMPLED` tokens spread
    over the ids."""
    ids = plain_ids(target)
    some = ids[:: max(1, len(ids) // SAMPLED)]
    return float(embed(target.model, some.to(target.device)).double().square().mean().sqrt())


def free_dtype(model: nn.Module) -> torch.dtype:
    """What is optimised in: fp32, or the model's own dtype where that is wider."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


@torch.no_grad()
def layout(model: nn.Module, rows: Sequence[Row], slot: int, device: torch.device) -> Batch:
    """Rows as one batch.

    Args:
        rows: B rows, each with a target of at least one token.
        slot: K, the number of free columns in every row.
    """
    lengths = [len(row.before) + slot + len(row.after) for row in rows]
    width, extra = max(lengths), max(len(row.target) for row in rows)
    ids = torch.zeros(len(rows), width + extra, dtype=torch.int64)
    mask, columns = torch.zeros_like(ids), torch.zeros(len(rows), slot, dtype=torch.int64)
    for number, (row, length) in enumerate(zip(rows, lengths)):
        whole = [*row.before, *[0] * slot, *row.after, *row.target]
        start = width - length
        ids[number, start : start + len(whole)] = torch.tensor(whole)
        mask[number, start : start + len(whole)] = 1
        columns[number] = start + len(row.before) + torch.arange(slot)
    labels = ids[:, width:].masked_fill(mask[:, width:] == 0, IGNORED)
    return Batch(
        embeddings=embed(model, ids[:, :-1].to(device)),
        mask=mask[:, :-1].to(device),
        labels=labels.to(device),
        slot=columns.to(device),
        width=width,
    )


def target_losses(model: nn.Module, batch: Batch, embeddings: Tensor) -> Tensor:
    """Loss of each row, (B,) fp32 or wider: embeddings (B, P + L - 1, H), see the module."""
    hidden = backbone(model)(
        inputs_embeds=embeddings,
        attention_mask=batch.mask,
        position_ids=position_ids(batch.mask),
        use_cache=False,
    ).last_hidden_state
    return label_losses(model, hidden[:, batch.width - 1 :], batch.labels)


def label_losses(model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy per row: final hidden states (B, L, H), labels (B, L) -> (B,)."""
    inner, device = causal_lm(model), labels.device
    labels = labels.to(hidden.device)  # with a device map the last block may be elsewhere
    wanted = labels != IGNORED
    logits = inner.get_output_embeddings()(hidden[wanted])  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = read_transform(inner.config)(logits)
    losses = nn.functional.cross_entropy(logits, labels[wanted].to(logits.device), reduction="none")
    wanted = wanted.to(device)
    table = losses.new_zeros(labels.shape, device=device).index_put((wanted,), losses.to(device))
    return table.sum(-1) / wanted.sum(-1)


@torch.no_grad()
def generate_from(
    model: nn.Module,
    formatter: Formatter,
    embeddings: Tensor,
    mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers to prompts that are given as embeddings.

    Args:
        embeddings, mask: (B, P, H) and (B, P), padded on the left.
        temperature: 0, greedy; else of sampling from the whole distribution.
        seed: of the sampling; the global generators are left as they were.
    """
    out = continued(
        model,
        formatter,
        mask,
        inputs_embeds=embeddings,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    return [formatter.decode(row) for row in out]
