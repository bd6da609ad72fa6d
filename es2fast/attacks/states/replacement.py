"""Replacement: what the template positions hold is replaced by that of harmless prompts.

    x_p <- source_p     at the last m prompt positions p, while the prompt is read,

x being a block's output, or the value vectors of its attention (the value projection's output).
m = 1 (`positions: last`), or the number of tokens that the chat template writes after the user's
text (`template`). Positions are counted from the end, so source and target hold the same template
token. The source is the mean over the harmless training prompts, or the one of them whose x at the
last position is nearest (Euclidean; with several blocks, chosen at the lowest and kept above).

A push has to bridge whatever margin a defence has put between the groups; a replacement does not
see it, and it hits exactly the state at which ES2 separates them. Decoding steps are left alone:
they read the replaced keys and values from the cache.

A block's output holds all that the blocks below wrote, so one block is replaced. Value vectors of
one block are a small part of what later positions read, so they are replaced from a block upwards.
Which block it is the attacker tries out on training prompts. States are collected from the same
tensor that is replaced, in passes over the model under attack.

Source: the template-anchored safety of Leong et al. 2025 (TempPatch, arXiv 2502.13946).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from es2fast.attacks.base import Answer, Attack, AttackSettings, Cost, Target, Trial
from es2fast.attacks.search import Parameters, best, trials_of
from es2fast.attacks.states.pushes import Pushes, PushSums, total_of
from es2fast.data import Prompt
from es2fast.errors import UserError
from es2fast.modeling.taps import backbone, blocks, hidden_of, hooks, position_ids, with_hidden

CANDIDATES = 8  # blocks that are tried at most
VALUE_NAMES = ("v_proj", "value_proj", "wv")


class ReplacementSettings(AttackSettings):
    what: Literal["block", "values"] = Field(
        "block", description="replaced are block outputs, or the attention's value vectors"
    )
    positions: Literal["last", "template"] = Field(
        "last", description="the last prompt token, or all that the template writes after the user"
    )
    source: Literal["mean", "nearest"] = Field(
        "mean", description="mean of the harmless training prompts, or the nearest of them"
    )
    trial_prompts: int = Field(16, ge=1, description="training prompts per trial")


class Replacement(Attack):
    """Replaces states at template positions by those of harmless training prompts."""

    name = "replacement"
    Settings = ReplacementSettings
    settings: ReplacementSettings

    def __init__(self, settings: ReplacementSettings | None = None):
        super().__init__(settings or self.Settings())
        self.at: list[int] = []  # blocks at which something is replaced
        self.sources: dict[int, Tensor] = {}  # block -> (n, m, H), n = 1 for the mean
        self._trials: list[Trial] = []

    def cost(self, target: Target, prompts: int) -> Cost:
        tried = min(CANDIDATES, target.depth) * min(
            self.settings.trial_prompts, len(target.harmful)
        )
        return Cost(prompts + tried, len(target.harmless))

    def prepare(self, target: Target) -> None:
        """Collects the sources and picks the block at which most training prompts come out useful.

        Raises:
            UserError: no value projection of its own; a template that ends with the user's text.
        """
        points = self._points(target.model)
        upwards = self.settings.what == "values"
        stride = math.ceil(len(points) / CANDIDATES)
        lowest = sorted(points)[0 if upwards else stride - 1 :: stride]
        needed = [i for i in sorted(points) if upwards or i in lowest]
        self.fit(states_at(target, {i: points[i] for i in needed}, self._width(target)))
        prompts = target.harmful[: self.settings.trial_prompts]

        def replace_from(parameters: Parameters) -> None:
            layer = parameters["layer"]
            self.at = [i for i in needed if i >= layer] if upwards else [layer]

        def answer(parameters: Parameters) -> list[Answer]:
            replace_from(parameters)
            return [one for (one,) in self.answers(target, prompts)]

        choices = [{"layer": layer} for layer in lowest]
        self._trials = trials_of(target, self.label, choices, prompts, answer)
        replace_from(best(self._trials, _change).parameters)

    def fit(self, states: Mapping[int, Tensor]) -> None:
        """Takes the sources from the harmless prompts' states, layer -> (n, m, H)."""
        mean = self.settings.source == "mean"
        self.sources = {
            layer: found.mean(0, keepdim=True) if mean else found for layer, found in states.items()
        }

    def answers(self, target: Target, prompts: Sequence[Prompt]) -> list[list[Answer]]:
        with self.applied(target.model) as pushes:
            texts = target.generate(prompts)
        # the sums belong to the batch: its first answer carries them
        infos = [{"pushes": asdict(pushes)}, *({} for _ in texts[1:])]
        return [[Answer(text, info=info)] for text, info in zip(texts, infos)]

    def summary(self) -> dict[str, Any]:
        curve = [
            {**trial.parameters, "useful": trial.useful, "relative_push": _change(trial)}
            for trial in self._trials
        ]
        return {"layers": self.at, "trials": curve}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Pushes]:
        """Replaces for as long as the context lasts; yields how far the states were moved,
        which is complete behind it."""
        pushes, sums = Pushes(), PushSums()
        picked: dict[str, Tensor] = {}
        points = self._points(model)
        with hooks([points[i].register_forward_hook(self._hook(i, sums, picked)) for i in self.at]):
            yield pushes
        pushes.merge(sums.read())

    def _hook(self, layer: int, sums: PushSums, picked: dict[str, Tensor]) -> Callable[..., Any]:
        """Replaces the last m positions of a prompt pass; `picked` holds the rows' source prompts,
        written by the lowest block."""

        @torch.no_grad()
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            if hidden.shape[1] == 1:  # a decoding step
                return None
            source = self.sources[layer].to(hidden.device)
            states = hidden[:, -source.shape[1] :].float()
            if layer == self.at[0]:
                picked["rows"] = torch.cdist(states[:, -1], source[:, -1]).argmin(1)
            wanted = source[picked["rows"].to(hidden.device)]
            sums.add((wanted - states).flatten(0, 1), states.flatten(0, 1))
            hidden = hidden.clone()
            hidden[:, -source.shape[1] :] = wanted.to(hidden.dtype)
            return with_hidden(output, hidden)

        return hook

    def _width(self, target: Target) -> int:
        if self.settings.positions == "last":
            return 1
        formatter = target.formatter
        width = formatter.tail_length(formatter.prompt_ids(target.harmless[0]))
        if width == 0:
            raise UserError(
                "replacement.positions: 'template', but this chat template writes nothing after "
                "the user's text; use positions: last"
            )
        return width

    def _points(self, model: nn.Module) -> dict[int, nn.Module]:
        every = dict(enumerate(blocks(model)))
        return every if self.settings.what == "block" else value_projections(every)


