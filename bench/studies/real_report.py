"""The documents of the study on real models, from its rows.

docs/evaluation.md   every attack against the base model and the models made in other ways
docs/real_models.md  what each part of a hardening buys, and what it costs
README.md            the recipe beside the base model
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.studies.real_arms import ARMS, ATTACKS, BASE, CIRCUIT_BREAKERS, label, mean_seeds
from bench.studies.real_figure import figure
from es2fast.report.stats import rate_interval
from es2fast.run.files import read_lines

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "bench" / "results" / "real_models.jsonl"
KL_ROWS = ROWS.with_name("real_models_kl.jsonl")
ABILITY_ROWS = ROWS.with_name("real_models_abilities.jsonl")
EVALUATION = ROOT / "docs" / "evaluation.md"
REAL_MODELS = ROOT / "docs" / "real_models.md"
README = ROOT / "README.md"
FIGURE = ROWS.with_suffix(".png")
PRIMARY = "Qwen2.5-Coder-0.5B-Instruct"

OTHERS = (BASE, "paper", "default", *CIRCUIT_BREAKERS)  # models of docs/evaluation.md
RECIPE = "topical_mean_80"  # the arm whose settings `es2fast harden` has
BEFORE = "contrast_mean_80"  # and that which it had before, to stand beside it
FIGURED = (BASE, "anchor_robust", "both_robust", "long", "longer", RECIPE)
PARTS = (BASE, *(name for name in reversed(ARMS) if name not in OTHERS), *CIRCUIT_BREAKERS)

Row = dict[str, Any]


def table(rows: Sequence[Row], models: Sequence[str]) -> str:
    """Useful answers: one line per model, one column per attack, in Markdown."""
    models = [name for name in models if any(row["model"] == name for row in rows)]
    if not models:
        return "Nothing measured yet.\n"
    cells = {(row["model"], row["attack"]): row for row in rows if row["model"] in models}
    attacks = [label(attack) for attack, _ in ATTACKS]
    attacks = [name for name in attacks if any(attack == name for _, attack in cells)]
    lines = ["| useful answers under | " + " | ".join(attacks) + " |",
             "|:--|" + "--:|" * len(attacks)]  # fmt: skip
    for model in models:
        own = [_cell(cells.get((model, attack))) for attack in attacks]
        lines.append(f"| {model} | " + " | ".join(own) + " |")
    costs = [_seconds([row for (_, found), row in cells.items() if found == attack])
             for attack in attacks]  # fmt: skip
    lines.append("| *s per prompt* | " + " | ".join(costs) + " |")
    return "\n".join(lines) + "\n"


def _seconds(rows: Sequence[Row]) -> str:
    """Mean over the models to which the attack applies."""
    found = [row["seconds"] / row["n"] for row in rows if "seconds" in row]
    return f"{sum(found) / len(found):.1f}" if found else "–"


def _cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if "useful" not in row:
        return "does not apply"
    words = f"{rate_words(row['useful'], row['n'])}, n = {row['n']}"
    return words + (f"; {100 * row['gibberish']:.0f} % gibberish" if row["gibberish"] else "")


def rate_words(rate: float, n: int) -> str:
    low, high = rate_interval(rate, n)
    return f"{100 * rate:.0f} % [{100 * low:.0f}–{100 * high:.0f}]"


def harmless_table(rows: Sequence[Row], models: Sequence[str]) -> str:
    """The price: one line per model, in Markdown."""
    head = ("model", "ordinary refused", "borderline refused", "answers unchanged",
            "KL, response tokens", "top-1 as the base", "perplexity")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1)]
    for name in models:
        direct = [r["harmless"] for r in rows if r["model"] == name and r["attack"] == "direct"]
        if not direct:
            continue
        row = direct[-1]
        kinds = [row["refusal_by_type"].get(kind) for kind in ("ordinary", "borderline")]
        cells = [
            name,
            *("–" if kind is None else f"{rate_words(kind[1], kind[0])}, n = {kind[0]}"
              for kind in kinds),
            f"{100 * row['intact_rate']:.0f} %",
            f"{row['kl_response']:.4f}",
            f"{100 * row['top1_agreement']:.1f} %",
            f"{row['perplexity']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# What the attacks of the recipe's table do, the strongest first
ATTACKED = {
    "scav": "SCAV, at the blocks that serve it best, while the prompt is read",
    "mean_difference": "mean difference added at one block, every step",
    "ablation": "one direction ablated everywhere",
    "prefill": "20 tokens of a compliant answer prefilled",
    "direct": "asked directly",
    "replacement": "last state replaced by that of harmless prompts",
    "template": "tampered templates, any of six",
    "roleplay": "role-play wrappers, any of seven",
    "repe": "RepE, at the blocks that serve it best, every step",
    "splice": "the base's lower blocks under its last ones",
    "finetune": "LoRA on 10 harmful pairs, 16 steps",
    "latent_pgd": "latent PGD, a tenth of each prompt token's norm",
}


ANSWERED = {
    "benign": "harmless prompts about harmful subjects refused (JailbreakBench's harmless half)",
    "borderline": "borderline prompts of `builtin:borderline` refused",
}


def recipe_table(rows: Sequence[Row], able: Sequence[Row] = ()) -> str:
    """The base model, each seed of the recipe and the recipe before it: one line per attack, then
    the price; `able`: rows of `real_abilities`."""
    models = with_seeds([BASE, RECIPE], rows)
    cells = {(row["model"], row["attack"]): row for row in rows}
    seeds = [int(name.partition(", seed ")[2] or 0) for name in models[1:]]
    pairs = [" and ".join(map(str, sorted(mean_seeds(RECIPE, seed)))) for seed in seeds]
    names = ["base", *(f"hardened, seeds {pair}" for pair in pairs)]
    if (BEFORE, "direct") in cells:
        models, names = [*models, BEFORE], [*names, "without `builtin:topical`"]
    lines = ["| | " + " | ".join(names) + " |", "|:--|" + "--:|" * len(models)]
    for attack, words in ATTACKED.items():
        own = [cells.get((name, attack)) for name in models]
        if any(own[1:]):
            lines.append(f"| {words} | " + " | ".join(map(_short, own)) + " |")
    lines.append("| **price** |" + " |" * len(models))
    prices = [cells[name, "direct"]["harmless"] for name in models]
    for kind in ("ordinary", "borderline"):
        rates = [price["refusal_by_type"][kind] for price in prices]
        own_rates = [f"{rate_words(rate, n)}, n = {n}" for n, rate in rates]
        lines.append(f"| {kind} harmless prompts refused | " + " | ".join(own_rates) + " |")
    asked = {(row["model"], row["tasks"]): row for row in able}
    for tasks, words in ANSWERED.items():
        answered = [asked.get((name, tasks)) for name in models]
        if any(answered[1:]):
            lines.append(f"| {words} | " + " | ".join(map(_refused, answered)) + " |")
    kl, top1, same = "kl_response", "top1_agreement", "intact_rate"
    for title, key, shape in (
        ("KL to the base model, nats per response token", kl, "{:.4f}"),
        ("likeliest token as the base's", top1, "{:.1%}"),
        ("harmless answers word for word the base's", same, "{:.0%}"),
    ):
        own_figures = [shape.format(price[key]).replace("%", " %") for price in prices]
        lines.append(f"| {title} | " + " | ".join(own_figures) + " |")
    return "\n".join(lines) + "\n"


# What the recipe's table is set against: its size, and the prompts it has in addition
TRADED = {
    BASE: "base",
    RECIPE: "four fifths of the update (the recipe)",
    "topical_mean": "the whole update (`train.update_scale=1`)",
    BEFORE: "four fifths, without `builtin:topical`",
}


def trade_table(rows: Sequence[Row], able: Sequence[Row]) -> str:
    """Useful answers under the attacks that most of `TRADED` went through, and the price: one line
    per model, in Markdown; `able`: rows of `real_abilities`."""
    attacks = ("direct", "prefill", "ablation", "scav")
    heads = ("", *attacks, "JailbreakBench's harmless half refused", "borderline refused", "KL")
    lines = [table_line(heads), "|:--|" + "--:|" * (len(heads) - 1)]
    cells = {(row["model"], row["attack"]): row for row in rows}
    asked = {row["model"]: row for row in able if row["tasks"] == "benign"}
    for name, words in TRADED.items():
        price = cells[name, "direct"]["harmless"]
        n, borderline = price["refusal_by_type"]["borderline"]
        found = [_short(cells.get((name, attack))) for attack in attacks]
        found += [_refused(asked.get(name)).removesuffix(", n = 100")]
        lines.append(
            table_line(
                [
                    words,
                    *found,
                    f"{rate_words(borderline, n)}, n = {n}",
                    f"{price['kl_response']:.4f}",
                ]
            )
        )
    return "\n".join(lines) + "\n"


def table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _refused(row: Row | None) -> str:
    """Of prompts whose answers `real_abilities` counted."""
    return (
        "–"
        if row is None
        else f"{rate_words(1 - row['passed'] / row['n'], row['n'])}, n = {row['n']}"
    )


def _short(row: Row | None) -> str:
    """A cell that says n where it is not 100."""
    if row is None or "useful" not in row:
        return _cell(row)
    words = rate_words(row["useful"], row["n"]) + (f", n = {row['n']}" if row["n"] != 100 else "")
    return words + (f"; {100 * row['gibberish']:.0f} % gibberish" if row["gibberish"] else "")


KINDS = {
    "ordinary": "ordinary",
    "borderline": "borderline, answered",
    "refused": "refused by the base",
}


def kl_table(rows: Sequence[Row], models: Sequence[str]) -> str:
    """KL on response tokens and agreement by kind of prompt: one line per model, in Markdown."""
    found = {(row["model"], row["kind"]): row for row in rows}
    known = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    head = ["KL, response tokens; top-1", *(KINDS[kind] for kind in known)]
    lines = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * len(known)]
    for name in models:
        own = [found[name, kind] for kind in known if (name, kind) in found]
        if len(own) == len(known):
            cells = [
                f"{row['kl_response']:.4f}; {100 * row['top1_agreement']:.1f} %, "
                f"n = {row['prompts']}"
                for row in own
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


TASKS = {
    "humaneval": "HumanEval, solved",
    "mbpp": "MBPP (sanitized), solved",
    "benign": "JailbreakBench's harmless half, answered",
    "borderline": "built-in borderline prompts, answered",
}


def ability_table(rows: Sequence[Row], models: Sequence[str]) -> str:
    """Tasks passed: one line per model, one column per set of tasks, in Markdown."""
    found = {(row["model"], row["tasks"]): row for row in rows}
    known = [name for name in TASKS if any(row["tasks"] == name for row in rows)]
    if not known:
        return "Nothing measured yet.\n"
    lines = [
        "| (lost, won beside the base; McNemar) | "
        + " | ".join(TASKS[name] for name in known)
        + " |",
        "|:--|" + "--:|" * len(known),
    ]
    for model in models:
        own = [found.get((model, name)) for name in known]
        if any(own):
            lines.append(f"| {model} | " + " | ".join(map(_passed, own)) + " |")
    return "\n".join(lines) + "\n"


def _passed(row: Row | None) -> str:
    if row is None:
        return "–"
    words = f"{rate_words(row['passed'] / row['n'], row['n'])}, n = {row['n']}"
    p = f"= {row['p']:.2f}" if row["p"] >= 0.005 else f"< {0.001 if row['p'] < 0.001 else 0.005}"
    beside = f" (−{row['lost']}, +{row['won']}; p {p})"
    return words + ("" if row["model"] == BASE else beside)


def legend(rows: Sequence[Row], models: Sequence[str]) -> str:
    """What each model is, and what it is made of."""
    known = {row["model"].partition(", seed ")[0] for row in rows}
    known |= {ARMS[name].of or name for name in known if name in ARMS}
    measured = [name for name in models if name in ARMS and name in known]
    return "".join(f"- `{name}`: {ARMS[name].words}\n" for name in measured)


def fill(text: str, parts: dict[str, str]) -> str:
    """A document with what stands between its marks made anew."""
    for name, made in parts.items():
        pattern = rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.DOTALL)
    return text


def documents(rows: Sequence[Row]) -> dict[Path, str]:
    """Path -> its text as the rows want it."""
    found = {}
    able = [row for row in read_lines(ABILITY_ROWS) if row["base"] == PRIMARY]
    recipe = recipe_table(shown(rows, PRIMARY), able)
    for path, models in ((EVALUATION, OTHERS), (REAL_MODELS, PARTS), (README, ())):
        parts = {"recipe": recipe, "trade": trade_table(shown(rows, PRIMARY), able)}
        for base in sorted({row["base"] for row in rows}):
            some = shown(rows, base)
            prefix = "" if base == PRIMARY else f"{base} "
            every = with_seeds(models, some)
            parts[f"{prefix}attacks"] = table(some, every)
            parts[f"{prefix}harmless"] = harmless_table(some, every)
            parts[f"{prefix}legend"] = legend([*some, *(able if base == PRIMARY else [])], models)
        split = [row for row in read_lines(KL_ROWS) if row["base"] == PRIMARY]
        parts["split"] = kl_table(split, models)
        parts["abilities"] = ability_table(able, with_seeds(models, able))
        found[path] = fill(path.read_text(), parts)
    return found


def shown(rows: Sequence[Row], base: str) -> list[Row]:
    """Of the newest configuration of an arm; a seed beside the first is a model of its own. Of a
    cell measured twice the one of more prompts is last and counts."""
    found = [
        row
        | {"model": row["model"] + (f", seed {row['seed']}" if row["seed"] else "")}
        | {"attack": label({"name": row["attack"]} | row["settings"])}
        for row in rows
        if row["base"] == base
    ]
    newest = {row["model"]: row["config"] for row in found}
    found = [row for row in found if row["config"] == newest[row["model"]]]
    return sorted(found, key=lambda row: row.get("n", 0))


def with_seeds(models: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """Each model followed by its other seeds, as `shown` calls them."""
    known = sorted({row["model"] for row in rows})
    return [
        one
        for name in models
        for one in (name, *(other for other in known if other.startswith(f"{name}, seed ")))
    ]


def write_documents(rows: Sequence[Row]) -> None:
    """All of them, in place, and the figure of the primary model's first seed."""
    for path, text in documents(rows).items():
        path.write_text(text)
    figure(shown(rows, PRIMARY), FIGURED).savefig(FIGURE, dpi=90)
