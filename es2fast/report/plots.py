"""The four figures of report.html, and their inline SVG.

Figures are built with matplotlib's object API: no pyplot, no global state, no display needed. The
colours are Okabe and Ito's (readable with any colour vision); marks, hatches and line styles repeat
what the colours say, for print. Every function returns None when there is nothing to draw.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from es2fast.report.schema import BASE, AttackResult, ModelResult, Report
from es2fast.report.stats import rate_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
HATCHES = ("", "//", "..", "xx", "--")
GROUP_LOOK = {"harmful": ("#D55E00", "^"), "harmless": ("#0072B2", "o")}
OUTCOME_LOOK = {  # the rate with the error bar starts at 0, so useful comes first
    "useful": ("#D55E00", "//"),
    "gibberish": ("#D9D9D9", ".."),
    "refused": ("#0072B2", ""),
}
MAX_POINTS = 256  # prompts per group in the projection
MAX_BARS = 6  # layers drawn as bars; more become a line over the depth


def training_curves(
    rows: Sequence[Mapping[str, Any]], kl_budget: float | None = None
) -> Figure | None:
    """Loss, separation, KL, λ, distances and norms over the optimizer steps.

    Args:
        rows: metrics.jsonl; a row without a metric leaves a gap, a metric in no row has no panel.
        kl_budget: nats per token, drawn as a line in the KL panel.
    """
    panels = [panel for panel in _panels(rows) if panel[2]]
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = _figure(3.7 * columns, 2.7 * lines)
    for index, (title, unit, series) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        _draw_series(axes, series)
        if title.startswith("KL") and kl_budget is not None:
            axes.axhline(kl_budget, color="#555555", linestyle=":", label="budget")
            axes.legend()
        if title.startswith("λ"):
            _log_if_wide(axes, series)
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def separation_by_layer(report: Report) -> Figure | None:
    """Distance in units of d0, and beside it the norm ratio that may have bought it."""
    layers = report.reported_layers
    if not layers:
        return None
    figure = _figure(9.6, 3.4)
    panels = (
        ("Distance between the groups", "distance_over_base", "mean distance / d0"),
        ("Length of the states", "norm_ratio", "mean ‖h‖ / ‖h_base‖"),
    )
    for index, (title, key, unit) in enumerate(panels):
        axes = figure.add_subplot(1, 2, index + 1)
        if len(layers) <= MAX_BARS:
            _layer_bars(axes, report, layers, key)
        else:
            _layer_lines(axes, report, layers, key)
        axes.axhline(1, color="#555555", linewidth=0.8, linestyle=":")
        axes.set(title=title, xlabel="decoder block (0-based)", ylabel=unit)
        axes.set_ylim(bottom=0, top=1.05 * max(1.0, axes.get_ylim()[1]))
    _shared_legend(figure)
    return figure


def projection(states: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Both groups of every model, on one pair of axes fitted to all of them.

    Args:
        states: per model and group (`harmful`, `harmless`), (n, H). Rows that are not finite are
            dropped, and a model that has none left.
    """
    groups = {(m, g): _rows_of(states[m][g]) for m in states for g in GROUP_LOOK if g in states[m]}
    groups = {key: rows for key, rows in groups.items() if len(rows)}
    if sum(len(rows) for rows in groups.values()) < 3:
        return None
    plane, share = _principal_plane(groups)
    models = list(dict.fromkeys(model for model, _ in plane))
    figure = _figure(4.8 * len(models), 4.0)
    first: Axes | None = None
    for index, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), index + 1, sharex=first, sharey=first)
        first = first or axes
        for group in GROUP_LOOK:
            if (model, group) in plane:
                _scatter(axes, group, plane[model, group])
        axes.set(title={BASE: "Before (base)", "tuned": "After (tuned)"}.get(model, _text(model)))
        axes.set_xlabel(f"PC 1, residual-stream units ({share[0]:.0%} of the variance)")
        axes.set_ylabel(f"PC 2, residual-stream units ({share[1]:.0%})")
        axes.legend()
    return figure


def attack_outcomes(report: Report) -> Figure | None:
    """How harmful prompts ended under each attack, base above tuned."""
    names, models = report.attack_names, report.models
    if not names:
        return None
    figure = _figure(8.2, 1.1 + 0.36 * len(names) * (len(models) + 0.6))
    axes = figure.add_subplot()
    places, labels, counts = [], [], []
    for i, name in enumerate(names):
        for j, model in enumerate(models):
            place = i * (len(models) + 0.6) + j
            places.append(place)
            labels.append(f"{_text(name)}, {_text(model.name)}")
            counts.append(_outcome_bar(axes, model.attacks.get(name), place))
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("held-out harmful prompts (%); error bar: 95 % Wilson interval of useful")
    twin = axes.secondary_yaxis("right")
    twin.set_yticks(places, counts)
    twin.tick_params(length=0)
    _shared_legend(figure)
    return figure


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


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _shared_legend(figure: Figure) -> None:
    """One legend above all panels, where it hides no data; each label once."""
    unique: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        unique = {**dict(zip(labels, handles)), **unique}
    figure.legend(unique.values(), unique.keys(), loc="outside upper center", ncols=4)


