"""The figure of `es2fast layers`: what was measured at every block, and the blocks chosen.

Bars are 95 % intervals over prompts, where there are any.

Same look as the report's figures: matplotlib's object API, Okabe and Ito's colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from es2fast.probing.table import LayerProbe
from es2fast.report.plots import COLOURS, GROUP_LOOK

# field, field of its interval, title, unit
PANELS = (
    ("accuracy", "accuracy_interval", "Probe accuracy", "cross-validated accuracy"),
    ("margin", "margin_interval", "Probe margin", "mean distance to the boundary"),
    ("relative_push", "push_interval", "Push that SCAV needs", "mean |ε| / ‖h‖"),
    ("effect", "effect_interval", "Effect of the gap on the refusal", "log-odds lost (nats)"),
    ("fisher", None, "Fisher ratio", "between / within variance"),
    ("silhouette", None, "Silhouette", "mean silhouette"),
    ("norm", None, "Norm of the states", "mean ‖h‖"),
)


def layer_figure(table: Sequence[LayerProbe], chosen: Sequence[int]) -> Figure:
    """A panel per figure over the blocks; vertical lines mark the chosen ones.

    Args:
        table: one row per block.
        chosen: the separated blocks.
    """
    drawn = [panel for panel in PANELS if getattr(table[0], panel[0]) is not None]
    columns = -(-len(drawn) // 2)
    figure = Figure(figsize=(3.4 * columns, 5.4), layout="constrained", facecolor="white")
    for index, (field, ends, title, unit) in enumerate(drawn):
        axes = figure.add_subplot(2, columns, index + 1)
        _panel(axes, table, field, ends)
        for layer in chosen:
            label = "chosen" if layer == chosen[0] else None
            axes.axvline(
                layer, label=label, color=GROUP_LOOK["harmful"][0], linestyle="--", linewidth=1
            )
        if index == 0:
            axes.legend()
        axes.set(title=title, ylabel=unit, xlabel="decoder block (0-based)" * (index >= columns))
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.grid(color="#E5E5E5", linewidth=0.6)
    return figure


def _panel(axes: Axes, table: Sequence[LayerProbe], field: str, ends: str | None) -> None:
    """One figure over the blocks, with error bars where it has intervals."""
    values = [getattr(row, field) for row in table]
    found = [getattr(row, ends) for row in table] if ends else []
    bars = [[max(v - low, 0.0) for v, (low, _) in zip(values, found)],
            [max(high - v, 0.0) for v, (_, high) in zip(values, found)]]  # fmt: skip
    axes.errorbar(
        [row.layer for row in table], values, yerr=bars if found else None, color=COLOURS[0],
        marker="o", markersize=4, linewidth=1.5, elinewidth=1, capsize=2,
    )  # fmt: skip
    lows, highs = [low for low, _ in found] or values, [high for _, high in found] or values
    if field == "accuracy":
        axes.set_ylim(min(0.45, *lows, 0.45), 1.03)
    elif field != "silhouette":
        axes.set_ylim(min(0.0, *lows, 0.0), 1.08 * max(1e-12, *highs, 1e-12))


def save_layer_plot(path: Path, table: Sequence[LayerProbe], chosen: Sequence[int]) -> None:
    """Writes the figure; the format follows the suffix (png, svg, pdf)."""
    layer_figure(table, chosen).savefig(path, dpi=110)
