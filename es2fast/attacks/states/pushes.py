"""What all embedding attacks share: fit on states of the model under attack, then push.

Legend: B rows, T tokens, H hidden size, n prompts.

An attack replaces, at the *last position only*, the output of decoder blocks while text is
generated: e <- e + push(e). Hooks sit on the blocks' outputs, the same tensor the states for
`fit` come from, and blocks run in ascending order, so layer l sees the already pushed input. With
a KV cache the prompt pass has T > 1 and every decoding step T = 1; `steps='prompt'` pushes only in
the former, `steps='all'` in both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from es2fast.modeling.taps import blocks, hidden_of, hooks, with_hidden


@dataclass
class Pushes:
    """Sums over all pushed (row, layer, step) triples."""

    count: int = 0
    total: float = 0.0  # of |push|
    relative: float = 0.0  # of |push| / |e|

    def add(self, push: Tensor, states: Tensor) -> None:
        """Counts the rows of push (B, H) that are not zero; states (B, H) before the push."""
        size = push.float().norm(dim=-1)
        norm = states.float().norm(dim=-1).clamp_min(1e-12)
        self.count += int((size > 0).sum())
        self.total += float(size.sum())
        self.relative += float((size / norm).sum())

    @property
    def mean(self) -> float:
        """Mean |push| where something was pushed, in units of the states; 0 without pushes."""
        return self.total / max(self.count, 1)

    @property
    def relative_push(self) -> float:
        """Mean |push| / |e| where something was pushed; 0 without pushes."""
        return self.relative / max(self.count, 1)


class Attack(ABC):
    """One embedding attack. Subclasses say what is fitted and what is pushed."""

    name: str
    steps: str = "all"

    @abstractmethod
    def fit(self, harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> None:
        """Learns from states of the model under attack: layer -> (n, H), last prompt token."""

    @abstractmethod
    def layers(self) -> list[int]:
        """Blocks that are pushed; known after `fit`."""

    @abstractmethod
    def push(self, layer: int, states: Tensor) -> Tensor:
        """What is added at `layer`: states (B, H) fp32 -> (B, H) fp32."""

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Pushes]:
        """Installs the pushes for as long as the context lasts; yields their statistics."""
        pushes = Pushes()
        all_blocks = blocks(model)
        with hooks(
            [all_blocks[i].register_forward_hook(self._hook(i, pushes)) for i in self.layers()]
        ):
            yield pushes

    def _hook(self, layer: int, pushes: Pushes) -> Callable[..., Any]:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            if self.steps == "prompt" and hidden.shape[1] == 1:
                return None
            states = hidden[:, -1].float()
            push = self.push(layer, states)
            pushes.add(push, states)
            hidden = hidden.clone()
            hidden[:, -1] = (states + push).to(hidden.dtype)
            return with_hidden(output, hidden)

        return hook
