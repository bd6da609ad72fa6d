"""Triton row kernel of the teacher moments, and its launcher.

One program per token over the student's float32 raw logits in memory: one sweep forwards for the
logsumexp, one *backwards* that writes G = p_s over the row's own memory (16-bit G into its upper
half, which the sweep has read by then), so that the tail of the first sweep is still in L2. The
anchors are not searched for: their logits are read before anything is overwritten, and after the
sweep, behind a barrier, ``p_s - p_t`` is stored over their K columns, formed in float32 before it
is rounded. So K costs K loads and stores per row, whatever the vocabulary. 6 bytes per logit: 4
read, 2 written; the second read comes from L2 for the most part.

Contract: :mod:`es2fast.ops.moments.chunked`. Row offsets are 64-bit: C V exceeds 2^31 for
large chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from es2fast.ops.checks import HALVES
from es2fast.ops.moments.chunked import MomentProblem, grad_unit, run_moments
from es2fast.ops.triton_rows import (
    INTERPRETED,
    LOWEST,
    ROW_CONFIG_INTERPRETED,
    RowConfig,
    gradient_place,
    on_device_of,
    rounded,
)

ROW_CONFIG = RowConfig()


@triton.jit
def _load_logits(zs_row, b_ptr, cols, V, pitch, row_gain, gain, HAS_BIAS: tl.constexpr):
    """One tile of z; columns from V on hold anything, even NaN."""
    z = tl.load(zs_row + cols, mask=cols < pitch, other=0.0) * row_gain
    if HAS_BIAS:
        z += gain * tl.load(b_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
    return z


@triton.jit
def moment_row_kernel(
    zs_ptr,  # (C, V) float32, student's raw logits
    g_ptr,  # (C, V) gradient; may be zs's own memory (module docstring)
    b_ptr,  # (V,) bias
    row_gain_ptr,  # (C,) float32
    ids_ptr,  # (C, K) int32
    probs_ptr,  # (C, K) float32
    max_ptr,  # (C,) float32
    sum_ptr,  # (C,) float32
    V,
    pitch,  # row stride of zs, at least V
    stride_g,
    gain,
    unit,  # power of two by which G is multiplied
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    zs_row = zs_ptr + row * pitch
    row_gain = tl.load(row_gain_ptr + row)
    offs = tl.arange(0, BLOCK)
    tiles = tl.cdiv(V, BLOCK)
    if NEED_GRAD and K > 0:
        ks = tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + row * K + ks, mask=ks < K, other=0)
        p_t = tl.load(probs_ptr + row * K + ks, mask=ks < K, other=0.0)
        top_z = _load_logits(zs_row, b_ptr, ids, V, pitch, row_gain, gain, HAS_BIAS)
    m = LOWEST
    s = 0.0
    for i in tl.range(0, tiles, num_stages=STAGES):
        cols = i * BLOCK + offs
        z = _load_logits(zs_row, b_ptr, cols, V, pitch, row_gain, gain, HAS_BIAS)
        z = tl.where(cols < V, z, float("-inf"))
        m_new = tl.maximum(m, tl.max(z, 0))
        s = s * tl.exp(m - m_new) + tl.sum(tl.exp(z - m_new), 0)
        m = m_new
    tl.store(max_ptr + row, m)
    tl.store(sum_ptr + row, s)
    if NEED_GRAD:
        shift = m + tl.log(s)
        g_row = g_ptr + row * stride_g
        for i in tl.range(0, tiles, num_stages=STAGES):
            cols = (tiles - 1 - i) * BLOCK + offs
            z = _load_logits(zs_row, b_ptr, cols, V, pitch, row_gain, gain, HAS_BIAS)
            g = tl.exp(z - shift) * unit
            tl.debug_barrier()  # this tile has been read by every thread before G overwrites it
            tl.store(g_row + cols, rounded(g, g_ptr.dtype.element_ty), mask=cols < pitch)
        if K > 0:
            g = (tl.exp(top_z - shift) - p_t) * unit
            tl.debug_barrier()  # every column of the sweep is written before an anchor replaces it
            tl.store(g_row + ids, rounded(g, g_ptr.dtype.element_ty), mask=ks < K)


def triton_row_pass(
    zs: Tensor, row_gain: Tensor, top_ids: Tensor, top_probs: Tensor, p: MomentProblem
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch ``moment_row_kernel`` on a chunk. G takes the head's dtype, over zs's memory."""
    count, vocab = zs.shape
    dtype = p.weight.dtype if p.weight.dtype in HALVES else zs.dtype
    g = gradient_place(zs, dtype) if p.need_dx else zs
    row_max = torch.empty(count, dtype=torch.float32, device=zs.device)
    row_sum = torch.empty_like(row_max)
    config = ROW_CONFIG_INTERPRETED if INTERPRETED else ROW_CONFIG
    moment_row_kernel[(count,)](
        zs, g, zs if p.bias is None else p.bias, row_gain,
        top_ids, top_probs, row_max, row_sum,
        vocab, zs.stride(0), g.stride(0), p.gain, grad_unit(dtype),
        K=top_ids.shape[1],
        BLOCK_K=triton.next_power_of_2(max(1, top_ids.shape[1])),
        HAS_BIAS=p.bias is not None,
        NEED_GRAD=p.need_dx,
        BLOCK=min(config.block, max(128, triton.next_power_of_2(vocab))),
        STAGES=config.stages,
        num_warps=config.num_warps,
        maxnreg=config.max_registers,
        enable_fp_fusion=True,
    )  # fmt: skip
    return row_max, row_sum, g if p.need_dx else None


def run_triton(problem: MomentProblem) -> tuple[Tensor, Tensor | None]:
    """The ``triton`` backend."""
    with on_device_of(problem.hidden):
        return run_moments(problem, triton_row_pass)
