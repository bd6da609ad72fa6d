"""Tables and plots of docs/separation.md, made from the rows of separation_study.py.

The document holds a pair of comments around each table; what stands between them is replaced. A
cell is the mean over the seeds and, where they differ, the range in brackets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter

from bench.studies.separation_cells import (
    ATTACKS,
    BUDGET,
    CONTROLS,
    LAYERS,
    LONG,
    LOSSES,
    MARGINS,
    OTHER_LAYERS,
    ROBUST_MARGINS,
)

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "separation.md"
PLOTS = Path(__file__).parents[1] / "results"
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito, as in es2fast's own figures
MARKS = ("o", "s", "^")
Row = dict[str, Any]
Pick = Callable[[Row], float | None]


def _attack(name: str, key: str) -> Pick:
    return lambda row: row["attacks"][name][key]


def _percent(pick: Pick) -> Pick:
    def scaled(row: Row) -> float | None:
        value = pick(row)
        return None if value is None else 100 * value

    return scaled


COLUMNS: tuple[tuple[str, Pick, str], ...] = (
    ("d/d0", lambda row: row["distance_over_base"], ".3g"),
    ("norm ratio", lambda row: row["norm_ratio"], ".3g"),
    ("KL", lambda row: row["kl"], ".2g"),
    ("harmless intact %", _percent(lambda row: row["intact"]), ".0f"),
    ("SCAV useful %", _percent(_attack("scav", "useful")), ".0f"),
    ("mean diff. useful %", _percent(_attack("mean_difference", "useful")), ".0f"),
    ("SCAV push", _attack("scav", "relative_push"), ".2f"),
    ("shift rank", lambda row: row["shift_rank"], ".2f"),
    ("direct gibberish %", _percent(_attack("direct", "gibberish")), ".0f"),
    ("direct loops %", _percent(_attack("direct", "repetitive")), ".0f"),
)


def write_report(rows: Sequence[Row]) -> None:
    """Rewrites the tables of docs/separation.md and the plots."""
    DOCUMENT.write_text(fill(DOCUMENT.read_text(), rows))
    for name, figure in plots(rows).items():
        figure.savefig(PLOTS / f"separation_study_{name}.png", dpi=90)


def fill(text: str, rows: Sequence[Row]) -> str:
    """The document with every table made anew from the rows.

    Raises:
        KeyError: the document names a table that does not exist.
    """
    made = tables(rows)

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n{made[found[2]]}{found[4]}"

    return re.sub(r"(<!-- table: (\w+) -->)\n(.*?)(<!-- end -->)", table, text, flags=re.DOTALL)


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Every table as Markdown, by the name the document uses."""
    return {
        "base": _base_table(rows),
        "weight": _loss_table(rows, "weight"),
        "budget": _loss_table(rows, "budget"),
        "robust": _robust_table(rows),
        "margin": _margin_table(rows),
        "long": _long_table(rows),
        "blocks": _blocks_table(rows),
        "conditions": _conditions(rows),
    }


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows whose cell has these values; what is not named must be at its default."""
    cell = {"robust": None, "margin": None, "steps": None} | wanted
    cell = {key: list(value) if isinstance(value, tuple) else value for key, value in cell.items()}
    return [row for row in rows if all(row["cell"][key] == value for key, value in cell.items())]


def summary(rows: Sequence[Row], pick: Pick, spec: str) -> str:
    """Mean over the seeds, and the range when it shows."""
    values = [value for row in rows if "n" in row and (value := pick(row)) is not None]
    if not values:
        return "–"
    mean, low, high = (format(f, spec) for f in (sum(values) / len(values), min(values),
                                                 max(values)))  # fmt: skip
    return mean if low == high else f"{mean} ({low}–{high})"


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    out = ["| " + " | ".join(heads) + " |", "|" + ":--|" + "--:|" * (len(heads) - 1)]
    return "\n".join([*out, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def _figures(rows: Sequence[Row]) -> list[str]:
    return [summary(rows, pick, spec) for _, pick, spec in COLUMNS]


def _seeds(rows: Sequence[Row]) -> str:
    """How many seeds; how many of them stopped by themselves."""
    stopped = sum("stopped" in row for row in rows)
    return f"{len(rows)}" + (f", {stopped} stopped" if stopped else "")


def _heads(*first: str) -> list[str]:
    return [*first, "seeds", *(head for head, _, _ in COLUMNS)]


def _names(layers: Sequence[int]) -> str:
    return "+".join(map(str, layers))


def _loss_table(rows: Sequence[Row], control: str) -> str:
    lines = []
    for loss in LOSSES:
        for layers in LAYERS:
            found = select(rows, loss=loss, layers=layers, control=control)
            if found:
                lines.append([f"{loss} {_names(layers)}", _seeds(found), *_figures(found)])
    return _table(_heads("loss, blocks"), lines)


def _robust_table(rows: Sequence[Row]) -> str:
    lines = []
    for margin in ROBUST_MARGINS:
        for robust in (None, *ATTACKS):
            wanted: dict[str, Any] = {"layers": (2, 4), "margin": margin, "robust": robust}
            found = select(rows, loss="hinge", control="weight", **wanted)
            if found:
                name = f"{found[0]['separation']['margin']:g}, {robust or 'none'}"
                lines.append([name, _seeds(found), *_figures(found)])
    return _table(_heads("margin, simulated attack"), lines)


def _margin_table(rows: Sequence[Row]) -> str:
    lines = []
    for margin in (*MARGINS, None):
        for layers in (*LAYERS, OTHER_LAYERS[0]):
            found = select(rows, loss="hinge", layers=layers, control="weight", margin=margin)
            if found:
                name = f"{found[0]['separation']['margin']:g}, {_names(layers)}"
                lines.append([name, _seeds(found), *_figures(found)])
    return _table(_heads("margin, blocks"), lines)


def _long_table(rows: Sequence[Row]) -> str:
    lines = []
    for loss in ("l2", "hinge"):
        for layers in LAYERS:
            for steps in (None, LONG):
                found = select(rows, loss=loss, layers=layers, control="weight", steps=steps)
                if found and (loss == "l2" or layers == (2, 4)):
                    name = f"{loss} {_names(layers)}, {steps or 80} steps"
                    lines.append([name, _seeds(found), *_figures(found)])
    return _table(_heads("loss, blocks, steps"), lines)


def _blocks_table(rows: Sequence[Row]) -> str:
    lines = []
    for loss in ("hinge", "l2"):
        for layers in sorted((*LAYERS, *OTHER_LAYERS), key=lambda x: (len(x), x[::-1])):
            found = select(rows, loss=loss, layers=layers, control="weight")
            if found:
                lines.append([f"{loss} {_names(layers)}", _seeds(found), *_figures(found)])
    return _table(_heads("loss, blocks"), lines)


def _base_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in sorted(select(rows, loss="base"), key=lambda row: row["cell"]["seed"]):
        attacks = row["attacks"]
        rates = (attacks["direct"]["refused"], row["intact"], attacks["scav"]["useful"],
                 attacks["mean_difference"]["useful"])  # fmt: skip
        push = f"{attacks['scav']['relative_push']:.2f}"
        seed = str(row["cell"]["seed"])
        lines.append([seed, str(row["n"]), *(f"{100 * rate:.0f}" for rate in rates), push])
    heads = ("seed", "prompts per group", "direct refused %", "harmless intact %",
             "SCAV useful %", "mean diff. useful %", "SCAV push")  # fmt: skip
    return _table(heads, lines)


def _conditions(rows: Sequence[Row]) -> str:
    """How many rows, with what they were made, and when."""
    parts = []
    for key in ("commit", "torch", "python", "cpu", "threads"):
        parts.append(f"{key} {', '.join(sorted({str(row[key]) for row in rows}))}")
    hours = sum(row["seconds"] for row in rows) / 3600
    last = max((row["time"] for row in rows), default="–")[:10]
    return f"{len(rows)} rows, {hours:.1f} core hours, {last}; {'; '.join(parts)}\n"


# Plots --------------------------------------------------------------------------------------


PANELS: tuple[tuple[str, Pick, bool], ...] = (
    ("SCAV useful, %", _percent(_attack("scav", "useful")), False),
    ("mean difference useful, %", _percent(_attack("mean_difference", "useful")), False),
    ("harmless intact, %", _percent(lambda row: row["intact"]), False),
    ("direct refused, %", _percent(_attack("direct", "refused")), False),
    ("KL, nats per token", lambda row: row["kl"], True),
    ("d / d0", lambda row: row["distance_over_base"], True),
)


def plots(rows: Sequence[Row]) -> dict[str, Figure]:
    """`losses`: every loss, number of layers and control; `margin`: the hinge's dose."""
    return {"losses": _losses_figure(rows), "margin": _margin_figure(rows)}


