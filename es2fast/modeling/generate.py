"""Answers of a model to one batch of prompts, greedy or drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.data import Formatter, Prompt
from es2fast.modeling.decoding import decode
from es2fast.modeling.taps import position_ids


def generate(
    model: nn.Module,
    formatter: Formatter,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    device: torch.device,
    synced: bool = False,
) -> list[str]:
    """Greedy answers as text without special tokens, in the order of the prompts.

    Args:
        model: a causal language model in eval mode.
        prompts: one left-padded batch.
        max_new_tokens: length at which an answer is cut.
        device: where the batch goes.
        synced: keep stepping until every rank has finished (ZeRO-3 on more than one rank).
    """
    rows = [formatter.prompt_ids(prompt) for prompt in prompts]
    return generate_rows(
        model, formatter, rows, max_new_tokens=max_new_tokens, device=device, synced=synced
    )


@torch.no_grad()
def generate_rows(
    model: nn.Module,
    formatter: Formatter,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    device: torch.device,
    synced: bool = False,
    min_new_tokens: int | None = None,
    repetition_penalty: float = 1.0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    shown: Sequence[int] | None = None,
) -> list[str]:
    """Continuations of rows of token ids, whatever stands in them; see `generate`.

    Args:
        rows: one batch of ids, template and all; padded here, on the left.
        min_new_tokens: an answer does not end before.
        repetition_penalty: above 1, tokens that occurred before are less likely.
        temperature: 0, greedy; else of sampling from the share `top_p` of the distribution.
        seed: of the sampling; the global generators are left as they were.
        shown: per row, how many of its last ids are part of the text that is returned; default: 0.
    """
    batch = formatter.pad(rows)
    ids = batch["input_ids"].to(device)
    out = continued(
        model,
        formatter,
        batch["attention_mask"].to(device),
        input_ids=ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        synced=synced,
        min_new_tokens=min_new_tokens,
        repetition_penalty=None if repetition_penalty == 1.0 else repetition_penalty,
    )
    starts = [ids.shape[1] - count for count in shown or [0] * len(rows)]
    return [formatter.decode(row[start:]) for row, start in zip(out, starts)]


@torch.no_grad()
def continued(
    model: nn.Module,
    formatter: Formatter,
    mask: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    synced: bool = False,
    repetition_penalty: float | None = None,
    **inputs: Any,
) -> Tensor:
    """transformers' `generate`, greedy or drawing, ended by the template's end of turn.

    Args:
        mask: (B, P), padded on the left.
        repetition_penalty: None: none, not the model's own either.
        inputs: `input_ids` (B, P) or `inputs_embeds` (B, P, H), and what else `generate` takes.

    Returns:
        (B, ...) ids: with `input_ids` these in front, with embeddings the new ones alone.
    """
    drawn = temperature > 0
    sampling = {"temperature": temperature, "top_k": 0, "top_p": top_p} if drawn else {}
    devices = [mask.device] if drawn and mask.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=drawn):
        if drawn:
            torch.manual_seed(seed)
        return model.generate(  # type: ignore[operator]
            attention_mask=mask,
            position_ids=position_ids(mask),
            max_new_tokens=max_new_tokens,
            do_sample=drawn,
            num_beams=1,
            repetition_penalty=repetition_penalty,
            eos_token_id=formatter.stop_token_ids or None,
            pad_token_id=formatter.pad_token_id,
            synced_gpus=synced,
            custom_generate=None if synced or drawn else decode,  # in lockstep nobody ends early
            **sampling,
            **inputs,
        )
