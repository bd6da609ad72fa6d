"""What does each attack get out of a real chat model, before and after training, and at what cost?

    python bench/studies/real_models.py --model DIR --fit-harmful advbench.csv \\
        --harmful jailbreakbench.csv --borderline xstest.csv --work DIR   # goes on where it stopped
    python bench/studies/real_models.py --report           # docs/real_models.md, docs/evaluation.md

One row per model and attack in bench/results/real_models.jsonl, with what the model does with
harmless prompts beside it. The cells are in `real_arms`, essential ones first, so that a study
which is cut short has these; `--only base,both` or `--attacks direct,prefill` takes a part. Answers
of the models, and the models, stay in the working folder.

The base model's weights are given on the command line; the tuned ones are trained from it. Ordinary
harmless prompts are made here from a few verbs and topics; harmless prompts, to train on and held
out, are half ordinary and half borderline (XSTest, safe). Some arms train on XSTest's unsafe half
as well. The judge is `rules`; with `--judge rules+ppl` attacks that search are fitted by it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench._harness import Rows, conditions
from bench.studies.circuit_breaker import circuit_breaker
from bench.studies.real_arms import (
    ARMS,
    ATTACKS,
    BASE,
    CIRCUIT_BREAKERS,
    TRAINING,
    answer_tokens,
    as_then,
    mean_seeds,
)
from bench.studies.real_prompts import DEEDS, write_harmless, write_pairs
from bench.studies.real_report import ROWS, write_documents
from es2fast.config import Config, load_config, merged, parse_config, save_config
from es2fast.data import model_fingerprint
from es2fast.distributed.launch import launch
from es2fast.evaluation.run import evaluate_paths
from es2fast.report.schema import AttackResult, ModelResult, Report
from es2fast.run.average import average_runs
from es2fast.run.export import scale_adapter
from es2fast.run.files import read_lines, remove
from es2fast.run.folder import RunFolder
from es2fast.training.update_filter import filter_adapter

PROMPTS = 160  # training prompts per group: what the steps of an arm can see
JUDGE = "rules"  # whose rates the documents have


def configuration(
    arguments: argparse.Namespace, name: str, changes: dict[str, Any] | None = None
) -> Config:
    """The run that makes a model; with the arm's changes, and `changes` on top of them."""
    harmless = write_harmless(arguments.work, arguments.borderline)
    folder = f"{name}-seed{arguments.seed}" if arguments.seed else name
    raw: dict[str, Any] = {
        "model": {"name": str(arguments.model), "dtype": arguments.dtype},
        "data": {
            "harmful": {"source": str(arguments.fit_harmful), "limit": PROMPTS},
            "harmless": {"source": harmless["fit"], "limit": PROMPTS},
            "eval_harmful": str(arguments.harmful),
            "eval_harmless": harmless["eval"],
            "max_response_tokens": arguments.tokens,
            "response_batch_size": 40,
            "cache_dir": str(arguments.work / "responses"),
        },
        "evaluate": {
            "max_new_tokens": arguments.tokens,
            "batch_size": 50,
            "fit_limit": 64,
            "limit": arguments.limit,
            "judge": arguments.judge,
        },
        "output_dir": str(arguments.work / folder),
    }
    raw = merged(raw, TRAINING)
    if name in ARMS:
        arm = ARMS[name]
        raw = merged(raw, ARMS[arm.of or name].changes)
        raw["train"] |= {"update_scale": arm.scale, "update_filter": arm.filter}
        unsafe: dict[str, Any] = {}
        match ARMS[arm.of or name].contrast:
            case "all":
                unsafe = {"source": str(arguments.borderline), "where": {"label": "unsafe"}}
            case "deeds":
                where = {"label": "unsafe", "type": list(DEEDS)}
                unsafe = {"source": str(arguments.borderline), "where": where}
            case "pairs":
                unsafe = {"source": write_pairs(arguments.work, arguments.borderline)}
        if more := ARMS[arm.of or name].more:
            raw["data"]["harmless"] |= {"source": harmless[more], "limit": None}
        if unsafe:
            raw["data"]["harmful"] = [raw["data"]["harmful"], unsafe]
    raw = merged(raw, changes or {})
    raw["train"]["seed"] = arguments.seed
    return parse_config(raw)


