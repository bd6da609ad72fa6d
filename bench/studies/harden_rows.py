"""What `es2fast harden` does to a real model, as rows, and docs/harden.md's table made of them.

python bench/studies/harden_rows.py RUN --title "with builtin:misuse" --note "..."   # adds a row
python bench/studies/harden_rows.py --report
python bench/studies/harden_rows.py RUN --adds-to "with builtin:misuse"

A run that `harden` or `train` made and `evaluate` attacked; a row holds the settings that were
varied, the rates of base and hardened model, and the time the training took. With `--adds-to` its
attacks belong to the row of that title. Rows of SCAV from when it was searched while the prompt was
read alone, P0 from 1e-2 to 1e-5, have it as `scav_narrow`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench._harness import Rows, conditions
from bench.studies.real_report import fill, rate_words, table_line
from es2fast.config import load_config
from es2fast.data import model_fingerprint
from es2fast.report.schema import BASE, ModelResult, Report
from es2fast.run.files import read_lines

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "bench" / "results" / "harden.jsonl"
DOCUMENT = ROOT / "docs" / "harden.md"
Row = dict[str, Any]

ATTACKED = {
    "direct": "direct",
    "ablation": "ablation",
    "replacement": "replacement",
    "prefill": "prefill, 5 or 20 tokens",
    "scav_narrow": "SCAV, narrow search",
    "scav": "SCAV, wide search",
    "mean_difference": "mean difference",
}
OTHERS = "others"
KINDS = {
    OTHERS: "JailbreakBench's harmless half refused",
    "borderline": "XSTest's safe half refused",
}


def row_of(run: Path, title: str, note: str, trained: Path | None = None) -> Row:
    """The row of a run folder.

    Args:
        run: evaluated.
        title, note: as they will stand.
        trained: the run's own configuration, where a copy of it was evaluated on others' prompts.

    Raises:
        FileNotFoundError: the run was not evaluated.
    """
    config = load_config(trained or run / "config.yaml")
    report = Report.model_validate_json((run / "report.json").read_text())
    summary = json.loads((run / "train.json").read_text())
    return {
        "title": title,
        "base": Path(config.model.name).name,
        "base_hash": model_fingerprint(config.model.name, config.model.revision),
        "seed": config.train.seed,
        "steps": config.train.steps,
        "lr": config.train.lr,
        "layers": summary["layers"],
        "pairs_per_step": summary["pairs_per_step"],
        "dtype": config.model.dtype,
        "harmful": [Path(source.source).name for source in config.data.harmful],
        "harmless": [Path(source.source).name for source in config.data.harmless],
        "judge": report.judge,
        "tokens": report.max_new_tokens,
        "minutes": round(summary["seconds"] / 60, 1),
        "models": {model.name: _figures(model) for model in report.models},
        "note": note,
    }


def _figures(model: ModelResult) -> Row:
    harmless = model.harmless
    kinds = (harmless.refusal_by or {}).get("kind") or {}
    refused = {kind: [found.n, found.refusal_rate] for kind, found in kinds.items()}
    if rest := harmless.n - sum(n for n, _ in refused.values()):  # of sources without a kind
        count = harmless.n * harmless.refusal_rate - sum(n * rate for n, rate in refused.values())
        refused[OTHERS] = [rest, count / rest]
    return {
        "attacks": {
            name: {"n": found.n, "useful": found.useful, "gibberish": found.gibberish}
            for name, found in model.attacks.items()
        },
        "refused": refused,
        "kl_response": harmless.kl_response,
        "top1_agreement": harmless.top1_agreement,
    }


def table(rows: Sequence[Row]) -> str:
    """Base and every run side by side, in Markdown; rates of useful answers, then the price."""
    base = dict(rows[0]["models"][BASE])
    for row in rows:
        base["attacks"] = row["models"][BASE]["attacks"] | base["attacks"]
    models = [base, *(row["models"]["tuned"] for row in rows)]
    lines = ["| | base | " + " | ".join(row["title"] for row in rows) + " |",
             "|:--|" + "--:|" * len(models)]  # fmt: skip
    tried = {name for model in models for name in model["attacks"]}
    for name, words in ATTACKED.items():
        if name not in tried:
            continue
        lines.append(
            table_line([words, *(_attack(model["attacks"].get(name)) for model in models)])
        )
    asked = models[0]["refused"]
    for kind in sorted(asked, key=lambda kind: [*KINDS, kind].index(kind)):
        count, found = asked[kind][0], [model["refused"].get(kind) for model in models]
        cells = ["–" if one is None else rate_words(one[1], one[0]) for one in found]
        lines.append(table_line([f"{KINDS.get(kind, f'{kind} refused')} (n = {count})", *cells]))
    kl = [f"{model['kl_response']:.4f}" for model in models]
    top = [f"{100 * model['top1_agreement']:.1f} %" for model in models]
    lines.append(table_line(["KL per response token", *kl]))
    lines.append(table_line(["likeliest token as the base's", *top]))
    minutes = [f"{row['minutes']:.0f}" for row in rows]
    lines.append(table_line(["minutes of training", "", *minutes]))
    return "\n".join(lines) + "\n"


def _attack(found: Row | None) -> str:
    if found is None:
        return "–"
    salad = f"; {100 * found['gibberish']:.0f} % gibberish" if found["gibberish"] else ""
    return rate_words(found["useful"], found["n"]) + salad


def joined(rows: Sequence[Row]) -> list[Row]:
    """The rows that are columns, with the attacks of those that add to them.

    Raises:
        ValueError: two columns of a base model with one title, or a row that adds to none.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        place = row["base"], row.get("adds_to", row["title"])
        if ("adds_to" in row) != (place in found):
            raise ValueError(f"{place}: " + ("taken" if place in found else "there is no such row"))
        if "adds_to" not in row:
            found[place] = deepcopy(row)
            continue
        for name, model in found[place]["models"].items():
            model["attacks"] |= row["models"][name]["attacks"]
    return list(found.values())


def document(rows: Sequence[Row]) -> str:
    """docs/harden.md with its tables made anew, one per base model."""
    rows = joined(rows)
    bases = {row["base"] for row in rows}
    return fill(
        DOCUMENT.read_text(),
        {base: table([row for row in rows if row["base"] == base]) for base in bases},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="folder of an evaluated run")
    parser.add_argument("--title", default="hardened", help="of its column")
    parser.add_argument("--note", default="")
    parser.add_argument("--adds-to", help="title of the row to which its attacks belong")
    parser.add_argument("--base", help="the base model's name, if not its folder's")
    parser.add_argument("--config", type=Path, help="with which it was trained, if not its own")
    parser.add_argument("--commit", help="with which it was trained; default: this one")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--report", action="store_true", help="write the document")
    arguments = parser.parse_args()
    if arguments.run is not None:
        row = row_of(arguments.run, arguments.title, arguments.note, arguments.config)
        row["base"] = arguments.base or row["base"]
        if arguments.adds_to:
            row["adds_to"] = arguments.adds_to
        joined([*read_lines(arguments.out), row])
        trained = {"commit": arguments.commit, "dirty": False} if arguments.commit else {}
        Rows(arguments.out, conditions("cpu") | trained).add(**row)
    if arguments.report:
        DOCUMENT.write_text(document(list(read_lines(arguments.out))))


if __name__ == "__main__":
    main()
