"""The figure of `es2fast layers`: what was measured at every block, and the blocks chosen.

Same look as the report's figures: matplotlib's object API, Okabe and Ito's colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from es2fast.probing.probes import LayerProbe
from es2fast.report.plots import COLOURS, GROUP_LOOK

PANELS = (
    ("accuracy", "Probe accuracy", "held-out accuracy"),
    ("margin", "Probe margin", "mean distance to the boundary"),
    ("fisher", "Fisher ratio", "between / within variance"),
    ("silhouette", "Silhouette", "mean silhouette"),
    ("norm", "Norm of the states", "mean ‖h‖"),
    ("relative_push", "Push that SCAV needs", "mean |ε| / ‖h‖"),
)


def layer_figure(table: Sequence[LayerProbe], chosen: Sequence[int], accuracy: float) -> Figure:
    """Six panels over the blocks; vertical lines mark the chosen ones.

    Args:
        table: one row per block.
        chosen: the separated blocks.
        accuracy: threshold of `layer_choice`, drawn in the first panel.
    """
    figure = Figure(figsize=(10.2, 5.4), layout="constrained", facecolor="white")
    places = [row.layer for row in table]
    for index, (field, title, unit) in enumerate(PANELS):
        axes = figure.add_subplot(2, 3, index + 1)
        values = [getattr(row, field) for row in table]
        axes.plot(places, values, color=COLOURS[0], marker="o", markersize=4, linewidth=1.5)
        for layer in chosen:
            label = "chosen" if layer == chosen[0] else None
            axes.axvline(
                layer, label=label, color=GROUP_LOOK["harmful"][0], linestyle="--", linewidth=1
            )
        if field == "accuracy":
            axes.axhline(accuracy, color="#555555", linestyle=":", label="threshold")
            axes.set_ylim(min(0.45, *values), 1.03)
            axes.legend()
        elif field != "silhouette":
            axes.set_ylim(min(0.0, *values), 1.08 * max(1e-12, *values))
        axes.set(title=title, ylabel=unit, xlabel="decoder block (0-based)" if index > 2 else "")
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.grid(color="#E5E5E5", linewidth=0.6)
    return figure


def save_layer_plot(
    path: Path, table: Sequence[LayerProbe], chosen: Sequence[int], accuracy: float
) -> None:
    """Writes the figure; the format follows the suffix (png, svg, pdf)."""
    layer_figure(table, chosen, accuracy).savefig(path, dpi=110)