def _panels(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, dict[str, Any]]]:
    """(title, unit, {label: (steps, values)}) for each panel, empty where nothing was logged."""
    return [
        ("Total loss", "loss (dimensionless)", _single(rows, "loss")),
        ("Separation loss per layer", "loss (units of d0)", _per_layer(rows, "sep/")),
        ("KL to base, harmless tokens", "nats per token", _single(rows, "kl")),
        ("λ, weight of the KL", "λ (1/nat)", _single(rows, "kl_weight")),
        ("Distance per layer", "mean distance / d0", _per_layer(rows, "distance_over_base/")),
        ("Norm ratio per layer", "mean ‖h‖ / ‖h_base‖", _per_layer(rows, "norm_ratio/")),
    ]


def _single(rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    points = [(row.get("step", i), row[key]) for i, row in enumerate(rows) if _known(row, key)]
    return {"": tuple(zip(*points))} if points else {}


def _per_layer(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    found = {key for row in rows for key in row if key.startswith(prefix)}
    layers = sorted((key.removeprefix(prefix) for key in found), key=lambda k: (len(k), k))
    series = {layer: _single(rows, prefix + layer) for layer in layers}
    return {f"block {_text(layer)}": line[""] for layer, line in series.items() if line}


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
    axes.grid(color="#E5E5E5", linewidth=0.6)


def _log_if_wide(axes: Axes, series: Mapping[str, Any]) -> None:
    values = [value for _, line in series.values() for value in line]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")


def _layer_values(model: ModelResult, layers: list[int], key: str) -> list[float]:
    found = (getattr(model.separation.get(str(layer)), key, None) for layer in layers)
    return [math.nan if value is None else value for value in found]


def _layer_bars(axes: Axes, report: Report, layers: list[int], key: str) -> None:
    models = report.models
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        places = [i + (index - (len(models) - 1) / 2) * width for i in range(len(layers))]
        colour, hatch = _model_look(model.name, index)
        values = _layer_values(model, layers, key)
        bars = axes.bar(
            places,
            values,
            width,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=_text(model.name),
        )
        texts = ["" if math.isnan(value) else f"{value:.2f}" for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=8)
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_xlim(-0.7, len(layers) - 0.3)


def _layer_lines(axes: Axes, report: Report, layers: list[int], key: str) -> None:
    for index, model in enumerate(report.models):
        style = "--" if model.name == BASE else "-"
        colour, label = _model_look(model.name, index)[0], _text(model.name)
        values = _layer_values(model, layers, key)
        axes.plot(layers, values, style, color=colour, marker="o", markersize=3, label=label)
    separated = report.separated_layers
    if len(separated) < len(layers):
        for index, layer in enumerate(separated):
            once = "separated" if index == 0 else None
            axes.axvline(layer, color="#D55E00", linewidth=1, alpha=0.7, label=once)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))


def _model_look(name: str, index: int) -> tuple[str, str]:
    """Colour and hatch: the base model grey and plain, the others each their own."""
    if name == BASE:
        return "#999999", ""
    return COLOURS[(index - 1) % len(COLOURS)], HATCHES[index % len(HATCHES)]


def _rows_of(value: Any) -> np.ndarray:
    rows = np.asarray(value, dtype=np.float64)[:MAX_POINTS]
    return rows[np.isfinite(rows).all(axis=1)]


def _principal_plane(
    groups: Mapping[tuple[str, str], np.ndarray],
) -> tuple[dict[tuple[str, str], np.ndarray], np.ndarray]:
    """First two principal components of the union, with harmful to the right of harmless."""
    union = np.concatenate(list(groups.values()))
    mean = union.mean(axis=0)
    _, sizes, axes = np.linalg.svd(union - mean, full_matrices=False)
    share = sizes**2 / max(float((sizes**2).sum()), np.finfo(float).tiny)
    sign = np.ones((2, 1))
    if len({group for _, group in groups}) == 2:
        centre = {
            kind: np.concatenate([groups[key] for key in groups if key[1] == kind]).mean(axis=0)
            for kind in GROUP_LOOK
        }
        sign = np.where(axes[:2] @ (centre["harmful"] - centre["harmless"]) < 0, -1.0, 1.0)[:, None]
    basis = axes[:2] * sign[: len(axes[:2])]
    return {name: (rows - mean) @ basis.T for name, rows in groups.items()}, share


def _scatter(axes: Axes, group: str, points: np.ndarray) -> None:
    colour, marker = GROUP_LOOK[group]
    face = colour if group == "harmful" else "none"  # filled against hollow, for print
    axes.scatter(
        points[:, 0],
        points[:, 1],
        s=18,
        marker=marker,
        facecolors=face,
        edgecolors=colour,
        linewidths=0.8,
        alpha=0.75,
        label=f"{group}, {len(points)} prompts",
    )


def _outcome_bar(axes: Axes, attack: AttackResult | None, place: float) -> str:
    """One stacked bar; returns the count to print at its end."""
    if not attack:
        return "not run"
    left = 0.0
    for outcome, (colour, hatch) in OUTCOME_LOOK.items():
        axes.barh(
            place,
            getattr(attack, outcome),
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=outcome,
        )
        left += getattr(attack, outcome)
    useful = attack.useful
    low, high = rate_interval(useful, attack.n)
    error = [[max(0.0, useful - low)], [max(0.0, high - useful)]]
    axes.errorbar(useful, place, xerr=error, fmt="none", ecolor="black", capsize=3, linewidth=1.2)
    return f"n = {attack.n}"


def _text(name: str) -> str:
    """A name as matplotlib should show it: short, and no mathematics between dollar signs."""
    name = " ".join(str(name).split())
    return (name if len(name) <= 32 else name[:31] + "…").replace("$", r"\$")
