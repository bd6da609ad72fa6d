"""The definitions of the ops in plain torch: slow, obvious, the ground truth of every test.

Nothing here is chunked, fused or rearranged. Run it in float64 on the (already rounded) inputs of
the op under test: then no rounding is shared.
"""

from __future__ import annotations

import torch
from torch import Tensor

# --- linear KL ------------------------------------------------------------------------------------


def head_logits_reference(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None = None,  # (V,)
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
) -> Tensor:  # (N, vocab_size)
    """Logits of an LM head: ``softcap(logit_scale * (W h + b)) / temperature``, unpadded."""
    logits = hidden @ weight.t()
    if bias is not None:
        logits = logits + bias
    logits = logit_scale * logits
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits / temperature)[:, : weight.shape[0] if vocab_size is None else vocab_size]


def divergence_reference(
    student_logits: Tensor,  # (N, V)
    teacher_logits: Tensor,  # (N, V)
    direction: str = "forward",
    beta: float = 0.5,
) -> Tensor:  # (N,) nats
    """Row-wise KL(t||s) ("forward"), KL(s||t) ("reverse") or JSD_beta ("jsd")."""
    log_s = torch.log_softmax(student_logits, dim=-1)
    log_t = torch.log_softmax(teacher_logits, dim=-1)
    if direction == "forward":
        return (log_t.exp() * (log_t - log_s)).sum(-1)
    if direction == "reverse":
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    if direction == "jsd":
        log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
        kl_tm = (log_t.exp() * (log_t - log_m)).sum(-1)
        kl_sm = (log_s.exp() * (log_s - log_m)).sum(-1)
        return beta * kl_tm + (1 - beta) * kl_sm
    raise ValueError(f"direction={direction!r}: expected 'forward', 'reverse' or 'jsd'")


def linear_kl_div_reference(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    teacher_hidden: Tensor,  # (N, Ht)
    teacher_weight: Tensor | None = None,  # (V, Ht)
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    direction: str = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    vocab_size: int | None = None,
    token_weights: Tensor | None = None,  # (N,)
    reduction: str = "mean",
) -> Tensor:
    """What :func:`es2fast.linear_kl_div` computes, by its definition and through autograd."""
    if teacher_weight is None:
        teacher_weight, teacher_bias = weight.detach(), None if bias is None else bias.detach()
    vocab_size = min(weight.shape[0], teacher_weight.shape[0]) if vocab_size is None else vocab_size

    def logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return head_logits_reference(
            h,
            w,
            b,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            vocab_size=vocab_size,
        )

    student = logits(hidden, weight, bias)
    with torch.no_grad():
        teacher = logits(teacher_hidden, teacher_weight, teacher_bias)
    rows = divergence_reference(student, teacher, direction, beta)
    if token_weights is None:
        token_weights = torch.ones_like(rows)
    rows = rows * token_weights.to(rows.dtype)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    total = token_weights.to(rows.dtype).sum()
    return rows.sum() / total if total != 0 else rows.sum() * 0.0


# --- end of linear KL -----------------------------------------------------------------------------


# --- separation -----------------------------------------------------------------------------------
# n harmful rows, m harmless rows, H hidden size.

SEPARATION_LOSSES = (
    "hinge", "l2", "log", "softplus", "squared", "centroid", "fisher", "cosine",
)  # fmt: skip


def pairwise_distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances d_ij = ||a_i - b_j||: (n, H), (m, H) -> (n, m).

    The gradient at d = 0 is the subgradient 0, not NaN: the root is taken of a masked value.
    """
    squared = (a[:, None, :] - b[None, :, :]).square().sum(-1)
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0)


def _pair_values(d: Tensor, loss: str, margin: float | None, scale: float) -> Tensor:  # like d
    """The loss of each pair from its distance."""
    if loss == "log":
        return -(d / scale).clamp_min(1e-12).log()
    if loss == "l2" or (loss == "fisher" and margin is None):
        return -d / scale
    if loss == "squared" and margin is None:
        return -d.square() / scale**2
    if loss not in SEPARATION_LOSSES:
        raise ValueError(f"separation: unknown loss {loss!r}; use one of {SEPARATION_LOSSES}")
    if margin is None:
        raise ValueError(f"separation: loss={loss!r} needs a margin, in the units of the input")
    if loss == "squared":
        return (margin**2 - d.square()).relu() / scale**2
    if loss == "softplus":
        return torch.nn.functional.softplus((margin - d) / scale, threshold=100.0)
    return (margin - d).relu() / scale


def separation(
    harmful: Tensor,
    harmless: Tensor,
    *,
    loss: str = "hinge",
    margin: float | None = None,
    scale: float = 1.0,
    harmful_weights: Tensor | None = None,  # (n,)
    harmless_weights: Tensor | None = None,  # (m,)
    covariance: Tensor | None = None,  # (H, H)
) -> Tensor:
    """Separation loss of two groups of embeddings; smaller = further apart.

    With d = ||a_i - b_j|| and weighted means over all pairs: hinge = mean relu(margin - d) / scale;
    l2 = -mean d / scale (arXiv 2603.20206); log = -mean log(d / scale), d / scale at least 1e-12;
    softplus = mean softplus((margin - d) / scale); squared = -mean d^2 / scale^2, with a margin
    mean relu(margin^2 - d^2) / scale^2; centroid = -||mean a - mean b|| / scale, with a margin
    relu(margin - ||mean a - mean b||) / scale; fisher = l2, with a margin hinge, of the Mahalanobis
    distances sqrt((a_i - b_j)^T covariance^-1 (a_i - b_j)); cosine = mean relu(cos(a_i, b_j) -
    margin), where a zero row has cosine 0.

    Args:
        harmful: (n, H).
        harmless: (m, H).
        loss: one of the names above.
        margin: in the units of the input; l2 and log ignore it.
        scale: d0, the mean distance under the base model, in the units of the input.
        harmful_weights, harmless_weights: of the rows; None: all 1.
        covariance: fisher only.

    Returns:
        scalar; a graph-connected zero when a group is empty or has no weight.

    Raises:
        ValueError: unknown loss; hinge, softplus or cosine without margin; fisher without
            covariance.
    """
    u, v = (
        torch.ones_like(rows[:, 0]) if weights is None else weights.to(rows.dtype)
        for rows, weights in ((harmful, harmful_weights), (harmless, harmless_weights))
    )
    if u.sum() == 0 or v.sum() == 0:
        return (harmful.sum() + harmless.sum()) * 0.0
    u, v = u / u.sum(), v / v.sum()
    if loss == "centroid":
        d = pairwise_distances((u @ harmful)[None], (v @ harmless)[None])[0, 0]
        return (-d if margin is None else (margin - d).relu()) / scale
    if loss == "cosine":
        if margin is None:
            raise ValueError("separation: loss='cosine' needs a margin, a cosine between -1 and 1")
        a, b = (
            x / torch.where(x.any(-1), x.norm(dim=-1), 1.0)[:, None] for x in (harmful, harmless)
        )
        return u @ (a @ b.t() - margin).relu() @ v
    if loss == "fisher":
        if covariance is None:
            raise ValueError("separation: loss='fisher' needs a covariance")
        root = torch.linalg.cholesky(covariance)  # d^2 = |L^-1 (a - b)|^2
        harmful, harmless = (
            torch.linalg.solve_triangular(root, x.t(), upper=False).t() for x in (harmful, harmless)
        )
    return u @ _pair_values(pairwise_distances(harmful, harmless), loss, margin, scale) @ v
