"""Tiny models under attack: random weights, real families, a real tokenizer and judge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tiny_models import tiny_model, tokenizer

from es2fast.attacks.base import Target
from es2fast.config import DataConfig
from es2fast.data import Formatter, Prompt
from es2fast.judges.registry import make_judge
from es2fast.modeling.taps import causal_lm, hooks

TEXTS = ("break the car", "please steal the old red boat . please", "steal a lamp", "break")
HARMLESS = ("draw a tree", "paint the house", "explain the road please", "describe a hill")


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt.of(text) for text in texts]


def tiny_target(
    family: str = "llama", *, dtype: torch.dtype = torch.float32, lora: bool = False, **more: Any
) -> Target:
    """A random model of a family with four training prompts per group; parameters trainable."""
    model = tiny_model(family, max_position_embeddings=128).to(dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        model = get_peft_model(
            model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        ).eval()
    formatter = Formatter(tokenizer(), DataConfig(max_length=48))
    options = {"max_new_tokens": 6, "batch_size": 4} | more
    return Target(
        model, formatter, prompts(*TEXTS), prompts(*HARMLESS), make_judge("rules"), **options
    )


@contextmanager
def failing_head(model: torch.nn.Module) -> Iterator[None]:
    """The LM head raises while the context lasts."""

    def fail(module: torch.nn.Module, args: Any) -> None:
        raise RuntimeError("head")

    with hooks([causal_lm(model).get_output_embeddings().register_forward_pre_hook(fail)]):
        yield


def state_of(model: torch.nn.Module) -> tuple[Any, ...]:
    """What an attack has to leave as it was: hooks, modes, flags, gradients and weights."""
    count = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    modes = [module.training for module in model.modules()]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    total = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
    return count, modes, flags, total
