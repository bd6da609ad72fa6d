"""Writes what a run measured: report.json for programs, report.html for people.

report.html is one file that loads nothing: figures are inline SVG, style is in the page, and there
is no script, so it can be mailed, archived and opened years later. Every figure has a caption that
says how to read it and how to fool oneself with it. Both files are written beside their final name
and moved into place, so a reader never meets half a report.
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
from es2fast.report.schema import Report
from es2fast.report.settings import config_rows
from es2fast.report.table import legend, table_rows
from es2fast.run.files import write_text
from es2fast.run.folder import RunFolder
from es2fast.run.metrics import read_metrics

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
    page = _render_html(report, read_metrics(folder.metrics), states, config)
    write_text(folder.page, page)


def _render_html(
    report: Report,
    metrics: list[dict[str, Any]],
    states: Mapping[str, Mapping[str, Any]] | None,
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
    train = report.train
    return _template("report.html.j2").render(
        model=config.model.name if config else "",
        models=report.names,
        rows=table_rows(report),
        legend=legend(),
        train=train,
        warnings=report.warnings,
        figures=shown,
        settings=config_rows(config, train.layers if train else None) if config else [],
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
