"""Writes what a run measured: report.json for programs, report.html for people.

report.html is one file that loads nothing: figures are inline SVG, style is in the page, and there
is no script, so it can be mailed, archived and opened years later. It starts with what one decides
by, the worst case of every model, then says in sentences what the numbers of this run mean, then
shows the outcomes attack by attack, then who judged them, and last everything else. Every figure
has a caption that says how to read it and how to fool oneself with it. Both files are written
beside their final name and moved into place, so a reader never meets half a report.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from es2fast.config import Config
from es2fast.report import plots
from es2fast.report.bars import bar_groups, cards
from es2fast.report.curve_plot import attack_curves
from es2fast.report.findings import findings
from es2fast.report.judges import judges_section
from es2fast.report.projection import projection
from es2fast.report.schema import Report
from es2fast.report.settings import config_rows
from es2fast.report.table import legend, table_rows
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import read_metrics

QUOTED = 600  # characters of an answer or a prompt
CAPTIONS = {
    "curves": (
        "Curves",
        "Read: the share of useful answers over what the attack varies; the line goes through the "
        "best point of each place, the band is its 95 % Wilson interval where the number of "
        "prompts is known. Beware: a search runs on few training prompts and short answers, and "
        "shows how the attacker chose, not how well the attack does; a curve that still rises at "
        "its end says that a stronger attack was not tried.",
    ),
    "layers": (
        "Separation per layer",
        "Read: d0 is the mean distance between the two groups in the base model, so 4 means "
        "four times as far apart. The first two panels are at the last prompt token; the others, "
        "where measured, at the user's last token, where models were found to read harmfulness, "
        "and over the template's tokens after it, where they decide to refuse (arXiv 2507.11878). "
        "Beware: if the first two rise alike, the states may only have been scaled, or one group "
        "moved away as a whole along one direction, which an attacker undoes "
        "by adding the difference of the means. What holds in this run is said at the top.",
    ),
    "projection": (
        "Both groups in two dimensions",
        "Read: last-prompt-token states, projected on the first two principal components, which "
        "are fitted once, on the union of all groups shown (at most 256 prompts each), in units of "
        "the residual stream. Every panel has its own axes; its title says how wide it is, and the "
        "dashed frame is the first panel's. Beware: the largest shift chooses the components, "
        "everything beside these two directions is hidden, and the two axes have different scales. "
        "Groups apart in this picture are not proof that an attack fails.",
    ),
    "training": (
        "Training curves",
        "Read: the separation loss and the refusals' cross-entropy should fall and stay down "
        "(steps under a simulated attack stand out) while the KL stays low; λ is drawn where it "
        "changes, as it does under a KL budget; a mean of runs has a line for each. Beware: the KL "
        "is measured on harmless training prompts, not on held-out ones.",
    ),
}


def write_report(
    folder: RunFolder,
    report: Report,
    *,
    states: Mapping[str, Mapping[str, Any]] | None = None,
    config: Config | None = None,
) -> None:
    """Writes report.json and report.html; training curves come from the folder's metrics.

    Args:
        folder: where; made when missing.
        report: what was measured.
        states: for the projection, per model and group (`harmful`, `harmless`) (n, H),
            last-prompt-token states at the deepest separated layer.
        config: the run's configuration, summarised in the page.
    """
    write_text(folder.report, report.to_json())
    write_page(folder.page, report, read_metrics(folder.metrics), states, config)


def write_page(
    path: Path,
    report: Report,
    metrics: list[dict[str, Any]] | None = None,
    states: Mapping[str, Mapping[str, Any]] | None = None,
    config: Config | None = None,
) -> None:
    """Writes the page alone; `metrics`: rows of metrics.jsonl, the rest as for `write_report`."""
    budget = config.kl.budget if config else None
    figures = {
        "curves": attack_curves(report),
        "layers": plots.separation_by_layer(report),
        "projection": projection(states) if states else [],
        "training": plots.training_curves(metrics or [], budget),
    }
    shown = [
        (*CAPTIONS[name], [Markup(plots.to_svg(one, f"{name}{i}")) for i, one in enumerate(drawn)])
        for name, drawn in figures.items()
        if drawn
    ]
    layers = {layer for one in report.all_trainings.values() for layer in one.layers or []}
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            model=config.model.name if config else "",
            facts=_facts(report, config),
            cards=cards(report),
            findings=findings(report),
            bar_groups=bar_groups(report),
            models=report.names,
            rows=table_rows(report),
            legend=legend(),
            trainings=report.all_trainings,
            warnings=report.warnings,
            figures=shown,
            judges=judges_section(report),
            examples=_examples(report),
            settings=config_rows(config, sorted(layers) or None) if config else [],
            resolved=_yaml(config) if config else "",
        )
    )
    write_text(path, page)


def _facts(report: Report, config: Config | None) -> list[tuple[str, str]]:
    """Under which conditions the numbers arose."""
    mean = report.train.mean_of_seeds if report.train else None
    training = mean or (config.train.seed if config else None)
    seeds = [("training", training), ("evaluation", report.seed)]
    known = [f"{what} {seed}" for what, seed in seeds if seed is not None]
    date = (report.created or "").replace("T", " ").replace("+00:00", " UTC")
    facts = [
        ("date", date),
        ("es2fast", report.es2fast or ""),
        ("judge", report.judge),
        ("seeds", ", ".join(known)),
        ("answers", f"at most {report.max_new_tokens} tokens" if report.max_new_tokens else ""),
    ]
    return [(name, value) for name, value in facts if value]


def _examples(report: Report) -> list[tuple[str, list[tuple[str, list[dict[str, str]]]]]]:
    """(attack, [(model, [prompt, verdict and answer])]), long texts cut."""
    found = []
    for name in report.attack_names:
        models = []
        for model in report.models:
            attack = model.attacks.get(name)
            quoted = (attack.examples if attack else None) or []
            shown = [
                {key: _cut(str(one.get(key, ""))) for key in ("prompt", "verdict", "answer")}
                for one in quoted
            ]
            if shown:
                models.append((model.name, shown))
        if models:
            found.append((name, models))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= QUOTED else text[: QUOTED - 1] + "…"


def _environment() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
