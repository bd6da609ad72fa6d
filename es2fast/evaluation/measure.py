"""What is measured on a model beside its answers, and kept so that no other model has to be there.

Geometry: states at the last prompt token, block by block; probes are fitted on training prompts,
distances and norms are those of held-out prompts. Harmless behaviour: the exact KL to the base
model over all tokens of prompt + response. For that the base model's final hidden states and its LM
head are kept on disk until all models are measured; a model that just fits can so be compared.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from es2fast.attacks.base import STATES_BATCH
from es2fast.data import Formatter, Prompt
from es2fast.modeling.head import lm_head_of, read_transform
from es2fast.modeling.states import last_token_states
from es2fast.modeling.taps import backbone, blocks, causal_lm, position_ids
from es2fast.ops.linear_kl.op import linear_kl_div
from es2fast.probing.probes import fisher_ratio, fit_probe, mean_distance
from es2fast.run.files import remove, write_text

States = dict[int, Tensor]  # layer -> (n, H) fp32, last prompt token


@dataclass
class Measured:
    """What stays of a model after it is gone.

    separation: per block, see `geometry`; states: of the held-out prompts, by group; kl: to the
    base model in nats per token, None where there is none to compare with.
    """

    fingerprint: str
    separation: dict[str, dict[str, float]] = field(default_factory=dict)
    kl: float | None = None
    states: dict[str, States] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """path.json and path.safetensors."""
        tensors = {
            f"{group}.{layer}": rows.contiguous()
            for group, states in self.states.items()
            for layer, rows in states.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".safetensors"))
        plain = {"fingerprint": self.fingerprint, "separation": self.separation, "kl": self.kl}
        write_text(path.with_suffix(".json"), json.dumps(plain, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, fingerprint: str | None = None) -> Measured | None:
        """What `save` wrote (for this fingerprint); None when there is nothing of the kind."""
        try:
            plain = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
            tensors = load_file(path.with_suffix(".safetensors"))
        except (OSError, ValueError):
            return None
        if fingerprint not in (None, plain.get("fingerprint")):
            return None
        states: dict[str, States] = {}
        for name, rows in tensors.items():
            group, _, layer = name.partition(".")
            states.setdefault(group, {})[int(layer)] = rows
        return cls(plain["fingerprint"], plain["separation"], plain["kl"], states)


def held_out_states(
    model: nn.Module, formatter: Formatter, groups: Mapping[str, Sequence[Prompt]]
) -> dict[str, States]:
    """Every block's states at the last prompt token: group -> layer -> (n, H)."""
    every = list(range(len(blocks(model))))
    return {
        name: last_token_states(model, formatter.prompt_batches(prompts, STATES_BATCH), every)
        for name, prompts in groups.items()
    }


def geometry(
    held_out: Mapping[str, States], fit: tuple[States, States], base: Measured | None
) -> dict[str, dict[str, float]]:
    """Per block: distances and norms on held-out prompts, probe fitted on training prompts.

    `spread` is the mean distance of a group's states from their mean; `fisher` as `fisher_ratio`.

    Args:
        held_out: states of the groups `harmful` and `harmless`.
        fit: states of the training prompts, harmful and harmless.
        base: the base model's; None when this is the base model.
    """
    found: dict[str, dict[str, float]] = {}
    for layer in held_out["harmful"]:
        a, b = held_out["harmful"][layer], held_out["harmless"][layer]
        spreads = [(group - group.mean(0)).norm(dim=-1).mean().item() for group in (a, b)]
        row = {
            "distance": mean_distance(a, b).item(),
            "norm": torch.cat([a, b]).norm(dim=-1).mean().item(),
            "probe_accuracy": fit_probe(fit[0][layer], fit[1][layer]).accuracy,
            "spread_harmful": spreads[0],
            "spread_harmless": spreads[1],
            "fisher": fisher_ratio(a, b),
        }
        before = row if base is None else base.separation[str(layer)]
        row["distance_over_base"] = row["distance"] / before["distance"]
        row["norm_ratio"] = row["norm"] / before["norm"]
        found[str(layer)] = row
    return found


def shift_ranks(states: States, base: States, layers: Sequence[int]) -> dict[str, float]:
    """Effective rank (exp of the entropy of the squared singular values) of h - h_base over the
    harmful prompts: 1 means that all moved along one direction."""
    ranks = {}
    for layer in layers:
        energy = torch.linalg.svdvals((states[layer] - base[layer]).double()).square()
        share = energy / energy.sum().clamp_min(1e-30)
        ranks[str(layer)] = float(torch.special.entr(share).sum().exp())
    return ranks


def token_batches(
    formatter: Formatter, prompts: Sequence[Prompt], responses: Sequence[str], batch_size: int
) -> list[dict[str, Tensor]]:
    """Prompts with their responses, padded: what both sides of the KL are computed on."""
    pairs = (formatter.conversation_ids(p, r) for p, r in zip(prompts, responses))
    rows = [[*prompt_ids, *response_ids] for prompt_ids, response_ids in pairs]
    starts = range(0, len(rows), batch_size)
    return [formatter.pad(rows[start : start + batch_size]) for start in starts]


@torch.no_grad()
def final_hidden(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the LM head sees at every token that is no padding: (N, H)."""
    mask = batch["attention_mask"].to(next(model.parameters()).device)
    out = backbone(model)(
        input_ids=batch["input_ids"].to(mask.device),
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
    )
    return out.last_hidden_state[mask.bool()]


class SavedTeacher:
    """The base model's half of the KL on disk: its LM head, and its final hidden states by batch.

    Args:
        folder: where the files are.
        key: what they were made from; files of another key do not count.
    """

    def __init__(self, folder: Path, key: str):
        self._folder, self._key = folder, key
        self._mark = folder / "complete"

    @property
    def complete(self) -> bool:
        """All of `write` has been written."""
        return self._mark.is_file() and self._mark.read_text() == self._key

    def write(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], title: str) -> None:
        """Saves what the base model says about these batches."""
        remove(self._folder)
        self._folder.mkdir(parents=True)
        head = lm_head_of(model)
        tensors = {"weight": head.weight.detach().cpu().clone()}
        if head.bias is not None:
            tensors["bias"] = head.bias.detach().cpu().clone()
        save_file(tensors, self._folder / "head.safetensors")
        for number, batch in enumerate(tqdm(batches, title, unit="batch")):
            hidden = final_hidden(model, batch).cpu().contiguous()
            save_file({"hidden": hidden}, self._folder / f"{number}.safetensors")
        write_text(self._mark, self._key)

    @torch.no_grad()
    def kl(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], title: str) -> float:
        """Mean KL(base || model) in nats over all tokens of the batches that were written."""
        transform = read_transform(causal_lm(model).config)
        student, device = lm_head_of(model), str(next(model.parameters()).device)
        head = load_file(self._folder / "head.safetensors", device=device)
        total = tokens = 0.0
        for number, batch in enumerate(tqdm(batches, title, unit="batch")):
            hidden = final_hidden(model, batch)
            saved = load_file(self._folder / f"{number}.safetensors", device=device)
            total += linear_kl_div(
                hidden,
                student.weight,
                saved["hidden"],
                head["weight"],
                bias=student.bias,
                teacher_bias=head.get("bias"),
                logit_scale=transform.logit_scale,
                softcap=transform.softcap,
                reduction="sum",
            ).item()
            tokens += len(hidden)
        return total / tokens

    def remove(self) -> None:
        """Deletes the files."""
        remove(self._folder)