def _losses_figure(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(11, 12), layout="constrained", facecolor="white")
    titles = {"weight": "fixed λ, no safeguards", "budget": f"KL budget {BUDGET:g} nats"}
    grid = figure.subplots(len(PANELS), len(CONTROLS), sharey="row", sharex=True)
    for column, control in enumerate(CONTROLS):
        for line, (name, pick, logarithmic) in enumerate(PANELS):
            axes = grid[line][column]
            for index, layers in enumerate(LAYERS):
                found = [select(rows, loss=loss, layers=layers, control=control) for loss in LOSSES]
                _points(axes, found, pick, index)
            _finish(axes, logarithmic, name if column == 0 else "")
            axes.set_xticks(range(len(LOSSES)), LOSSES, rotation=20)
            if line == 0:
                axes.set_title(titles[control])
    _legend(figure)
    return figure


def _margin_figure(rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(11, 3.2), layout="constrained", facecolor="white")
    shown = [panel for panel in PANELS if not panel[0].startswith(("direct", "d /"))]
    for number, (name, pick, logarithmic) in enumerate(shown):
        axes = figure.add_subplot(1, 4, number + 1)
        for index, layers in enumerate(LAYERS):
            found = [
                select(rows, loss="hinge", layers=layers, control="weight", margin=margin)
                for margin in (*MARGINS, None)
            ]
            _points(axes, found, pick, index, line=True)
        axes.set_xticks(range(len(MARGINS) + 1), [f"{m:g}" for m in (*MARGINS, 6.0)])
        axes.set_xlabel("hinge's margin, in d0")
        _finish(axes, logarithmic, name)
    _legend(figure)
    return figure


def _points(
    axes: Axes, groups: Sequence[Sequence[Row]], pick: Pick, index: int, line: bool = False
) -> None:
    """Mean over seeds with its range, one place per group of rows; `index`: which layer set."""
    places, means = [], []
    for place, rows in enumerate(groups):
        values = [value for row in rows if "n" in row and (value := pick(row)) is not None]
        if not values:
            continue
        places.append(place + 0.22 * (index - 1))
        means.append(sum(values) / len(values))
        axes.vlines(places[-1], min(values), max(values), color=COLOURS[index], linewidth=1.2)
    style = "-" if line else "none"
    axes.plot(places, means, color=COLOURS[index], marker=MARKS[index], linestyle=style, ms=5)


def _finish(axes: Axes, logarithmic: bool, name: str) -> None:
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=True))
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    else:
        axes.set_ylim(-4, 104)
    axes.set_ylabel(name)
    axes.grid(color="#E5E5E5", linewidth=0.6)


def _legend(figure: Figure) -> None:
    handles = [
        Line2D(
            [], [], color=colour, marker=mark, linestyle="none", label=f"blocks {_names(layers)}"
        )
        for colour, mark, layers in zip(COLOURS, MARKS, LAYERS)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
