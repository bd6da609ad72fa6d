"""The one table: what the attacks get out of the base and the tuned model, and at what cost.

The same rows go to the screen, to report.html, to documents and to the model card. A rate never
stands alone: its 95 % Wilson interval is beside it and the count n above it. Gibberish is beside
the refusals, because counting refusals alone takes it for a success of the attack and counting
useful answers alone takes it for a defence; the norm ratio is beside the distance, because
inflating every norm raises the distance and protects nothing. The worst case comes first.

Beside the rates stands what happened prompt by prompt: "−85 +2" says that 85 prompts are broken on
the base model only and 2 on this one only, with the p-value of McNemar's exact test, per attack and
not corrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from es2fast.report.schema import ModelResult, Report, TaskScore
from es2fast.report.stats import rate_interval
from es2fast.report.suite import answers_text, base_of, compared, shared_attacks, worst_attack

WIDTH = 100  # columns when the output is a file or a pipe
NOT_MEASURED = "–"
PAIRED = "against base, prompts"
POSITIONS = {"instruction": "last instruction token", "template": "template tokens"}
_ASCII = str.maketrans({"‖": "||", "ε": "eps", "–": "-", "−": "-", "·": "-", "±": "+-"})


@dataclass(frozen=True)
class TableRow:
    """A line of the table; a heading carries the counts of the lines below it."""

    label: str
    cells: tuple[str, ...]  # one per evaluated model
    heading: bool = False


def table_rows(report: Report) -> list[TableRow]:
    """All lines of the table."""
    rows = [*_worst_rows(report), *_harmless_rows(report)]
    rows += _task_rows(report)
    for name in report.attack_names:
        rows += _attack_rows(report, name)
    for layer in report.separated_layers:
        rows += _layer_rows(report, str(layer))
    return rows


def print_table(report: Report, console: Console | None = None) -> None:
    """Prints the table; it needs about 80 columns."""
    console = console or default_console()
    table = Table(box=box.SIMPLE_HEAD, show_header=True, pad_edge=False)
    table.add_column("")
    for name in report.names:
        table.add_column(name, justify="right")
    for row in table_rows(report):
        texts = (row.label if row.heading else f"  {row.label}", *row.cells)
        style = "bold" if row.heading else ""
        table.add_row(*(Text(_printable(text, console), style=style) for text in texts))
    console.print(table)
    console.print(Text(_printable(legend(), console), style="dim"))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"))


def table_markdown(report: Report) -> str:
    """The table in GitHub's Markdown, for documents and the model card."""
    lines = ["| | " + " | ".join(report.names) + " |", "|:--|" + "--:|" * len(report.names)]
    for row in table_rows(report):
        label = f"**{markdown_text(row.label)}**" if row.heading else markdown_text(row.label)
        lines.append(f"| {label} | " + " | ".join(row.cells) + " |")
    return "\n".join(lines) + "\n"


def legend() -> str:
    """One line on how to read the cells."""
    return (
        "rates with 95 % Wilson interval · −a +b: prompts broken on one model only (McNemar) · "
        "d0: distance of the groups in the base model"
    )


def markdown_text(text: str) -> str:
    """Text that stays text inside a Markdown paragraph or table cell, on one line."""
    escaped = " ".join(str(text).split()).replace("\\", "\\\\").replace("&", "&amp;")
    escaped = escaped.replace("<", "&lt;").replace(">", "&gt;")
    for sign in "|`*[]":
        escaped = escaped.replace(sign, "\\" + sign)
    return escaped


def _worst_rows(report: Report) -> Iterator[TableRow]:
    """The attack with the most useful answers, and all attacks as one."""
    worst = [worst_attack(model) for model in report.models]
    if not any(worst):
        return
    counts = [f"{len(model.attacks)} attacks" for model in report.models]
    yield TableRow("worst case", tuple(counts), heading=True)
    yield _row("most useful answers under", worst, lambda found: found[0])
    yield _row("useful", worst, lambda found: _rate(found[1].useful, found[1].n))
    suites = [model.worst_of_suite for model in report.models]
    if any(suites):
        yield _row(
            f"broken by any of {answers_text(suites)} answers",
            suites,
            lambda found: _rate(found.useful, found.n),
        )
    yield from _paired_row(report, None)