def trained(arguments: argparse.Namespace, name: str) -> Path:
    """The model folder of an arm, trained now when it is not there as the arm stands."""
    config = configuration(arguments, name)
    folder = RunFolder(config.output_dir)
    made = folder.config.is_file() and config_hash(load_config(folder.config))
    if made == config_hash(config) and folder.model.is_dir() and not ARMS[name].mean:
        return folder.model
    path = arguments.work / f"{folder.path.name}.yaml"
    save_config(config, path)
    whole = ARMS[name].of
    if ARMS[name].mean:
        remove(folder.path)
        parts = [argparse.Namespace(**vars(arguments) | {"seed": s})
                 for s in mean_seeds(name, arguments.seed)]  # fmt: skip
        average_runs([trained(one, str(whole)).parent for one in parts], folder.path)
        scale_adapter(folder.model, ARMS[name].scale)
        save_config(config, folder.config)
    elif whole is not None:
        shutil.copytree(trained(arguments, whole), folder.model, dirs_exist_ok=True)
        if ARMS[name].filter:
            filter_adapter(config, folder.model, ARMS[name].filter)
        else:
            scale_adapter(folder.model, ARMS[name].scale)
        save_config(config, folder.config)
    elif name in CIRCUIT_BREAKERS:
        circuit_breaker(config, folder.model)
        save_config(config, folder.config)
    else:
        launch(path, ranks=1, device="cpu")
    return folder.model


def study(arguments: argparse.Namespace) -> None:
    """Trains and evaluates what has no row yet, model by model and attack by attack; the base
    model, which no seed changes, beside the first seed."""
    rows = Rows(
        arguments.out,
        conditions("cpu") | {"command": f"python bench/studies/{Path(__file__).name}"},
    )
    wanted = arguments.attacks.split(",") if arguments.attacks else None
    for name in arguments.only.split(",") if arguments.only else (BASE, *ARMS):
        if name == BASE and arguments.seed:
            continue
        known = {row["key"] for row in read_lines(arguments.out)}
        for attack, limit in ATTACKS:
            key = cell_key(arguments, name, attack)
            if (wanted and attack["name"] not in wanted) or key in known:
                continue
            places = [] if name == BASE else [str(trained(arguments, name))]
            changes = {
                "evaluate": {
                    "attacks": [as_then(attack)],
                    "limit": min(limit, arguments.limit),
                    "max_new_tokens": answer_tokens(attack, arguments.tokens),
                }
            }
            config = configuration(arguments, "evaluation", changes)
            report = evaluate_paths(
                places, config, RunFolder(config.output_dir), base=str(arguments.model)
            )
            assert report is not None  # this is no rank of several
            add_row(rows, report, key, name, attack, arguments)


def cell_key(arguments: argparse.Namespace, name: str, attack: dict[str, Any]) -> str:
    """Of a cell, before it is measured."""
    made = "" if name == BASE else made_hash(arguments, name)
    limit = min(arguments.limit, next(most for one, most in ATTACKS if one == attack))
    tokens = answer_tokens(attack, arguments.tokens)
    judge = arguments.judge
    return key_of(arguments.label, name, made, arguments.seed, attack, tokens, limit, judge)


def key_of(
    base: str,
    model: str,
    made: str,
    seed: int,
    attack: dict[str, Any],
    tokens: int,
    n: int,
    judge: str = JUDGE,
) -> str:
    """Of a cell or of its row: base model, arm, hash of its configuration, seed of the training,
    attack, tokens of an answer, held-out prompts at most, and the judge if it is not `JUDGE`."""
    parts = (base, model, made, seed, json.dumps(attack, sort_keys=True), tokens, n)
    return " ".join(str(part) for part in parts) + (f" {judge}" if judge != JUDGE else "")


