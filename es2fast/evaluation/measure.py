"""What is measured on a model beside its answers, and kept so that no other model has to be there.

Geometry: states at the last prompt token, block by block; probes are cross-validated on training
prompts, distances and norms are those of held-out prompts. Other tokens of the prompt: see
`positions`; harmless tokens of the answer: see `teacher`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from es2fast.data import Formatter, Prompt
from es2fast.evaluation.teacher import TokenStats
from es2fast.modeling.states import last_token_states
from es2fast.modeling.taps import blocks
from es2fast.probing.crossval import accuracy_interval, draws, held_out, interval
from es2fast.probing.probes import fisher_ratio, mean_distance
from es2fast.run.files import write_text

States = dict[int, Tensor]  # layer -> (n, H) fp32, last prompt token


@dataclass
class Measured:
    """What stays of a model after it is gone.

    separation: per block, see `geometry`; states: of the held-out prompts, by group; tokens: what
    it does with harmless tokens, see `teacher.TokenStats`; notes: what the report should warn of.
    """

    fingerprint: str
    separation: dict[str, dict[str, Any]] = field(default_factory=dict)
    tokens: TokenStats = field(default_factory=TokenStats)
    states: dict[str, States] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """path.json and path.safetensors."""
        tensors = {
            f"{group}.{layer}": rows.contiguous()
            for group, states in self.states.items()
            for layer, rows in states.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, _with(path, ".safetensors"))
        plain = {
            "fingerprint": self.fingerprint,
            "separation": self.separation,
            "tokens": asdict(self.tokens),
            "notes": self.notes,
        }
        write_text(_with(path, ".json"), json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, fingerprint: str | None = None) -> Measured | None:
        """What `save` wrote (for this fingerprint); None when there is nothing of the kind."""
        try:
            plain = json.loads(_with(path, ".json").read_text(encoding="utf-8"))
            tensors = load_file(_with(path, ".safetensors"))
        except (OSError, ValueError):
            return None
        if "tokens" not in plain or fingerprint not in (None, plain.get("fingerprint")):
            return None
        states: dict[str, States] = {}
        for name, rows in tensors.items():
            group, _, layer = name.partition(".")
            states.setdefault(group, {})[int(layer)] = rows
        tokens, notes = TokenStats(**plain["tokens"]), plain.get("notes", [])
        return cls(plain["fingerprint"], plain["separation"], tokens, states, notes)


def _with(path: Path, suffix: str) -> Path:
    """A model's name may hold dots of its own."""
    return path.with_name(path.name + suffix)


def held_out_states(
    model: nn.Module, formatter: Formatter, groups: Mapping[str, Sequence[Prompt]], batch: int
) -> dict[str, States]:
    """Every block's states at the last prompt token: group -> layer -> (n, H).

    Args:
        batch: prompts per pass.
    """
    every = list(range(len(blocks(model))))
    return {
        name: last_token_states(model, formatter.prompt_batches(prompts, batch), every)
        for name, prompts in groups.items()
    }


def geometry(
    measured: Mapping[str, States], fit: tuple[States, States], base: Measured | None
) -> dict[str, dict[str, Any]]:
    """Per block: distances and norms on held-out prompts, probes tested across training prompts.

    `spread` is the mean distance of a group's states from their mean; `fisher` as `fisher_ratio`;
    `probe_margin`, the mean distance to the probe's boundary, is in units of the base model's
    `distance`.

    Args:
        measured: states of the groups `harmful` and `harmless`.
        fit: states of the training prompts, harmful and harmless.
        base: the base model's; None when this is the base model.
    """
    found: dict[str, dict[str, Any]] = {}
    weights = draws([len(next(iter(group.values()))) for group in fit])
    for layer in measured["harmful"]:
        a, b = measured["harmful"][layer], measured["harmless"][layer]
        spreads = [(group - group.mean(0)).norm(dim=-1).mean().item() for group in (a, b)]
        row = {
            "distance": mean_distance(a, b).item(),
            "norm": torch.cat([a, b]).norm(dim=-1).mean().item(),
            "spread_harmful": spreads[0],
            "spread_harmless": spreads[1],
            "fisher": fisher_ratio(a, b),
        }
        before = row if base is None else base.separation[str(layer)]
        row["distance_over_base"] = row["distance"] / before["distance"]
        row["norm_ratio"] = row["norm"] / before["norm"]
        row |= _probed(fit[0][layer], fit[1][layer], before["distance"], weights)
        found[str(layer)] = row
    return found


def _probed(harmful: Tensor, harmless: Tensor, unit: float, weights: Tensor) -> dict[str, Any]:
    """Accuracy and margin of the cross-validated probe, with their 95 % intervals."""
    tested = held_out(harmful, harmless)
    margins = tested.margins / unit
    return {
        "probe_accuracy": float(tested.correct.mean()),
        "probe_interval": list(accuracy_interval(tested.correct, weights)),
        "probe_margin": float(margins.mean()),
        "probe_margin_interval": list(interval(margins, weights)),
    }


def shift_ranks(states: States, base: States, layers: Sequence[int]) -> dict[str, float]:
    """Effective rank (exp of the entropy of the squared singular values) of h - h_base over the
    harmful prompts: 1 means that all moved along one direction."""
    ranks = {}
    for layer in layers:
        energy = torch.linalg.svdvals((states[layer] - base[layer]).double()).square()
        share = energy / energy.sum().clamp_min(1e-30)
        ranks[str(layer)] = float(torch.special.entr(share).sum().exp())
    return ranks
