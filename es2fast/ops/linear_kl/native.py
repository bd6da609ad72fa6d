"""The ``native`` backend of the linear KL: the chunk loop with csrc's row pass and GEMMs.

The row pass (csrc/linear_kl_rows.inl) sweeps each row once for its statistics, in blocks that stay
in the first-level cache, and once for the gradient, which takes the place of the student's logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from es2fast.ops import native
from es2fast.ops.linear_kl.chunked import KLProblem, KLResult, RowGradient, run_chunked
from es2fast.ops.linear_kl.rows import DIRECTION

# G is rounded to bfloat16 from this many tokens on, where its roundings average out: at most 0.29 %
# in a gradient over sweeps at 64 tokens and more, against 0.42 % with three. Where the weights let
# one of many tokens decide the gradient they do not, and 0.44 % was seen (0.24 % with a float32 G).
HALF_ROWS = 64


def kl_row_pass(
    zt: Tensor,  # (C, V) float32 raw logits of the teacher; overwritten
    zs: Tensor,  # (C, V) float32 raw logits of the student, or the difference; becomes G
    scale: Tensor,  # (C,)
    p: KLProblem,
) -> tuple[Tensor, RowGradient | None]:
    """Divergence of each row and its gradient by the raw logits, bfloat16 for a bfloat16 GEMM."""
    bias_t = p.bias if p.teacher_weight is None else p.teacher_bias
    bf16 = p.hidden.dtype == p.weight.dtype == torch.bfloat16
    half = native.HAS_GEMM_BF16 and bf16 and p.rows >= HALF_ROWS
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
    )
    if not p.need_grad:
        return rows, None
    return rows, RowGradient(native.packed_half(zs) if half else zs)


def run_native(problem: KLProblem) -> KLResult:
    """The ``native`` backend."""
    return run_chunked(problem, kl_row_pass, native.NATIVE_GEMMS)