def add_row(
    rows: Rows,
    report: Report,
    key: str,
    name: str,
    attack: dict[str, Any],
    arguments: argparse.Namespace,
) -> None:
    """One model under one attack."""
    model = report.model(BASE) if name == BASE else report.models[-1]
    result = next(iter(model.attacks.values()), None)
    found = {"skipped": "; ".join(report.warnings)} if result is None else figures(result)
    rows.add(
        key=key,
        model=name,
        base=arguments.label,
        base_hash=model_fingerprint(str(arguments.model), None),
        config=None if name == BASE else made_hash(arguments, name),
        seed=arguments.seed,
        attack=attack["name"],
        settings={key: value for key, value in attack.items() if key != "name"},
        judge=arguments.judge,
        tokens=answer_tokens(attack, arguments.tokens),
        limit=arguments.limit,
        harmless=harmless_figures(model),
        **found,
    )


def made_hash(arguments: argparse.Namespace, name: str) -> str:
    """What an arm's model is made with: `config_hash`, and of a mean the seeds."""
    found = config_hash(configuration(arguments, name))
    if not ARMS[name].mean:
        return found
    seeds = mean_seeds(name, arguments.seed)
    return hashlib.sha256(f"{found} {seeds}".encode()).hexdigest()[:12]


def config_hash(config: Config) -> str:
    """12 hexadecimal digits over what of the defaults a model is not made with, and how many
    prompts, wherever its files lie; so a key that comes with a later version leaves it as
    it is."""
    elsewhere = {"model", "data", "output_dir", "evaluate"}
    plain = config.model_dump(mode="json", exclude=elsewhere, exclude_defaults=True)
    plain |= {"refused": config.data.refused} if config.data.refused != "keep" else {}
    for group in ("harmful", "harmless"):
        first, *more = getattr(config.data, group)
        plain |= {group: first.limit} if first.limit != PROMPTS else {}
        others = [one.where or Path(one.source).name for one in more]
        plain |= {f"more {group}": others} if more else {}
    plain |= {"dtype": config.model.dtype} if config.model.dtype != "fp32" else {}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


def figures(result: AttackResult) -> dict[str, Any]:
    """Of one attack, as a row holds it, with the rates of its variants where it has some."""
    kept = ("n", "useful", "refused", "partial", "gibberish", "answers_per_prompt", "seconds",
            "relative_push", "minimal_push", "repetitive")  # fmt: skip
    found = {key: getattr(result, key) for key in kept}
    return found | ({"variants": result.variants} if result.variants else {})


def harmless_figures(model: ModelResult) -> dict[str, Any]:
    """What a model does with harmless prompts."""
    kept = ("n", "refusal_rate", "intact_rate", "kl_to_base", "kl_response", "top1_agreement",
            "perplexity")  # fmt: skip
    found = {key: getattr(model.harmless, key) for key in kept}
    kinds = (model.harmless.refusal_by or {}).get("type", {})
    return found | {
        "refusal_by_type": {name: [one.n, one.refusal_rate] for name, one in kinds.items()}
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of an aligned chat model")
    parser.add_argument("--label", default="Qwen2.5-Coder-0.5B-Instruct", help="its name in rows")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--fit-harmful", type=Path, help="harmful prompts to train and fit on")
    parser.add_argument("--harmful", type=Path, help="held-out harmful prompts")
    parser.add_argument("--borderline", type=Path, help="an XSTest file: prompt, type, label")
    parser.add_argument("--work", type=Path, default=Path("runs/real_models"))
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--tokens", type=int, default=32, help="of every answer")
    parser.add_argument("--limit", type=int, default=100, help="most held-out prompts per attack")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--only", help="arms, with commas between them")
    parser.add_argument("--attacks", help="likewise")
    parser.add_argument(
        "--judge",
        default=JUDGE,
        choices=["rules", "rules+ppl"],
        help="+ppl: and the perplexity under the base model",
    )
    parser.add_argument("--report", action="store_true", help="write the documents' tables")
    arguments = parser.parse_args()
    if arguments.report:
        write_documents(list(read_lines(arguments.out)))
        return
    for name in ("model", "fit_harmful", "harmful", "borderline"):
        if getattr(arguments, name) is None:
            parser.error(f"--{name.replace('_', '-')} is needed")
    study(arguments)


if __name__ == "__main__":
    main()