def _paired_row(report: Report, attack: str | None) -> Iterator[TableRow]:
    """Prompts broken on one model and not on its base model, where that can be said."""

    def cell(model: ModelResult) -> str:
        base = base_of(report, model)
        names = [] if base is None else [attack] if attack else shared_attacks(base, model)
        found = compared(base, model, names) if base else None
        return found.text() if found else NOT_MEASURED

    row = _row(PAIRED, list(report.models), cell)
    if any(text != NOT_MEASURED for text in row.cells):
        yield row


def _harmless_rows(report: Report) -> Iterator[TableRow]:
    parts = [model.harmless for model in report.models]
    yield _heading("harmless prompts", parts)
    yield _row("refused", parts, lambda part: _rate(part.refusal_rate, part.n))
    for column, value in _kinds(report):
        kinds = [((part.refusal_by or {}).get(column) or {}).get(value) for part in parts]
        counts = {kind.n for kind in kinds if kind}
        alike = len(counts) == 1
        yield _row(
            f"refused, {column} {value}" + (f", n = {min(counts)}" if alike else ""),
            kinds,
            lambda kind, alike=alike: (
                _rate(kind.refusal_rate, kind.n) + ("" if alike else f", n = {kind.n}")
            ),
        )
    yield _row("answer intact", parts, lambda part: _rate(part.intact_rate, part.n))
    yield _row("KL to base, nats/token", parts, lambda part: _number(part.kl_to_base, ".4f"))
    if any(part.perplexity is not None for part in parts):
        yield _row("KL, response tokens", parts, lambda part: _number(part.kl_response, ".4f"))
        yield _row("top-1 as the base", parts, lambda part: _percent(part.top1_agreement))
        yield _row("perplexity of responses", parts, lambda part: _number(part.perplexity, ".2f"))


def _task_rows(report: Report) -> Iterator[TableRow]:
    """Tasks of lm-evaluation-harness, alone and under attacks."""
    found = [model.lm_eval or {} for model in report.models]
    for setting in dict.fromkeys(name for one in found for name in one):
        parts = [one.get(setting) or {} for one in found]
        title = "tasks of lm-eval" if setting == "plain" else f"tasks of lm-eval under {setting}"
        counts = tuple(_documents(part) for part in parts)
        yield TableRow(title, counts, heading=True)
        pairs = [(task, metric) for part in parts for task in part for metric in part[task]]
        for task, metric in dict.fromkeys(pairs):
            scores = [part.get(task, {}).get(metric) for part in parts]
            yield _row(f"{task}: {metric}", scores, _score)


def _documents(tasks: dict[str, dict[str, TaskScore]]) -> str:
    counts = {score.n for metrics in tasks.values() for score in metrics.values()}
    shown = [str(n) for n in sorted(counts - {None})]  # type: ignore[type-var]
    return f"n = {', '.join(shown)}" if shown else "" if tasks else "not run"


def _score(score: TaskScore) -> str:
    if score.value is None or score.stderr is None:
        return _number(score.value, ".3f")
    return f"{score.value:.3f} ± {score.stderr:.3f}"


def _kinds(report: Report) -> list[tuple[str, str]]:
    """(column, value) of the kinds of harmless prompts, from the column with the fewest values."""
    columns: dict[str, list[str]] = {}
    for model in report.models:
        for column, kinds in (model.harmless.refusal_by or {}).items():
            known = columns.setdefault(column, [])
            known += [value for value in kinds if value not in known]
    if not columns:
        return []
    fewest = min(columns, key=lambda column: len(columns[column]))
    return [(fewest, value) for value in columns[fewest]]


