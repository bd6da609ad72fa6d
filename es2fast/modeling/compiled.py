"""Decoder blocks that run through `torch.compile`.

Each block's `forward` is compiled by itself: blocks of one kind share the compiled code, what is
hooked onto a block (taps, cuts, attacks on its output) stays outside of it, and neither modules nor
parameters get other names, so checkpoints and exports are those of the plain model. Lengths are
symbols: a batch of another length compiles nothing. Where eager code rounds a bf16 intermediate,
compiled code rounds too (`emulate_precision_casts`): inductor's own way, which keeps it in fp32,
makes the student another model than the base model that a cache was written with.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from es2fast.errors import UserError
from es2fast.modeling.taps import blocks

VARIANTS = 64  # of a block: trained or frozen, with or without gradient, padded or packed
_OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}


class CompiledForward:
    """A block's forward, compiled unless `eager()`.

    Args:
        block: its forward becomes this object.
        eager: asked at every call.
    """

    def __init__(self, block: nn.Module, eager: Callable[[], bool]):
        functools.update_wrapper(self, block.forward)
        self._own, self._eager = block.forward, eager
        self._compiled = torch.compile(block.forward, dynamic=True, options=_OPTIONS)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self._own if self._eager() else self._compiled)(*args, **kwargs)


def compile_blocks(model: nn.Module, eager: Callable[[], bool], leave: Sequence[int] = ()) -> None:
    """Compiles a model's decoder blocks in place; each when it first runs.

    Args:
        model: a causal language model, possibly wrapped by peft.
        eager: what is true while the blocks run as they are.
        leave: blocks to leave alone, such as those whose inner modules have hooks.
    """
    import torch._dynamo

    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, VARIANTS)
    for index, block in enumerate(blocks(model)):
        if index not in leave and not is_compiled(block):
            block.forward = CompiledForward(block, eager)  # type: ignore[method-assign,assignment]


def is_compiled(block: nn.Module) -> bool:
    """`compile_blocks` was here."""
    return isinstance(block.forward, CompiledForward)


def check_stage(zero_stage: int) -> None:
    """UserError under ZeRO stage 3."""
    if zero_stage == 3:
        raise UserError(
            "train.compile: true, but under ZeRO stage 3 every layer's weights come and go by "
            "hooks, which would cut a compiled block to pieces; use deepspeed=zero2 or "
            "train.compile=false"
        )


def check_compiler(device: torch.device) -> None:
    """UserError where something small cannot be compiled for `device`."""
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:
        told = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(
            f"train.compile: true, but torch.compile fails here ({told[0].strip()[:200]}); install "
            "a C++ compiler (g++) and, for a GPU, triton, or set train.compile=false"
        ) from None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x.sin() + 1
