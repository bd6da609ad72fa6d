"""Panels of an attack's curves: useful answers over a strength, a block, a length of a prefill."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from es2fast.report.curves import CurvePanel, curve_panels
from es2fast.report.plots import MARKERS, STYLES, legend_above, model_look, panel, shown_name
from es2fast.report.schema import Report
from es2fast.report.stats import rate_interval

KINDS = {"variants": "held-out prompts", "trials": "the attacker's search, training prompts"}


def attack_curves(report: Report) -> list[Figure]:
    """A panel per attack and kind of curve; every model has its own line."""
    return [_panel(found, report.names) for found in curve_panels(report)]


def _panel(found: CurvePanel, names: list[str]) -> Figure:
    """Lines through the best point of each place, with the Wilson interval where n is known."""
    figure, axes = panel(
        f"{shown_name(found.attack)}\n{KINDS[found.kind]}", shown_name(found.parameter), "useful"
    )
    axes.title.set_fontsize(10)
    for curve in found.curves:
        index = names.index(curve.model)
        colour = model_look(curve.model, index)[0]
        xs, ys = zip(*curve.best)
        axes.plot(xs, ys, color=colour, linestyle=STYLES[index % len(STYLES)], linewidth=1.5,
                  marker=MARKERS[index % len(MARKERS)], markersize=4,
                  label=shown_name(curve.model))  # fmt: skip
        if len(curve.points) > len(curve.best):
            every_x, every_y = zip(*curve.points)
            axes.scatter(every_x, every_y, s=9, facecolors="none", edgecolors=colour)
        if curve.n:
            bounds = [rate_interval(y, curve.n) for y in ys]
            low, high = zip(*bounds)
            axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
    places = {x for curve in found.curves for x, _ in curve.points}
    if all(x.is_integer() for x in places):
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    elif min(places) > 0 and max(places) > 50 * min(places):
        axes.set_xscale("log")
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    legend_above(figure)
    return figure