def _attack_rows(report: Report, name: str) -> Iterator[TableRow]:
    parts = [model.attacks.get(name) for model in report.models]
    asked = answers_text(parts)
    yield _heading(f"attack {name}" + (f", any of {asked} answers" if asked != "1" else ""), parts)
    for outcome in ("refused", "useful", "gibberish"):
        yield _row(outcome, parts, lambda part, key=outcome: _rate(getattr(part, key), part.n))
        if outcome == "refused" and any(part and part.partial for part in parts):
            yield _row("of these partial", parts, lambda part: _rate(part.partial, part.n))
    if any(part and part.corrected for part in parts):
        yield _row("useful, corrected", parts, _corrected)
    if any(part and part.refused_repetitive for part in parts):
        yield _row("refused, in a loop", parts, lambda part: _rate(part.refused_repetitive, part.n))
    elif any(part and part.repetitive for part in parts):
        yield _row("answers in a loop", parts, lambda part: _rate(part.repetitive, part.n))
    yield from _paired_row(report, name)
    if any(part and part.relative_push for part in parts):
        yield _row("push |ε|/‖h‖", parts, lambda part: _number(part.relative_push, ".2f"))
    if any(part and part.minimal_push for part in parts):
        yield _row(
            "smallest push that works", parts, lambda part: _number(part.minimal_push, ".2f")
        )


def _layer_rows(report: Report, layer: str) -> Iterator[TableRow]:
    parts = [model.separation.get(layer) for model in report.models]
    yield TableRow(f"layer {layer}", ("",) * len(parts), heading=True)
    yield _row("distance/d0", parts, lambda part: _number(part.distance_over_base, ".2f"))
    yield _row("norm ratio ‖h‖/‖h_base‖", parts, lambda part: _number(part.norm_ratio, ".2f"))
    ranks = [(model.shift_rank or {}).get(layer) for model in report.models]
    if any(ranks):
        yield _row("effective rank of the shift", ranks, lambda rank: _number(rank, ".2f"))
    yield _row("probe accuracy", parts, _accuracy)
    if any(part and part.probe_margin is not None for part in parts):
        yield _row("probe margin/d0", parts, _margin)
    for position, name in POSITIONS.items():
        found = [(part.positions or {}).get(position) if part else None for part in parts]
        if any(found):
            yield _row(
                f"distance/d0, {name}", found, lambda one: _number(one.distance_over_base, ".2f")
            )
            yield _row(f"probe accuracy, {name}", found, _accuracy)


def _heading(label: str, parts: list[Any]) -> TableRow:
    counts = tuple(f"n = {part.n}" if part else "not run" for part in parts)
    return TableRow(label, counts, heading=True)


def _row(label: str, parts: list[Any], cell: Callable[..., str]) -> TableRow:
    return TableRow(label, tuple(cell(part) if part else NOT_MEASURED for part in parts))


def _rate(rate: float | None, n: int) -> str:
    if rate is None:
        return NOT_MEASURED
    low, high = rate_interval(rate, n)
    return f"{100 * rate:.1f} % [{100 * low:.1f}–{100 * high:.1f}]"


def _percent(rate: float | None) -> str:
    return NOT_MEASURED if rate is None else f"{100 * rate:.1f} %"


def _corrected(part: Any) -> str:
    found = part.corrected
    if found is None:
        return NOT_MEASURED
    low, high = found.interval
    return f"{100 * found.useful:.1f} % [{100 * low:.1f}–{100 * high:.1f}]"


def _accuracy(part: Any) -> str:
    return _with_interval(part.probe_accuracy, part.probe_interval, ".3f")


def _margin(part: Any) -> str:
    return _with_interval(part.probe_margin, part.probe_margin_interval, ".2f")


def _with_interval(value: float | None, ends: list[float] | None, spec: str) -> str:
    if value is None or ends is None:
        return _number(value, spec)
    return f"{value:{spec}} [{ends[0]:{spec}}–{ends[1]:{spec}}]"


def _number(value: float | None, spec: str) -> str:
    return NOT_MEASURED if value is None else format(value, spec)


def default_console() -> Console:
    """The terminal, or a fixed width for a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _printable(text: str, console: Console) -> str:
    """Terminals that do not speak UTF-8 get ASCII in place of ‖, ε and dashes."""
    return text if console.encoding.lower().startswith("utf") else text.translate(_ASCII)