def _change(trial: Trial) -> float:
    """Mean distance that a trial's states were moved, relative to their norm."""
    return total_of(trial.answers).relative_push


def value_projections(every: Mapping[int, nn.Module]) -> dict[int, nn.Module]:
    """Per decoder block that has one, the module whose output are the attention's value vectors.

    With LoRA it is the adapter's wrapper, whose output is that of the adapted projection.

    Raises:
        UserError: no block has one, as where queries, keys and values come from one matrix.
    """
    found: dict[int, nn.Module] = {}
    for layer, block in every.items():
        for name, module in block.named_modules():  # wrappers come before what they wrap
            if name.rpartition(".")[2] in VALUE_NAMES:
                found[layer] = module
                break
    if not found:
        raise UserError(
            f"replacement.what: 'values' needs a value projection of its own, and "
            f"{type(every[0]).__name__} has none of {', '.join(VALUE_NAMES)}; use what: block"
        )
    return found


@torch.no_grad()
def states_at(target: Target, points: Mapping[int, nn.Module], width: int) -> dict[int, Tensor]:
    """What modules put out at the last positions of the harmless training prompts.

    Args:
        target: the model under attack.
        points: block -> module.
        width: m, the number of positions.

    Returns:
        block -> (n, m, H) fp32 on the CPU.
    """
    kept: dict[int, list[Tensor]] = {layer: [] for layer in points}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            part = hidden_of(output)[:, -width:]
            kept[layer].append(part.to("cpu", torch.float32, copy=True))

        return hook

    run, device = backbone(target.model), target.device
    batches = target.formatter.prompt_batches(target.harmless, target.states_batch)
    with hooks([module.register_forward_hook(keep(i)) for i, module in points.items()]):
        for batch in target.progress(batches, "states of harmless prompts"):
            mask = batch["attention_mask"].to(device)
            run(
                input_ids=batch["input_ids"].to(device),
                attention_mask=mask,
                position_ids=position_ids(mask),
                use_cache=False,
            )
    return {layer: torch.cat(parts) for layer, parts in kept.items()}
