"""Latent PGD: small perturbations of every prompt token's hidden state, found by gradient.

Legend: B rows, P prompt columns, H hidden size.

At one block's output, h_t of each prompt token t gets a perturbation d_t of bounded size, made for
the prompt at hand by projected gradient descent on the cross-entropy of an affirmative answer:

    min over d of  -1/L sum log p(target_i | prompt + d, target_<i)    with  |d_t| <= eps |h_t|
    d_t <- project(d_t - step eps |h_t| g_t / |g_t|),   g = gradient by d

32 steps by default. The bound is in units of each token's own |h_t| on the clean prompt: a defence
that scales the states up gains nothing by it. Every eps is an attack of its own, and the rates over
eps are a curve: what it takes to break the model, where a fixed eps would only say whether it is
enough. Pushes along known directions are among what this attack may find, so it bounds them.

The block is given, or picked among a few on training prompts: the one at which most come out
useful, ties to the lower loss. The perturbation is applied while the prompt is read, and only then:
later tokens see it through attention alone. After Madry et al. 2018, and Sheshadri et al., "Latent
Adversarial Training", 2024, who train on such perturbations; written from the formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from es2fast.attacks.base import GRADIENT_PASSES, Answer, Attack, Cost, Target
from es2fast.attacks.prompts.embeddings import (
    Batch,
    Row,
    TargetSettings,
    free_dtype,
    frozen,
    layout,
    target_ids,
    target_losses,
)
from es2fast.data import Prompt
from es2fast.modeling.generate import generate_rows
from es2fast.modeling.taps import blocks, check_layers, hidden_of, hooks, tapped, with_hidden

TRIALS = 8  # training prompts on which blocks are compared


class LatentPgdSettings(TargetSettings):
    epsilons: list[float] = Field(
        [0.1, 0.3, 1.0], min_length=1, description="bounds, in units of each token's |h|"
    )
    steps: int = Field(32, ge=1)
    step: float = Field(0.1, gt=0, description="length of a step, in units of the bound")
    layer: int | None = Field(
        None, ge=0, description="block whose output is perturbed; default: picked by trying"
    )
    candidates: int = Field(4, ge=1, description="blocks that are tried, evenly spread")
    batch: int | None = Field(
        None, ge=1, description="prompts optimised at a time; default: evaluate.batch_size"
    )


class LatentPgd(Attack):
    """Bounded perturbations of one block's output; see the module."""

    name = "latent_pgd"
    Settings = LatentPgdSettings
    settings: LatentPgdSettings

    def __init__(self, settings: LatentPgdSettings | None = None):
        super().__init__(settings or self.Settings())
        self.layer = self.settings.layer
        self._trials: list[dict[str, Any]] = []

    def cost(self, target: Target, prompts: int) -> Cost:
        tried = 0 if self.settings.layer is not None else self.settings.candidates
        answers = prompts * len(self.settings.epsilons) + tried * TRIALS
        return Cost(answers, answers * (self.settings.steps + 1) * GRADIENT_PASSES)

    def prepare(self, target: Target) -> None:
        """Picks the block, at the middle one of the bounds."""
        self._trials = []
        if self.settings.layer is not None:
            check_layers([self.settings.layer], target.depth)
            return
        epsilons = sorted(self.settings.epsilons)
        epsilon = epsilons[len(epsilons) // 2]
        prompts = target.harmful[:TRIALS]
        ranked = []
        for layer in spread(target.depth, self.settings.candidates):
            trial = target.trial(
                self.label,
                {"layer": layer, "epsilon": epsilon},
                prompts,
                partial(self._at, target, prompts, layer, epsilon),
                whole=True,
            )
            loss = sum(answer.info["loss"] for answer in trial.answers) / len(prompts)
            self._trials.append({**trial.parameters, "useful": trial.useful, "loss": loss})
            ranked.append((trial.useful, -loss, -layer))
        self.layer = -max(ranked)[2]

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        assert self.layer is not None, "prepare first"
        curve = [self._at(target, prompts, self.layer, e) for e in self.settings.epsilons]
        return [list(found) for found in zip(*curve)]

    def summary(self) -> dict[str, Any]:
        return {"layers": [self.layer]} | ({"trials": self._trials} if self._trials else {})

    def _at(
        self, target: Target, prompts: Sequence[Prompt], layer: int, epsilon: float
    ) -> list[Answer]:
        """One answer per prompt, with this block and bound."""
        found: list[Answer] = []
        size = self.settings.batch or target.batch_size
        for start in range(0, len(prompts), size):
            found += self._batch_at(target, prompts[start : start + size], layer, epsilon)
        return found

    def _batch_at(
        self, target: Target, prompts: Sequence[Prompt], layer: int, epsilon: float
    ) -> list[Answer]:
        rows = self.rows(target, prompts)
        with frozen(target.model):
            delta, first, losses = self.fit(target, rows, layer, epsilon)
            with perturbed(target.model, layer, delta):
                texts = generate_rows(
                    target.model,
                    target.formatter,
                    [row.before for row in rows],
                    max_new_tokens=target.max_new_tokens,
                    device=target.device,
                )
        parameters = {"layer": layer, "epsilon": epsilon}
        return [
            Answer(text, parameters, info={"first_loss": before, "loss": after})
            for text, before, after in zip(texts, first.tolist(), losses.tolist())
        ]

    def rows(self, target: Target, prompts: Sequence[Prompt]) -> list[Row]:
        """The prompts and what they aim at; there is no slot."""
        form, text = target.formatter, self.settings.target
        return [Row(form.prompt_ids(p), [], target_ids(form, text, p)) for p in prompts]

    def fit(
        self, target: Target, rows: Sequence[Row], layer: int, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best perturbation that was met, (B, P, H), the losses without and with it, (B,).

        The model must be `frozen`.
        """
        model = target.model
        batch = layout(model, rows, 0, target.device)
        first, bound = _clean(model, batch, layer, free_dtype(model))
        bound *= epsilon
        delta = torch.zeros(*bound.shape, batch.embeddings.shape[-1], device=bound.device)
        delta = delta.to(bound.dtype)
        best, losses = delta, first.clone()
        steps = range(self.settings.steps + 1)  # the last round only measures
        title = f"{self.label}, block {layer}, eps {epsilon:g}"
        for _ in target.progress(steps, title, "step"):
            part = delta.requires_grad_()
            with perturbed(model, layer, part):
                found = target_losses(model, batch, batch.embeddings)
            (gradient,) = torch.autograd.grad(found.sum(), part)
            part, found = part.detach(), found.detach()
            better = found < losses
            losses = torch.where(better, found, losses)
            best = torch.where(better.to(part.device)[:, None, None], part, best)
            delta = projected(part - self.settings.step * bound[..., None] * _unit(gradient), bound)
        return best, first, losses


def spread(depth: int, count: int) -> list[int]:
    """`count` blocks at equal distances, the last block left out where there are others."""
    usable = max(depth - 1, 1)
    return sorted({(2 * i + 1) * usable // (2 * count) for i in range(count)})


def projected(delta: Tensor, bound: Tensor) -> Tensor:
    """delta (B, P, H) shortened where it is longer than bound (B, P)."""
    size = delta.norm(dim=-1)
    return delta * (bound / size.clamp_min(1e-30)).clamp_max(1.0)[..., None]


def _unit(gradient: Tensor) -> Tensor:
    """Each (H,) vector at length 1; zero stays zero."""
    return gradient / gradient.norm(dim=-1, keepdim=True).clamp_min(1e-30)


@torch.no_grad()
def _clean(model: nn.Module, batch: Batch, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses (B,), and |h| of the prompt's tokens (B, P), zero at padding."""
    with tapped(model, [layer], lambda hidden: hidden[:, : batch.width]) as kept:
        losses = target_losses(model, batch, batch.embeddings)
    size = kept[layer].to(dtype).norm(dim=-1)
    return losses, size * batch.mask[:, : batch.width].to(size.device)


@contextmanager
def perturbed(model: nn.Module, layer: int, delta: Tensor) -> Iterator[None]:
    """Adds delta (B, P, H) to the first P columns of a block's output, in the next pass only: when
    generating that is the one that reads the prompt."""
    waiting = True

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal waiting
        if not waiting:
            return None
        waiting = False
        hidden, width = hidden_of(output), delta.shape[1]
        moved = (hidden[:, :width].to(delta.dtype) + delta).to(hidden.dtype)
        return with_hidden(output, torch.cat([moved, hidden[:, width:]], dim=1))

    with hooks([blocks(model)[layer].register_forward_hook(hook)]):
        yield
