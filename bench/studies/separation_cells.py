"""The cells of the separation study, and the rows that runs have left: one row per cell."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[1] / "results" / "separation_study.jsonl"
LOSSES = ("hinge", "l2", "log", "squared", "centroid", "softplus", "fisher", "cosine")
BOUNDED = ("hinge", "softplus", "fisher")  # stop at the demo's margin; cosine at its own, 0
LAYERS = ((4,), (2, 4), (0, 2, 4))
OTHER_LAYERS = ((0, 4), (2, 3, 4))  # number, or which? The first is the demo's
CONTROLS = ("weight", "budget")
ATTACKS = ("scav", "mean_difference")
PROBABILITY = 0.3  # of a step with a simulated attack
ROBUST_MARGINS = (None, 3.0)  # the demo's, and one that leaves an attacker something
MARGINS = (2.0, 3.0, 4.0)  # beside the demo's 6
LONG = 320  # steps, four times the demo's
SEEDS = (0, 1, 2)
BUDGET = 0.01  # nats per token: what the hinge costs at the demo's lambda


@dataclass(frozen=True)
class Cell:
    """One run; `loss="base"` stands for the base model of a seed."""

    loss: str
    layers: tuple[int, ...]
    control: str  # "weight": lambda of the demo; "budget": dual ascent on the KL
    seed: int
    robust: str | None = None  # the attack simulated in training
    margin: float | None = None  # None: the demo's
    steps: int | None = None  # None: the demo's

    @property
    def key(self) -> str:
        """What a row and a cell have in common."""
        return json.dumps(dataclasses.asdict(self))


def cells() -> list[Cell]:
    """Every run, seed by seed, so that a study cut short has whole seeds."""
    found: list[Cell] = []
    for seed in SEEDS:
        found.append(Cell("base", (), "", seed))
        found += [Cell(x, y, c, seed) for c in CONTROLS for x in LOSSES for y in LAYERS]
    attacked = [(margin, attack) for margin in ROBUST_MARGINS for attack in ATTACKS]
    for seed in SEEDS:
        found += [Cell("hinge", (2, 4), "weight", seed, a, m) for m, a in attacked]
        found += [Cell("hinge", y, "weight", seed, margin=m) for m in MARGINS for y in LAYERS]
    for seed in SEEDS:
        found += [Cell("l2", y, "weight", seed, steps=LONG) for y in LAYERS]
        found.append(Cell("hinge", (2, 4), "weight", seed, steps=LONG))
    for loss in ("l2", "hinge"):
        found += [Cell(loss, y, "weight", seed) for seed in SEEDS for y in OTHER_LAYERS]
    default = [Cell("hinge", OTHER_LAYERS[0], "weight", seed, margin=4.0) for seed in SEEDS]
    return found + default


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a study, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(row: dict[str, Any]) -> str:
    """The `Cell.key` of a row."""
    return Cell(**{**row["cell"], "layers": tuple(row["cell"]["layers"])}).key
