"""A frozen whitening of hidden states: Mahalanobis distances as plain distances.

The model of the within-group covariance of the base model's states is shrunk and low rank plus
diagonal, because there are fewer states than dimensions:

    S = (1 - rho) (V diag(lambda) V^T + diag(rest)) + rho tr(S)/H I  =  diag(delta) + U U^T

with the leading ``rank`` eigenpairs, the diagonal of what they leave, and shrinkage rho. Then
``||W x||^2 = x^T S^-1 x`` for ``W = (I - F F^T) diag(delta)^-1/2``, because with
``delta^-1/2 U = Q s R^T`` one has ``(I + Q s^2 Q^T)^-1/2 = I - Q (1 - 1/sqrt(1 + s^2)) Q^T``; F
holds Q times the root of that bracket. Whitening costs 4 N H rank flop and no H x H matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from es2fast.ops.checks import refuse


def _centred(name: str, states: Tensor) -> Tensor:
    refuse(
        states.dim() != 2 or states.shape[0] < 2,
        f"Whitening.fit: {name} has shape {tuple(states.shape)}: expected (n, H) with n >= 2, the "
        "base model's states of that group",
    )
    states = states.detach().double()
    refuse(
        not bool(states.isfinite().all()),
        f"Whitening.fit: {name} holds NaN or inf: drop those rows",
    )
    return states - states.mean(0)


@dataclass(frozen=True)
class Whitening:
    """W = (I - factor factor^T) diag(inverse_std); distances come out in within-group deviations.

    Plain tensors: ``Whitening(**whitening.tensors())`` is the same object.
    """

    inverse_std: Tensor  # (H,) float32
    factor: Tensor  # (H, r) float32

    def __post_init__(self) -> None:
        refuse(
            self.inverse_std.dim() != 1
            or self.factor.dim() != 2
            or self.factor.shape[0] != self.inverse_std.shape[0],
            f"Whitening: inverse_std has shape {tuple(self.inverse_std.shape)} and factor "
            f"{tuple(self.factor.shape)}: expected (H,) and (H, r)",
        )

    @staticmethod
    def fit(
        states_harmful: Tensor,  # (n, H)
        states_harmless: Tensor,  # (m, H)
        *,
        rank: int = 16,
        shrinkage: float = 0.1,
    ) -> Whitening:
        """From the base model's states of both groups; their mean difference plays no part.

        Args:
            states_harmful, states_harmless: (n, H) and (m, H), any floating dtype; n, m >= 2 and
                both may be far below H.
            rank: eigenpairs kept, at most n + m - 2 and H.
            shrinkage: rho in (0, 1], the share of the isotropic covariance of the same trace.

        Raises:
            ValueError: shapes, NaN, rank or shrinkage out of range, states that do not vary.

        Source: shrinkage as in Ledoit and Wolf, J. Multivariate Analysis 88 (2004), with rho given.
        """
        refuse(not 0 < shrinkage <= 1, f"shrinkage={shrinkage}: expected 0 < shrinkage <= 1")
        refuse(rank < 0, f"rank={rank}: expected 0 or more")
        a, b = (
            _centred("states_harmful", states_harmful),
            _centred("states_harmless", states_harmless),
        )
        refuse(
            a.shape[1] != b.shape[1],
            f"Whitening.fit: states_harmful is {a.shape[1]} wide and states_harmless {b.shape[1]}: "
            "take both from the same layer",
        )
        degrees = a.shape[0] + b.shape[0] - 2
        x = torch.cat([a, b]) / degrees**0.5  # covariance = x^T x
        diagonal = x.square().sum(0)
        mean = diagonal.mean()
        refuse(not bool(mean > 0), "Whitening.fit: the states do not vary within their groups")
        rank = min(rank, degrees, x.shape[1])
        _, root, vectors = torch.linalg.svd(x, full_matrices=False)
        leading = vectors[:rank].t() * root[:rank]  # (H, rank), V sqrt(lambda)
        rest = (diagonal - leading.square().sum(1)).clamp_min(0)
        delta = (1 - shrinkage) * rest + shrinkage * mean
        inverse_std = delta.rsqrt()
        low = (1 - shrinkage) ** 0.5 * leading * inverse_std[:, None]
        q, s, _ = torch.linalg.svd(low, full_matrices=False)
        factor = q * (1 - (1 + s.square()).rsqrt()).sqrt()
        return Whitening(inverse_std.float(), factor.float())

    def __call__(self, x: Tensor) -> Tensor:  # (N, H) -> (N, H)
        """W x, row by row, in x's dtype. Centre x first where its mean is large."""
        inverse_std, factor = (t.to(x.device, x.dtype) for t in (self.inverse_std, self.factor))
        y = x * inverse_std
        return y - (y @ factor) @ factor.t()

    def tensors(self) -> dict[str, Tensor]:
        """What to save, for instance with safetensors."""
        return {"inverse_std": self.inverse_std, "factor": self.factor}

    def to(self, device: torch.device | str) -> Whitening:
        """A copy on a device, once, instead of a transfer per call."""
        return Whitening(self.inverse_std.to(device), self.factor.to(device))
