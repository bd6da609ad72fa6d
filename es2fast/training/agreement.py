"""Ranks that were started with different runs: told at once, before they wait for each other."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version

from es2fast.data import model_fingerprint
from es2fast.data.prompts import Prompt
from es2fast.data.sources import one_line
from es2fast.distributed.runtime import Runtime
from es2fast.errors import UserError
from es2fast.run.identity import weighty
from es2fast.training.plan import Plan

MOST_NAMED = 8
REMEDIES = {
    "configuration": "start every node with the same file and the same key=value arguments",
    "versions": "install the same packages on every node",
    "data": "give every node the same prompt files",
    "chat template": "give every node the same tokenizer and data.chat_template",
    "base model": "give every node the same model.name and revision",
}


def check_agreement(plan: Plan, runtime: Runtime) -> None:
    """Compares what each rank has planned; call on every rank. One exchange of five hashes.

    Raises:
        UserError: on every rank, with the first thing that is not the same, and who has it.
    """
    everyone = runtime.gather_objects(_hashes(plan))
    for name in everyone[0]:
        if len({found[name] for found in everyone}) > 1:
            values = [found[name] for found in everyone]
            told = f": {_fields(plan, runtime)}" if name == "configuration" else ""
            raise UserError(
                f"the ranks disagree on the {name}{told}: {_sides(values)}; {REMEDIES[name]}"
            )


def _hashes(plan: Plan) -> dict[str, str]:
    """Of this rank, the quick and telling ones first."""
    config, groups = plan.config, plan.groups
    rows = [[_row(p) for p in group] for group in (groups.harmful, groups.harmless)]
    packages = {name: version(name) for name in ("es2fast", "torch", "transformers", "deepspeed")}
    return {
        "configuration": _hash(weighty(config)),
        "versions": ", ".join(f"{name} {number}" for name, number in packages.items()),
        "data": _hash(rows),
        "chat template": plan.formatter.template_hash,
        "base model": model_fingerprint(config.model.name, config.model.revision)[:16],
    }


def _row(prompt: Prompt) -> list[object]:
    return [prompt.messages, prompt.response]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _fields(plan: Plan, runtime: Runtime) -> str:
    """By which the ranks' configurations differ from rank 0's, with both values."""
    everyone = [weighty(config) for config in runtime.gather_objects(plan.config)]
    named = [
        f"{name} ({one_line(everyone[0].get(name), 30)} or {one_line(own.get(name), 30)})"
        for own in everyone[1:]
        for name in dict.fromkeys([*everyone[0], *own])
        if everyone[0].get(name) != own.get(name)
    ]
    return ", ".join(dict.fromkeys(named[:MOST_NAMED]))


def _sides(values: list[str]) -> str:
    """Which ranks have which value."""
    sides = []
    for value in dict.fromkeys(values):
        ranks = [str(rank) for rank, own in enumerate(values) if own == value]
        more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
        word = "rank" if len(ranks) == 1 else "ranks"
        verb = "has" if len(ranks) == 1 else "have"
        sides.append(f"{word} {', '.join(ranks[:MOST_NAMED])}{more} {verb} {value}")
    return "; ".join(sides[:MOST_NAMED])
