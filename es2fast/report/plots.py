"""The panels of report.html about training and layers, their look, and inline SVG.

Every panel is a figure of its own and narrow, so that a page can put three side by side on a desk
and one below the other on a phone, with text that stays readable. Figures are built with
matplotlib's object API: no pyplot, no global state, no display needed. The colours are Okabe and
Ito's (readable with any colour vision); marks, hatches and line styles repeat what the colours say,
for print. Functions return an empty list when there is nothing to draw.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from es2fast.report.schema import ModelResult, Report
from es2fast.report.suite import is_base

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "--")
MARKERS = ("o", "s", "^", "D", "v", "P")
GROUP_LOOK = {"harmful": ("#D55E00", "^"), "harmless": ("#0072B2", "o")}
PANEL = (4.3, 3.0)  # inches
MAX_BARS = 12  # layers x models drawn as bars; more become lines over the depth


# title, attributes and keys below a layer's result, unit
LAYER_PANELS = (
    ("Distance between the groups", "distance_over_base", "mean distance / d0"),
    ("Length of the states", "norm_ratio", "mean ‖h‖ / ‖h_base‖"),
    ("Distance, last instruction token", "positions.instruction.distance_over_base",
     "mean distance / d0"),
    ("Distance, mean of template tokens", "positions.template.distance_over_base",
     "mean distance / d0"),
)  # fmt: skip


def training_curves(
    rows: Sequence[Mapping[str, Any]], kl_budget: float | None = None
) -> list[Figure]:
    """Loss, separation, refusal anchor, KL, λ, distances and norms over the optimizer steps, a
    panel each.

    Args:
        rows: metrics.jsonl; a row without a metric leaves a gap, a metric in no row has no panel,
            and neither has a λ that never changes. Rows of several seeds, a mean's, are a line
            each.
        kl_budget: nats per token, drawn as a line in the KL panel.
    """
    figures = []
    for title, unit, series in _panels(rows):
        if not series or (title.startswith("λ") and _constant(series)):
            continue
        figure, axes = panel(title, "optimizer step", unit)
        _draw_series(axes, series)
        if title.startswith("KL") and kl_budget is not None:
            axes.axhline(kl_budget, color="#555555", linestyle=":", label="budget")
            axes.legend()
        if title.startswith("λ"):
            _log_if_wide(axes, series)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        figures.append(figure)
    return figures


def separation_by_layer(report: Report) -> list[Figure]:
    """Distance in units of d0, also at other tokens than the last, and the norm ratio."""
    layers = report.reported_layers
    figures = []
    for title, key, unit in LAYER_PANELS if layers else ():
        if all(math.isnan(v) for model in report.models for v in _layer_values(model, layers, key)):
            continue
        figure, axes = panel(title, "decoder block (0-based)", unit)
        if len(layers) * len(report.models) <= MAX_BARS:
            _layer_bars(axes, report, layers, key)
        else:
            _layer_lines(axes, report, layers, key)
        axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0, top=1.05 * max(1.0, axes.get_ylim()[1]))
        legend_above(figure)
        figures.append(figure)
    return figures


def panel(title: str, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty panel."""
    figure = Figure(figsize=PANEL, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def to_svg(figure: Figure, name: str) -> str:
    """Inline SVG: same figure, same text; no date, no prolog, no link, ids prefixed with `name`.

    Several SVGs in one page share one id space; without the prefix the clip path of one figure
    could cut the lines of another.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"es2fast-{name}", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)


def legend_above(figure: Figure) -> None:
    """A legend above the panel, where it hides no data; each label once."""
    unique: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        unique = {**dict(zip(labels, handles)), **unique}
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=2, fontsize=8)


def _constant(series: Mapping[str, Any]) -> bool:
    values = [value for _, line in series.values() for value in line]
    return max(values) - min(values) <= 1e-9 * max(abs(value) for value in values)


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, unit, {label: (steps, values)}) for each panel, empty where nothing was logged."""
    return [
        ("Total loss", "loss (dimensionless)", _single(rows, "loss")),
        ("Separation loss per layer", "loss (units of d0)", _per_layer(rows, "sep/")),
        ("Refusal of harmful prompts", "cross-entropy (nats per token)", _single(rows, "refusal")),
        ("KL to base, harmless tokens", "nats per token", _single(rows, "kl")),
        ("λ, weight of the KL", "λ (1/nat)", _single(rows, "kl_weight")),
        ("Distance per layer", "mean distance / d0", _per_layer(rows, "distance_over_base/")),
        ("Norm ratio per layer", "mean ‖h‖ / ‖h_base‖", _per_layer(rows, "norm_ratio/")),
    ]


def _single(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """The metric's line, or one for each seed where rows have one."""
    points: dict[str, list[tuple[float, float]]] = {}
    for i, row in enumerate(rows):
        if _known(row, key):
            name = f"seed {row['seed']}" if "seed" in row else ""
            points.setdefault(name, []).append((row.get("step", i), row[key]))
    return {name: tuple(zip(*points[name])) for name in sorted(points)}


def _per_layer(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    found = {key for row in rows for key in row if key.startswith(prefix)}
    layers = sorted((key.removeprefix(prefix) for key in found), key=lambda k: (len(k), k))
    return {
        ", ".join(filter(None, (f"block {shown_name(layer)}", name))): line
        for layer in layers
        for name, line in _single(rows, prefix + layer).items()
    }


def _known(row: Mapping[str, Any], key: str) -> bool:
    value = row.get(key)
    return isinstance(value, int | float) and math.isfinite(value)


def _draw_series(axes: Axes, series: Mapping[str, Any]) -> None:
    for index, (label, (steps, values)) in enumerate(series.items()):
        axes.plot(
            steps,
            values,
            color=COLOURS[index % len(COLOURS)],
            linestyle=STYLES[index % len(STYLES)],
            marker="o" if len(steps) == 1 else "",
            linewidth=1.5,
            label=label or None,
        )
    if len(series) > 1 or "" not in series:
        axes.legend(ncols=1 + len(series) // 6)


def _log_if_wide(axes: Axes, series: Mapping[str, Any]) -> None:
    values = [value for _, line in series.values() for value in line]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")


def _layer_values(model: ModelResult, layers: list[int], key: str) -> list[float]:
    found = []
    for layer in layers:
        value: Any = model.separation.get(str(layer))
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
        found.append(math.nan if value is None else value)
    return found


def _layer_bars(axes: Axes, report: Report, layers: list[int], key: str) -> None:
    models = report.models
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        places = [i + (index - (len(models) - 1) / 2) * width for i in range(len(layers))]
        colour, hatch = model_look(model.name, index)
        values = _layer_values(model, layers, key)
        bars = axes.bar(
            places,
            values,
            width,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=shown_name(model.name),
        )
        texts = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlim(-0.7, len(layers) - 0.3)


def _layer_lines(axes: Axes, report: Report, layers: list[int], key: str) -> None:
    for index, model in enumerate(report.models):
        style = "--" if is_base(model.name) else "-"
        colour, label = model_look(model.name, index)[0], shown_name(model.name)
        values = _layer_values(model, layers, key)
        axes.plot(
            layers,
            values,
            style,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=3,
            label=label,
        )
    separated = report.separated_layers
    if len(separated) < len(layers):
        for index, layer in enumerate(separated):
            once = "separated" if index == 0 else None
            axes.axvline(layer, color="#D55E00", linewidth=1, alpha=0.7, label=once)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))


def model_look(name: str, index: int) -> tuple[str, str]:
    """Colour and hatch: the base model grey and plain, the others each their own."""
    if is_base(name):
        return "#999999", ""
    return COLOURS[(index - 1) % len(COLOURS)], HATCHES[index % len(HATCHES)]


def shown_name(name: str) -> str:
    """A name as matplotlib should show it: short, and no mathematics between dollar signs."""
    name = " ".join(str(name).split())
    return (name if len(name) <= 32 else name[:31] + "…").replace("$", r"\$")
