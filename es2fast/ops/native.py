"""The native CPU kernels: loads csrc's library, says why when it is not there, and wraps its ops.

The library registers its operators with torch (``torch.ops.es2fast.native_*``); the fakes below
tell torch.compile and export their shapes. Every operator computes in float32 on float32 logits,
rows side by side on torch's threads, and gives the same bits for any number of threads. The
instruction set (AVX-512, AVX2, else what the compiler makes of plain C++) is the one that torch
uses on the machine; ``ATEN_CPU_CAPABILITY`` limits both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from es2fast.ops.linear_kl_chunked import KLProblem, KLResult, RowGradient, run_chunked

DIRECTION = {"forward": 0, "reverse": 1, "jsd": 2}
BUILD = "pip install --no-build-isolation ."


def _load() -> str | None:
    """Registers the library's operators with torch; returns why it could not, and the remedy."""
    found = sorted(Path(__file__).resolve().parents[1].glob("_native*.so"))
    if not found:
        return (
            "the native library was not built: it needs torch and a C++ compiler at install time; "
            f"install again with `{BUILD}`"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = str(error).splitlines()[0]
        return (
            f"the native library was built for another torch than {torch.__version__} ({reason}); "
            f"install again with `{BUILD}`"
        )
    return None


MISSING = _load()

if MISSING is None:

    @torch.library.register_fake("es2fast::native_kl_rows")
    def _(teacher, student, bias_t, bias_s, scale, *options):
        return torch.empty_like(scale)


def why_missing() -> str | None:
    """None when the native kernels are loaded, else the reason and the remedy."""
    return MISSING


def capability() -> str:
    """The instruction set in use: "AVX512", "AVX2" or "DEFAULT" (plain C++).

    Raises:
        RuntimeError: the library is not there.
    """
    if MISSING is not None:
        raise RuntimeError(MISSING)
    return torch.ops.es2fast.native_capability()


def why_not(hidden: Tensor, teacher_weight: Tensor | None) -> str | None:
    """Why the native kernels cannot take these tensors; None: they can."""
    if hidden.device.type != "cpu":
        return f"it computes on the CPU and hidden is on {hidden.device}"
    for tensor in (hidden, hidden if teacher_weight is None else teacher_weight):
        if tensor.dtype == torch.float64:
            return "it computes in float32 and an input is float64"
    return MISSING


def _as_float(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.float().contiguous()


def kl_row_pass(
    zt: Tensor,  # (C, V) float32 raw logits of the teacher; overwritten
    zs: Tensor,  # (C, V) float32 raw logits of the student, or the difference; becomes G
    scale: Tensor,  # (C,)
    p: KLProblem,
) -> tuple[Tensor, RowGradient | None]:
    """Divergence of each row and, in the student's memory, its gradient by the raw logits."""
    shared = p.teacher_weight is None
    bias_t = p.bias if shared else p.teacher_bias
    cap = p.spec.softcap
    rows = torch.ops.es2fast.native_kl_rows(
        zt,
        zs,
        _as_float(bias_t),
        None if p.is_delta else _as_float(p.bias),
        scale.contiguous(),
        DIRECTION[p.spec.direction],
        p.spec.beta,
        p.spec.logit_scale / p.spec.temperature,
        0.0 if cap is None else p.spec.logit_scale / cap,
        0.0 if cap is None else cap / p.spec.temperature,
        p.is_delta,
        p.need_grad,
        False,
    )
    return rows, RowGradient(zs) if p.need_grad else None


def run_native(problem: KLProblem) -> KLResult:
    """The ``native`` backend of the linear KL."""
    return run_chunked(problem, kl_row_pass)
