"""The definitions of es2fast's losses in plain torch: slow, obvious, the ground truth of all tests.

Legend: n harmful rows, m harmless rows, H hidden size, N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances d_ij = ||a_i - b_j||: (n, H), (m, H) -> (n, m).

    The gradient at d = 0 is the subgradient 0, not NaN: the root is taken of a masked value.
    """
    squared = (a[:, None, :] - b[None, :, :]).square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def separation(
    harmful: Tensor,
    harmless: Tensor,
    *,
    loss: str = "hinge",
    margin: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Separation loss of two groups of embeddings; smaller = further apart.

    With d = ||a_i - b_j|| and means over all pairs: hinge = mean relu(margin - d) / scale;
    l2 = -mean d / scale (arXiv 2603.20206); log = -mean log(d / scale);
    squared = -mean d^2 / scale^2; centroid = -||mean a - mean b|| / scale.

    Args:
        harmful: (n, H).
        harmless: (m, H).
        loss: one of the names above.
        margin: hinge only, in the units of the input.
        scale: d0, the mean distance under the base model, in the units of the input.

    Returns:
        scalar; a graph-connected zero when a group is empty.

    Raises:
        ValueError: unknown loss; hinge without margin.
    """
    if harmful.shape[0] == 0 or harmless.shape[0] == 0:
        return (harmful.sum() + harmless.sum()) * 0.0
    if loss == "centroid":
        between = pairwise_distances(harmful.mean(0)[None], harmless.mean(0)[None])
        return -between[0, 0] / scale
    d = pairwise_distances(harmful, harmless)
    if loss == "hinge":
        if margin is None:
            raise ValueError("separation: loss='hinge' needs a margin, in the units of the input")
        return (margin - d).relu().mean() / scale
    if loss == "l2":
        return -d.mean() / scale
    if loss == "log":
        return -(d / scale).clamp_min(torch.finfo(d.dtype).tiny).log().mean()
    if loss == "squared":
        return -d.square().mean() / scale**2
    raise ValueError(f"separation: unknown loss {loss!r}; use hinge, l2, log, squared or centroid")
