"""The figure of the study on real models: what attacks get out of each model, beside its price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.studies.real_arms import ATTACKS, label
from es2fast.report.plots import COLOURS, MARKERS, legend_above
from es2fast.report.stats import rate_interval

KINDS = {"ordinary": "ordinary prompts\nrefused", "borderline": "borderline prompts\nrefused"}

Row = dict[str, Any]
Point = tuple[float, int]  # rate, n


def figure(rows: Sequence[Row], models: Sequence[str]) -> Figure:
    """Rates with their 95 % intervals, one colour and mark per model.

    Args:
        rows: of one base model and one seed.
        models: their order; those without rows are left out.
    """
    models = [name for name in models if any(row["model"] == name for row in rows)]
    made = Figure(figsize=(9.5, 5.0), layout="constrained", facecolor="white")
    attacked, price = made.subplots(1, 2, width_ratios=(3, 2))
    names = [label(attack) for attack, _ in ATTACKS]
    names = [name for name in names if any(row["attack"] == name for row in rows)]
    _points(attacked, "useful answers to harmful prompts under", names, [
        {row["attack"]: (row["useful"], row["n"])
         for row in rows if row["model"] == model and "useful" in row}
        for model in models
    ])  # fmt: skip
    _points(price, "the price on harmless prompts", list(KINDS.values()), [
        {KINDS[kind]: (rate, n)
         for row in rows if row["model"] == model and row["attack"] == "direct"
         for kind, (n, rate) in row["harmless"]["refusal_by_type"].items() if kind in KINDS}
        for model in models
    ])  # fmt: skip
    for index, model in enumerate(models):
        attacked.plot([], [], MARKERS[index % len(MARKERS)], color=_colour(index), label=model)
    legend_above(made)
    return made


def _points(
    axes: Axes, title: str, names: Sequence[str], series: Sequence[dict[str, Point]]
) -> None:
    step = 0.8 / max(len(series), 1)
    for index, found in enumerate(series):
        for place, name in enumerate(names):
            if name not in found:
                continue
            rate, n = found[name]
            low, high = rate_interval(rate, n)
            y = place + (index - (len(series) - 1) / 2) * step
            axes.hlines(y, 100 * low, 100 * high, color=_colour(index), linewidth=1.2)
            axes.plot(100 * rate, y, MARKERS[index % len(MARKERS)], color=_colour(index),
                      markersize=5)  # fmt: skip
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("% with 95 % interval")
    axes.grid(axis="x", color="#dddddd")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
