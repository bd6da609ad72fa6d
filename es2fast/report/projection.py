"""The figure of both groups in two dimensions, a panel per model.

The components are common to all panels, fitted once on the union of all states; the axes are not:
after training the groups may lie ten times as far apart, and on common axes the base model's panel
would be white with a dot in it. Each panel says how wide it is in units of the first, and shows the
first one's frame.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from es2fast.report.plots import GROUP_LOOK, panel, shown_name
from es2fast.report.schema import BASE

MAX_POINTS = 256  # prompts per group


def projection(states: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """Both groups of every model, on the first two principal components of all of them.

    Args:
        states: per model and group (`harmful`, `harmless`), (n, H). Rows that are not finite are
            dropped, and a model that has none left.
    """
    groups = {(m, g): _rows_of(states[m][g]) for m in states for g in GROUP_LOOK if g in states[m]}
    groups = {key: rows for key, rows in groups.items() if len(rows)}
    if sum(len(rows) for rows in groups.values()) < 3:
        return []
    plane, share = _principal_plane(groups)
    figures: list[Figure] = []
    first: Axes | None = None
    for model in dict.fromkeys(model for model, _ in plane):
        title = {BASE: "Before (base)", "tuned": "After (tuned)"}.get(model, shown_name(model))
        figure, axes = panel(
            title, f"PC 1 ({share[0]:.0%} of the variance)", f"PC 2 ({share[1]:.0%})"
        )
        for group in GROUP_LOOK:
            if (model, group) in plane:
                _scatter(axes, group, plane[model, group])
        if first is None:
            first = axes
        else:
            _scale_note(axes, first)
        axes.legend(fontsize=8)
        figures.append(figure)
    return figures


def _scale_note(axes: Axes, first: Axes) -> None:
    """How much wider these axes are than the first panel's, and that panel's frame."""
    (left, right), (low, high) = first.get_xlim(), first.get_ylim()
    axes.add_patch(
        Rectangle(
            (left, low),
            right - left,
            high - low,
            fill=False,
            edgecolor="#555555",
            linestyle="--",
            linewidth=0.9,
            label="frame of the first panel",
        )
    )
    axes.autoscale_view()
    own = axes.get_xlim()
    factor = (own[1] - own[0]) / (right - left)
    axes.set_title(f"{axes.get_title()}: {factor:.3g} times as wide", fontsize=11)


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
