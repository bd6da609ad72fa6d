"""The ``native`` backend of the linear KL: the chunk loop with csrc's row pass and GEMMs.

The row pass (csrc/linear_kl_rows.inl) sweeps each row once for its statistics, in blocks that stay
in the first-level cache, and once for the gradient, which takes the place of the student's logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from es2fast.ops import native
from es2fast.ops.linear_kl.chunked import (
    KLProblem,
    KLResult,
    RowBackend,
    RowGradient,
    run_chunked,
)
from es2fast.ops.linear_kl.rows import DIRECTION


def gradient_dtype(p: KLProblem) -> torch.dtype:
    """bfloat16 where a GEMM takes it."""
    bf16 = p.hidden.dtype == p.weight.dtype == torch.bfloat16
    return torch.bfloat16 if native.HAS_GEMM_BF16 and bf16 else torch.float32


def kl_row_pass(
    zt: Tensor,  # (C, V) float32 raw logits of the teacher; overwritten
    zs: Tensor,  # (C, V) float32 raw logits of the student, or the difference; becomes G
    scale: Tensor,  # (C,)
    place: Tensor | None,  # (C, V) where G goes; None: over the student's logits
    p: KLProblem,
) -> tuple[Tensor, RowGradient | None]:
    """Divergence of each row and its gradient by the raw logits, bfloat16 for a bfloat16 GEMM."""
    bias_t = p.bias if p.teacher_weight is None else p.teacher_bias
    half = low = None
    if p.need_grad and gradient_dtype(p) == torch.bfloat16:
        half = native.packed_half(zs) if place is None else place
        low = native.packed_half(zt) if p.exact else None
    cap = p.spec.softcap
    rows = torch.ops.es2fast.native_kl_rows(
        zt,
        zs,
        native.as_float(bias_t),
        None if p.is_delta else native.as_float(p.bias),
        scale.contiguous(),
        DIRECTION[p.spec.direction],
        p.spec.beta,
        p.spec.logit_scale / p.spec.temperature,
        0.0 if cap is None else p.spec.logit_scale / cap,
        0.0 if cap is None else cap / p.spec.temperature,
        p.is_delta,
        p.need_grad,
        half,
        low,
    )
    if not p.need_grad:
        return rows, None
    return rows, RowGradient(zs if half is None else half, low)


NATIVE = RowBackend(kl_row_pass, gradient_dtype, native.NATIVE_GEMMS)


def run_native(problem: KLProblem) -> KLResult:
    """The ``native`` backend."""
    return run_chunked(problem, NATIVE)
