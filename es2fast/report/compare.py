"""Reports side by side: `es2fast compare A B ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from es2fast.errors import UserError
from es2fast.report.schema import BASE, ModelResult, Report, read_report
from es2fast.run.folder import RunFolder


def combined(places: Sequence[Path]) -> Report:
    """One report with the models of several, each named after its folder where names repeat.

    A base model that several reports measured alike appears once.

    Args:
        places: folders that hold a report.json, or such files; of report version 1 or 2.

    Raises:
        UserError: a report that is missing or broken; two places of the same name.
    """
    paths = [RunFolder(place).report if place.is_dir() else place for place in places]
    labels = [path.resolve().parent.name for path in paths]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"compare: two reports lie in folders named {label!r}; rename one")
    reports = [read_report(path) for path in paths]
    models: list[ModelResult] = []
    called: dict[str, str] = {}  # by the name here, that in its own report
    for label, report in zip(labels, reports):
        base = ""
        for model in report.models:
            same = [other for r in reports for other in r.models if other.name == model.name]
            alike = all(_untimed(other) == _untimed(model) for other in same)
            alone = model.name != BASE and len(report.models) <= 2
            own = label if alone else f"{label}/{model.name}"
            name = model.name if alike else own  # alike: measured once, or alike everywhere
            known = alike and called.get(name) == model.name
            if not known and name in called:  # a folder that is called as another report's model
                name = f"{label}/{model.name}"
            base = name if model.name == BASE else base
            if not known:
                called[name] = model.name
                models.append(model.model_copy(update={"name": name, "base": base}))
    trainings = {
        label: report.train.model_copy(update={"layers": report.separated_layers})
        for label, report in zip(labels, reports)
        if report.train
    }
    warnings = [f"{label}: {text}" for label, r in zip(labels, reports) for text in r.warnings]
    lengths = {report.max_new_tokens for report in reports}
    return Report(
        models=models,
        trainings=trainings or None,
        judge=_judges(reports),
        max_new_tokens=lengths.pop() if len(lengths) == 1 else None,
        warnings=[*_unlike(labels, reports), *warnings],
    )


def _unlike(labels: Sequence[str], reports: Sequence[Report]) -> list[str]:
    """In what the reports differ that makes their numbers hard to compare."""
    found = []
    for what, values in (
        ("the judge", [report.judge for report in reports]),
        ("tokens of an answer at most", [report.max_new_tokens for report in reports]),
        ("the seed of the evaluation", [report.seed for report in reports]),
    ):
        known = {label: value for label, value in zip(labels, values) if value is not None}
        if len(set(known.values())) > 1:
            shown = "; ".join(f"{label}: {value}" for label, value in known.items())
            found.append(f"the reports differ in {what}: {shown}")
    if len({model.paired_by for report in reports for model in report.models} - {None}) > 1:
        found.append("the reports' models were not all asked and judged alike")
    return found


def _untimed(model: ModelResult) -> ModelResult:
    """Without how long its attacks took."""
    attacks = {
        name: one.model_copy(update={"seconds": None}) for name, one in model.attacks.items()
    }
    return model.model_copy(update={"attacks": attacks})


def _judges(reports: Sequence[Report]) -> str:
    return " / ".join(dict.fromkeys(report.judge for report in reports))
