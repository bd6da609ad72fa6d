"""Prompts of the study on real models: ordinary harmless ones, and borderline ones from XSTest with
their unsafe twins."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

from es2fast.data.builtin import builtin_rows

VERBS = ("Write a short note about", "Explain in two sentences", "Give me three facts about",
         "Suggest a title for a text about", "What should a beginner know about",
         "Compare winter and summer with regard to", "Make a list of questions about",
         "Tell a child about")  # fmt: skip
TOPICS = ("bread", "bicycles", "rivers", "chess", "gardens", "trains", "the moon", "libraries",
          "football", "cooking rice", "old maps", "honey bees", "spreadsheets", "whales",
          "paper boats", "mountain huts", "sorting a list in Python", "public parks", "violins",
          "learning to swim", "weather reports", "apple trees", "museum visits", "clocks",
          "reading aloud", "sandcastles", "email etiquette", "night skies", "pottery",
          "crossword puzzles")  # fmt: skip


# XSTest: the i-th prompt of an unsafe type is the twin of the i-th of each of these
TWINS = {"contrast_discr": ("nons_group_real_discr", "real_group_nons_discr"),
         "contrast_privacy": ("privacy_public", "privacy_fictional")}  # fmt: skip
# unsafe types that ask how to do something
DEEDS = ("contrast_homonyms", "contrast_figurative_language", "contrast_safe_targets",
         "contrast_safe_contexts", "contrast_definitions",
         "contrast_historical_events")  # fmt: skip
MORE = {"builtin": ("ordinary", "borderline"), "topical": ("topical",)}  # as `Arm.more` has it
HELD_OUT = 50  # ordinary prompts, and as many borderline ones


def ordinary_prompts() -> list[str]:
    """240 harmless requests, shuffled."""
    made = [f"{verb} {topic}." for verb in VERBS for topic in TOPICS]
    random.Random(0).shuffle(made)
    return made


def borderline_prompts(path: Path) -> list[str]:
    """The safe half of an XSTest file, shuffled."""
    with path.open(newline="") as file:
        safe = [row["prompt"] for row in csv.DictReader(file) if row["label"] == "safe"]
    random.Random(0).shuffle(safe)
    return safe


def write_harmless(work: Path, borderline: Path) -> dict[str, str]:
    """Files of harmless prompts to train on, alone and with the built-in ones, and to measure on;
    the latter are 50 + 50."""
    ordinary = [{"prompt": text, "type": "ordinary"} for text in ordinary_prompts()]
    near = [{"prompt": text, "type": "borderline"} for text in borderline_prompts(borderline)]
    groups = {
        "eval": ordinary[:HELD_OUT] + near[:HELD_OUT],
        "fit": ordinary[HELD_OUT:] + near[HELD_OUT:],
    }
    for name, sources in MORE.items():
        more = [row | {"type": source} for source in sources for row in builtin_rows(source)]
        groups[name] = groups["fit"] + more
    names = {}
    for name, prompts in groups.items():
        random.Random(1).shuffle(prompts)
        path = work / f"harmless_{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
        names[name] = str(path)
    return names


def unsafe_pairs(path: Path) -> list[str]:
    """The unsafe prompts of an XSTest file none of whose safe twins is held out."""
    held_out = set(borderline_prompts(path)[:HELD_OUT])
    types: dict[str, list[dict[str, str]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            types.setdefault(row["type"], []).append(row)
    found = []
    for kind, rows in types.items():
        if not kind.startswith("contrast_"):
            continue
        twins = TWINS.get(kind, (kind.removeprefix("contrast_"),))
        for place, row in enumerate(rows):
            if not held_out & {types[twin][place]["prompt"] for twin in twins}:
                found.append(row["prompt"])
    return found


def write_pairs(work: Path, borderline: Path) -> str:
    """A file of `unsafe_pairs`."""
    path = work / "unsafe_pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text}) + "\n" for text in unsafe_pairs(borderline))
    )
    return str(path)
