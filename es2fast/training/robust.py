"""Simulated attacks during training: the separation and the refusal are demanded under them.

In a share of the steps the harmful rows' hidden states are attacked as the evaluation would attack
them, inside the student's forward. It enters there, and not in the loss alone, because what an
attacker changes is carried on by the blocks above: what is tapped at the next separated block has
read the attacked state, and the loss there asks the blocks between to take the harmful prompt away
again; with a refusal anchor the answer has to refuse all the same.

    mean_difference   h <- h + c (mean_B - mean_A)    at one block, last prompt token onwards
    replacement       h <- mean_B                     at one block, last prompt token
    ablation          h <- h - r r^T h                at every token, in every block (without a
                                                      refusal anchor up to the deepest separated
                                                      one) and what its parts add; r of length 1
                                                      along the difference of the means of one
                                                      block, with blocks: all in the middle
    scav              h <- h + push(h)                at every separated block whose probe is
                                                      accurate enough, last prompt token onwards;
                                                      with blocks: all at one block, the middle
                                                      third or all of them, to a probability drawn
                                                      per step, onwards or at that token alone

Additions are constants of the step, so their gradient is that of the state; a replaced state has
none and an ablated one none along r, as it is for the attacker.

That one block, and c, are every harmful row's own: a step meets as many of an attacker's choices
as it has rows. With one choice for all rows a run of 600 steps met each of fourteen directions of
ablation some seven times.

Means and probes are those of recent clean steps over all ranks, fitted anew every few steps, by an
all-reduce per block and, of the probes that a step needs, on rank 0's CPU, for which everyone
waits. Which step is attacked, by what, and each row where and how strongly, is a function of
(seed, step), so it is the same however the rows are shared out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from es2fast.attacks.states.scav import Scav
from es2fast.config import Config
from es2fast.distributed.runtime import Runtime
from es2fast.modeling.taps import Intervention, Where
from es2fast.probing.probes import Probe
from es2fast.training.bank import part_rows
from es2fast.transfer import to_device

FEWEST = 4  # states per group that a probe is fitted on
_WHERE: dict[str, Where] = {"replacement": "last", "ablation": "all"}  # others: onwards
_SCAV_WHERE: list[Where] = ["last", "onwards"]  # with `blocks: all`
_AIMS = (1e-5, 1e-2)  # range of scav's probability with `blocks: all`; its search tries 0.3 too


@dataclass(frozen=True)
class _Drawn:
    """An attack of a step."""

    name: str
    layers: list[int]  # blocks that its rows have in turn; scav, not in_turn: all at once
    strengths: list[float]  # of each row; scav: the probability aimed at
    where: Where
    in_turn: bool = True


class SimulatedAttack:
    """Decides, per step, whether and how the harmful states are attacked.

    Args:
        config: `separation.robust`, the seed, and how many rows a step has.
        layers: the separated blocks.
        runtime: ranks that share the states.
        depth: number of the model's blocks, for `blocks: all` and the ablation; default: no more
            than the separated ones are known.
    """

    def __init__(
        self, config: Config, layers: Sequence[int], runtime: Runtime, depth: int | None = None
    ):
        self._settings = config.separation.robust
        self._seed = config.train.seed
        train = config.train
        self._rows = train.micro_batch_size * train.gradient_accumulation * runtime.world_size
        self._layers = list(layers)
        self._runtime = runtime
        self._reached = _reached(config, layers, depth)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._fitted: int | None = None
        self._means: dict[int, tuple[Tensor, Tensor]] = {}
        self._probes: dict[int, Probe] = {}

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`: this rank's kept states, and what was last fitted."""
        return {
            "kept": {str(layer): list(pair) for layer, pair in self._kept.items()},
            "means": {str(layer): list(pair) for layer, pair in self._means.items()},
            "fitted": self._fitted,
            "probes": {str(layer): dict(vars(probe)) for layer, probe in self._probes.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was at `state_dict`."""
        device = self._runtime.device
        self._kept = {int(k): (a.to(device), b.to(device)) for k, (a, b) in state["kept"].items()}
        self._means = {int(k): (a.to(device), b.to(device)) for k, (a, b) in state["means"].items()}
        self._fitted = state["fitted"]
        self._probes = {int(k): _on(Probe(**probe), device) for k, probe in state["probes"].items()}

    def parted(self, states: list[dict[str, Any]], rank: int) -> dict[str, Any]:
        """The state of `rank` from those of other ranks, in their order."""
        kept = part_rows([state["kept"] for state in states], rank, self._runtime.world_size)
        return states[0] | {"kept": kept}

    def for_step(self, step: int) -> Intervention | None:
        """The attack of optimizer step `step`, or None for a clean one; call on every rank."""
        drawn = self._drawn(step)
        if drawn is None or not self._known():
            return None
        if self._fitted is None or step - self._fitted >= self._settings.refit_every:
            self._fit()
            self._fitted = step
        return self._scav(drawn) if drawn.name == "scav" else self._made(drawn)

    def where(self, step: int) -> Where | None:
        """Where the attack of optimizer step `step` acts, if that is not a clean one for want of
        states; None for a clean one. Known before the steps up to it."""
        drawn = self._drawn(step)
        return None if drawn is None else drawn.where

    def _drawn(self, step: int) -> _Drawn | None:
        settings = self._settings
        if not settings.probability:
            return None
        draw = random.Random(f"{self._seed}/robust/{step}")
        attacked = draw.random() < settings.probability
        name = draw.choice(settings.attacks)
        layers = self._candidates(name)
        draw.shuffle(layers)
        strengths = [draw.uniform(*settings.strength) for _ in range(self._rows)]
        if not attacked:
            return None
        if name == "scav":
            return self._drawn_scav(draw, layers)
        return _Drawn(name, layers[: self._rows], strengths, _WHERE.get(name, "onwards"))

    def _drawn_scav(self, draw: random.Random, layers: list[int]) -> _Drawn:
        """Blocks, probability and tokens as the attacker may choose them; at the separated blocks
        alone its plain form."""
        if self._settings.blocks == "separated":
            return _Drawn("scav", layers, [Scav.usual], "onwards", in_turn=False)
        low, high = (math.log(one) for one in _AIMS)
        aim, where = math.exp(draw.uniform(low, high)), draw.choice(_SCAV_WHERE)
        shape, depth = draw.choice(["single", "middle", "all"]), len(layers)
        if shape == "middle":
            layers = [i for i in layers if depth <= 3 * i < 2 * depth] or layers
        in_turn = shape == "single"
        return _Drawn("scav", layers[: self._rows] if in_turn else layers, [aim], where, in_turn)

    def _candidates(self, name: str) -> list[int]:
        """Blocks that rows take in turn, in an order drawn per step. An ablated direction is found
        in the middle, as the attacker finds it: the first blocks' does nothing, and the last ones'
        is not looked at (arXiv 2406.11717, l < 0.8 L)."""
        if self._settings.blocks == "separated":
            return list(self._layers)
        depth = len(self._reached)
        middle = [i for i in self._reached if 0.25 * depth <= i < 0.8 * depth]
        return middle if name == "ablation" and middle else list(self._reached)

    def _known(self) -> bool:
        """There are states to fit on; as many on every rank, so all ranks say the same."""
        fewest = FEWEST if "scav" in self._settings.attacks else 1
        counts = [len(rows) for pair in self._kept.values() for rows in pair]
        return min(counts, default=0) * self._runtime.world_size >= fewest

    def observe(self, outputs: dict[int, Tensor], num_harmful: int) -> None:
        """Keeps the block outputs (layer -> (n + m, H), harmful first) of a clean micro-batch."""
        if not self._settings.probability:
            return
        most = -(-self._settings.states // self._runtime.world_size)
        for layer, rows in outputs.items():
            new = (rows[:num_harmful].float(), rows[num_harmful:].float())
            old = self._kept.get(layer, (new[0][:0], new[1][:0]))
            a, b = (torch.cat(pair)[-most:] for pair in zip(old, new))
            self._kept[layer] = (a, b)

    def _scav(self, drawn: _Drawn) -> Intervention:
        if missing := [i for i in sorted(drawn.layers) if i not in self._probes]:
            self._fit_probes(missing)
        scav = Scav()
        scav.probes = {i: self._probes[i] for i in sorted(drawn.layers)}
        scav.strength = drawn.strengths[0]
        block = to_device(torch.tensor(drawn.layers), self._runtime.device)

        def changed(i: int, states: Tensor, rows: Tensor) -> Tensor:
            push = scav.push(i, states.detach())
            if drawn.in_turn:
                push = push * (block.to(rows.device)[rows % len(block)] == i)[:, None]
            return states + push

        return Intervention(frozenset(scav.layers()), changed, drawn.where, drawn.name)

    def _made(self, drawn: _Drawn) -> Intervention:
        name, layers, strengths = drawn.name, drawn.layers, drawn.strengths
        harmful, harmless = (torch.stack([self._means[i][side] for i in layers]) for side in (0, 1))
        gaps, turns = harmless - harmful, len(layers)
        if name == "ablation":
            units = gaps / gaps.norm(dim=1, keepdim=True).clamp_min(1e-12)

            def ablated(i: int, states: Tensor, rows: Tensor) -> Tensor:
                r = units.to(states.device)
                own = rows[:, None] % turns == torch.arange(turns, device=rows.device)
                return states - (states @ r.t() * own) @ r  # no (k, H) is kept for the backward

            return Intervention(frozenset(self._reached), ablated, drawn.where, name, inside=True)
        block = to_device(torch.tensor(layers), gaps.device)
        strength = to_device(torch.tensor(strengths), gaps.device)

        def changed(i: int, states: Tensor, rows: Tensor) -> Tensor:
            turn, device = rows % turns, states.device
            if name == "replacement":
                new = harmless.to(device)[turn]
            else:
                size = strength.to(device)[rows % len(strengths)]
                new = states + size[:, None] * gaps.to(device)[turn]
            return torch.where((block.to(device)[turn] == i)[:, None], new, states)

        return Intervention(frozenset(layers), changed, drawn.where, name)

    def _fit(self) -> None:
        """Means of all ranks' states; probes are out of date then."""
        for layer in sorted(self._kept):
            pair = []
            for rows in self._kept[layer]:
                total = self._runtime.sum(rows.sum(0))
                pair.append(total / (len(rows) * self._runtime.world_size))
            self._means[layer] = (pair[0], pair[1])
        self._probes = {}

    def _fit_probes(self, layers: list[int]) -> None:
        """Probes of these blocks, of all ranks' states; on rank 0, sent to the others."""
        groups: tuple[dict[int, Tensor], dict[int, Tensor]] = ({}, {})
        for layer in layers:
            for group, rows in zip(groups, self._kept[layer]):
                if shards := self._runtime.gather_rows(rows):
                    group[layer] = torch.cat(shards)
        found = self._runtime.on_main(_fitted_probes, *groups)
        self._probes |= {k: _on(probe, self._runtime.device) for k, probe in found.items()}


def attacked_blocks(config: Config, layers: Sequence[int], depth: int) -> list[int]:
    """Blocks at whose outputs the run's simulated attacks may act, the separated ones included."""
    robust = config.separation.robust
    if not robust.probability:
        return list(layers)
    wide = robust.blocks == "all" or "ablation" in robust.attacks
    return _reached(config, layers, depth) if wide else list(layers)


def _reached(config: Config, layers: Sequence[int], depth: int | None) -> list[int]:
    """Blocks that harmful rows pass through: all with a refusal anchor, else those up to the
    deepest separated one."""
    if depth is None:
        return list(layers)
    return list(range(depth if config.refusal.weight else max(layers) + 1))


def _on(probe: Probe, device: torch.device) -> Probe:
    return replace(probe, weight=probe.weight.to(device))


def _fitted_probes(harmful: dict[int, Tensor], harmless: dict[int, Tensor]) -> dict[int, Probe]:
    attack = Scav()
    attack.fit(harmful, harmless)
    return attack.probes
