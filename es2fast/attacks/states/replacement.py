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
Which block it is the attacker tries out on training prompts, and at the best one then the other
positions and sources that it may choose from. States are collected from the same tensor that is
replaced, in passes over the model under attack.

Source: the template-anchored safety of Leong et al. 2025 (TempPatch, arXiv 2502.13946).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import product
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from es2fast.attacks.base import (
    Answer,
    Attack,
    AttackSettings,
    Cost,
    OneOrSeveral,
    Target,
    Trial,
)
from es2fast.attacks.search import Parameters, best, trials_of
from es2fast.attacks.states.pushes import Pushes, PushSums, total_of
from es2fast.data import Prompt
from es2fast.errors import UserError
from es2fast.modeling.taps import backbone, blocks, hidden_of, hooks, position_ids, with_hidden

CANDIDATES = 8  # blocks that are tried at most
VALUE_NAMES = ("v_proj", "value_proj", "wv")


class ReplacementSettings(AttackSettings):
    """Of each of the first three one or several; of several the attacker chooses."""

    what: Annotated[list[Literal["block", "values"]], OneOrSeveral] = Field(
        ["block"],
        min_length=1,
        description="replaced are block outputs, or the attention's value vectors",
    )
    positions: Annotated[list[Literal["last", "template"]], OneOrSeveral] = Field(
        ["last"],
        min_length=1,
        description="the last prompt token, or all that the template writes after the user",
    )
    source: Annotated[list[Literal["mean", "nearest"]], OneOrSeveral] = Field(
        ["mean"],
        min_length=1,
        description="mean of the harmless training prompts, or the nearest of them",
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
        self.what = self.settings.what[0]
        self.sources: dict[int, Tensor] = {}  # of these blocks -> (n, m, H), n = 1 for the mean
        self._trials: list[Trial] = []

    def cost(self, target: Target, prompts: int) -> Cost:
        settings = self.settings
        trials = min(CANDIDATES, target.depth) - 1 + len(self._kinds())
        tried = len(settings.what) * trials * min(settings.trial_prompts, len(target.harmful))
        return Cost(prompts, len(settings.what) * len(target.harmless), tried)

    def prepare(self, target: Target) -> None:
        """Collects the sources and picks what makes most training prompts come out useful.

        Raises:
            UserError: no value projection of its own; a template that ends with the user's text.
        """
        settings, tail = self.settings, self._tail(target)
        widths = {"last": 1, "template": tail}
        points = self._points(target.model)
        prompts = target.harmful[: settings.trial_prompts]
        self._trials = []
        states: dict[str, dict[int, Tensor]] = {}

        def choose(parameters: Parameters) -> None:
            self.what = parameters.get("what", settings.what[0])
            found, layer = states[self.what], parameters["layer"]
            self.at = [i for i in found if i >= layer] if self.what == "values" else [layer]
            width = widths[parameters.get("positions", settings.positions[0])]
            mean = parameters.get("source", settings.source[0]) == "mean"
            own = {i: found[i][:, -width:] for i in self.at}
            self.sources = {i: one.mean(0, keepdim=True) if mean else one for i, one in own.items()}

        def answer(parameters: Parameters) -> list[Answer]:
            choose(parameters)
            return [one for (one,) in self.answers(target, prompts)]

        def tried(options: Sequence[Parameters]) -> list[Trial]:
            return trials_of(target, self.label, options, prompts, answer)

        kinds = [kind for kind in self._kinds() if kind.get("positions") != "template" or tail]
        for what, modules in points.items():
            upwards, every = what == "values", sorted(modules)
            stride = math.ceil(len(every) / CANDIDATES)
            lowest = every[0 if upwards else stride - 1 :: stride]
            needed = {i: modules[i] for i in every if upwards or i in lowest}
            states[what] = states_at(target, needed, max(widths[one] for one in settings.positions))
            named = {"what": what} if len(set(settings.what)) > 1 else {}
            trials = tried([{**named, **kinds[0], "layer": layer} for layer in lowest])
            layer = best(trials, _change).parameters["layer"]
            self._trials += trials + tried(
                [{**named, **kind, "layer": layer} for kind in kinds[1:]]
            )
        choose(best(self._trials, _change).parameters)

    def _kinds(self) -> list[dict[str, str]]:
        """Positions and sources to choose from, named where there are several."""
        settings = self.settings
        lists: dict[str, Sequence[str]] = {
            "positions": settings.positions,
            "source": settings.source,
        }
        several = {name: list(dict.fromkeys(one)) for name, one in lists.items() if len(one) > 1}
        return [dict(zip(several, one)) for one in product(*several.values())]

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
        chosen = best(self._trials, _change).parameters if self._trials else {}
        named = {name: one for name, one in chosen.items() if name != "layer"}
        return {"layers": self.at, **named, "trials": curve}

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[Pushes]:
        """Replaces for as long as the context lasts; yields how far the states were moved,
        which is complete behind it."""
        pushes, sums = Pushes(), PushSums()
        picked: dict[str, Tensor] = {}
        points = modules_of(model, self.what)
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

    def _tail(self, target: Target) -> int:
        """How many tokens the template writes after the user's text; 0 where `positions` has
        something else than these."""
        if "template" not in self.settings.positions:
            return 0
        formatter = target.formatter
        width = formatter.tail_length(formatter.prompt_ids(target.harmless[0]))
        if width == 0 and "last" not in self.settings.positions:
            raise UserError(
                "replacement.positions: 'template', but this chat template writes nothing after "
                "the user's text; use positions: last"
            )
        return width

    def _points(self, model: nn.Module) -> dict[str, dict[int, nn.Module]]:
        """Modules whose outputs may be replaced, per kind of them that the model has."""
        found: dict[str, dict[int, nn.Module]] = {}
        for what in self.settings.what:
            try:
                found[what] = modules_of(model, what)
            except UserError:
                if len(set(self.settings.what)) == 1:
                    raise
        return found


def _change(trial: Trial) -> float:
    """Mean distance that a trial's states were moved, relative to their norm."""
    return total_of(trial.answers).relative_push


def modules_of(model: nn.Module, what: str) -> dict[int, nn.Module]:
    """Block -> the module whose output `what` names."""
    every = dict(enumerate(blocks(model)))
    return every if what == "block" else value_projections(every)


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
