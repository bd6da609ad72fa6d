"""Writes what a run measured: report.json for programs, report.html for people.

report.html is one file that loads nothing: figures are inline SVG, style is in the page, and there
is no script, so it can be mailed, archived and opened years later. Every figure has a caption that
says how to read it and how to fool oneself with it. Both files are written beside their final name
and moved into place, so a reader never meets half a report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from es2fast.config import Config, SeparationConfig
from es2fast.errors import UserError
from es2fast.report import plots, schema
from es2fast.report.schema import check_report
from es2fast.report.table import legend, print_table, table_markdown, table_rows
from es2fast.run.metrics import read_metrics

__all__ = [
    "check_report",
    "config_rows",
    "print_table",
    "read_metrics",
    "read_report",
    "table_markdown",
    "write_report",
    "write_text_atomically",
]

CAPTIONS = {
    "training": (
        "Training curves",
        "Read: the separation loss should fall and stay down while the KL stays low; λ rises "
        "where a KL budget is under pressure. Beware: a distance that grows together with the "
        "norm ratio is norm inflation, which protects nothing. The KL is measured on harmless "
        "training prompts, not on held-out ones.",
    ),
    "layers": (
        "Separation per layer",
        "Read: d0 is the mean distance between the two groups in the base model, so 4 means "
        "four times as far apart. Beware: compare with the panel on the right; if both rise "
        "alike, the states have only been scaled. A distance can also rise because one group "
        "was spread out, or because a whole group moved along one direction, which an attacker "
        "undoes by adding the difference of the means: see the mean-difference attack.",
    ),
    "projection": (
        "Both groups in two dimensions",
        "Read: last-prompt-token states at the deepest separated layer, projected on the first "
        "two principal components. The components are fitted once, on the union of all groups "
        "shown (at most 256 prompts each), and the panels share their axes, so distances can be "
        "compared between them. Beware: the largest shift chooses the axes, everything beside "
        "these two directions is hidden, and the two axes have different scales. Groups apart in "
        "this picture are not proof that an attack fails.",
    ),
    "attacks": (
        "Attack outcomes",
        "Read: keyword defence success is the refused part; useful-answer defence success is "
        "everything but the useful part. The bar is one set of held-out harmful prompts; attacks "
        "are refitted on the model they attack. Beware: gibberish counts as the attacker's "
        "success under the first reading and as the defender's under the second, so compare all "
        "three parts. The interval covers the choice of prompts only, not other attacks.",
    ),
}


def write_report(
    folder: str | Path,
    report: Mapping[str, Any],
    *,
    states: Mapping[str, Any] | None = None,
    config: Config | None = None,
) -> None:
    """Writes report.json and report.html; training curves come from `folder/metrics.jsonl`.

    Args:
        folder: made when missing.
        report: see `es2fast.report.schema`; keys beyond the schema are kept.
        states: for the projection, `base_harmful`, `base_harmless`, `tuned_harmful` and
            `tuned_harmless`, each (n, H), last-prompt-token states at the deepest separated layer.
        config: the run's configuration, summarised in the page.

    Raises:
        UserError: a key of the report is missing or invalid; nothing is written then.
    """
    check_report(report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    clean = schema.plain(report)
    text = json.dumps(clean, indent=2, ensure_ascii=False, allow_nan=False)
    write_text_atomically(folder / "report.json", text + "\n")
    page = _render_html(clean, read_metrics(folder / "metrics.jsonl"), states, config)
    write_text_atomically(folder / "report.html", page)


def read_report(folder: str | Path) -> dict[str, Any]:
    """Reads and checks folder/report.json.

    Raises:
        UserError: no such file, not JSON, or not a report.
    """
    path = Path(folder) / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"report {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"report {path}: not valid JSON ({error})") from None
    check_report(report)
    return report


def write_text_atomically(path: Path, text: str) -> None:
    """Writes a neighbour of `path` and moves it into place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _options(separation: SeparationConfig) -> str:
    """The settings of the separation that are not at their defaults."""
    words = []
    if separation.space != "residual":
        words.append(f"{separation.space} states")
    if separation.norm_band is not None:
        words.append("norm band {:g} to {:g} of the base".format(*separation.norm_band))
    if separation.bank:
        words.append(f"bank of {separation.bank}")
    if separation.robust.probability:
        robust = separation.robust
        words.append(f"{robust.attack} simulated in {robust.probability:g} of the steps")
    return "".join(f", {word}" for word in words)


def config_rows(config: Config, layers: Sequence[int] | None = None) -> list[tuple[str, str]]:
    """The settings that a reader of a report asks for first, as (name, value).

    Args:
        config: the run's configuration.
        layers: what `layers: auto` became, when known.
    """
    train, kl = config.train, config.kl
    chosen = _words(list(layers) if layers else config.layers)
    if layers and config.layers == "auto":
        chosen += " (chosen by probes)"
    separation = config.separation
    margin = "" if separation.margin is None else f", margin {separation.margin:g}"
    margin += "" if not margin or separation.loss == "cosine" else " × d0"
    weight = f"λ = {kl.weight:g}"
    if kl.budget is not None:
        weight = f"λ adaptive from {kl.weight:g}, budget {kl.budget:g} nats/token"
    pairs = f"{train.micro_batch_size} × {train.gradient_accumulation}"
    lora = f", r = {train.lora.r}, alpha = {train.lora.alpha:g}"
    return [
        ("layers", chosen),
        (
            "separation loss",
            separation.loss + margin + _options(separation),
        ),
        ("layer weights", _words(config.separation.weights or "1 each")),
        ("KL", f"{kl.direction}, temperature {kl.temperature:g}, {kl.positions} tokens; {weight}"),
        ("trainable", train.trainable + (lora if train.trainable == "lora" else "")),
        ("teacher", train.teacher),
        ("optimizer steps", str(train.steps)),
        ("pairs per rank and step (micro-batch × accumulation)", pairs),
        ("learning rate", f"{train.lr:g}, {train.schedule}, warm-up {train.warmup_ratio:g}"),
        ("weight decay, gradient clipping", f"{train.weight_decay:g}, {train.max_grad_norm:g}"),
        ("precision, seed", f"{config.model.dtype}, {train.seed}"),
    ]


def _words(value: Any) -> str:
    return ", ".join(f"{item:g}" for item in value) if isinstance(value, list) else str(value)


def _render_html(
    report: dict[str, Any],
    metrics: list[dict[str, Any]],
    states: Mapping[str, Any] | None,
    config: Config | None,
) -> str:
    budget = config.kl.budget if config else None
    figures = {
        "training": plots.training_curves(metrics, budget),
        "layers": plots.separation_by_layer(report),
        "projection": plots.projection(states) if states else None,
        "attacks": plots.attack_outcomes(report),
    }
    shown = [
        (*CAPTIONS[name], Markup(plots.to_svg(figure, name)))
        for name, figure in figures.items()
        if figure is not None
    ]
    train = report.get("train")
    return _template("report.html.j2").render(
        model=config.model.name if config else report.get("model", ""),
        models=list(schema.blocks(report)),
        rows=table_rows(report),
        legend=legend(),
        train=train,
        warnings=report.get("warnings", []),
        figures=shown,
        settings=config_rows(config, (train or {}).get("layers")) if config else [],
        resolved=_yaml(config) if config else "",
    )


def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def _yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
