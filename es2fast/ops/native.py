"""The native CPU kernels: loads csrc's library, says why when it is not there, wraps its GEMMs.

The library registers its operators with torch (``torch.ops.es2fast.native_*``); the fakes below
tell torch.compile and export their shapes. Every operator computes in float32, spreads rows or
columns over torch's threads, and gives the same bits for any number of them (float32 GEMMs of dX:
for any number up to 4, above for a given one). The instruction set (AVX-512, AVX2, else what the
compiler makes of plain C++) is the one that torch uses on the machine; ``ATEN_CPU_CAPABILITY``
limits both.

Where the CPU multiplies bfloat16 (AVX512_BF16, AMX, arm64's BFMMLA), bfloat16 inputs go through
GEMMs of our own that keep float32 results. With AVX512_BF16 they are as fast as torch's bfloat16
GEMM, which rounds its result and so cannot be used for logits next to the teacher, and 2.7 times as
fast as a float32 GEMM (csrc/gemm_bf16.h); the other two have not run on a chip that has them.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from es2fast.ops.gemms import Gemms

BUILD = "pip install --no-build-isolation ."
VERSION = 1  # of the operators, as csrc/registration.cpp has it


def load(folder: Path) -> str | None:
    """Registers the operators of the library in ``folder``; None, or why not and the remedy."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    found = sorted(folder.glob("_native*.so"), key=lambda path: not path.name.endswith(suffix))
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
    version = getattr(torch.ops.es2fast, "native_version", None)
    if version is None or version() != VERSION:
        return f"the native library is of another state of es2fast; install again with `{BUILD}`"
    return None


MISSING = load(Path(__file__).resolve().parents[1])
# The instruction set of our own bfloat16 GEMMs: "AMX", "AVX512_BF16", "BFMMLA", or "" without them.
GEMM_BF16: str = torch.ops.es2fast.native_gemm_bf16() if MISSING is None else ""
HAS_GEMM_BF16 = bool(GEMM_BF16)

if MISSING is None:

    @torch.library.register_fake("es2fast::native_kl_rows")
    def _(teacher, student, bias_t, bias_s, scale, *options):
        return torch.empty_like(scale)

    @torch.library.register_fake("es2fast::native_moment_rows")
    def _(student, row_gain, *rest):
        return torch.empty_like(row_gain), torch.empty_like(row_gain)

    @torch.library.register_fake("es2fast::native_pair_distances")
    def _(tile, a_sq, b_sq, close):
        found = torch.library.get_ctx().new_dynamic_size()
        return tile.new_empty((2, found), dtype=torch.int64)

    @torch.library.register_fake("es2fast::native_pair_rows")
    def _(tile, u, *rest):
        return torch.empty_like(u)

    @torch.library.register_fake("es2fast::native_few_pairs")
    def _(a, b, u, v, kind, margin, scale, log_floor, need_da, need_db):
        da, db = (
            (x.shape[0] if need else 0, x.shape[1]) for x, need in ((a, need_da), (b, need_db))
        )
        return torch.empty_like(u), u.new_empty(da), u.new_empty(db)

    @torch.library.register_fake("es2fast::native_gemm_nt")
    def _(a, b, out):
        return None

    @torch.library.register_fake("es2fast::native_gemm_nn")
    def _(a, b, out, add):
        return None

    @torch.library.register_fake("es2fast::native_gemm_tn")
    def _(a, b, out, add):
        return None


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


# --- what the row passes' callers share -----------------------------------------------------------


def as_float(vector: Tensor | None) -> Tensor | None:
    """A float32 copy where one is needed; the kernels take nothing else."""
    return None if vector is None else vector.float().contiguous()


def packed_half(rows: Tensor) -> Tensor:
    """The bfloat16 matrix that starts where each row of ``rows`` does: float32 (C, V) -> (C, V)."""
    count, vocab = rows.shape
    pitch = rows.stride(0)
    halves = rows.as_strided((count, pitch), (pitch, 1)).view(torch.bfloat16)
    return halves[:, :vocab]


# --- GEMMs with float32 results -------------------------------------------------------------------


def _logits_into(x: Tensor, weight: Tensor, out: Tensor) -> None:
    torch.ops.es2fast.native_gemm_nt(x, weight, out)


def _input_gradient(g: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(g.shape[0], weight.shape[1], dtype=dtype)
    torch.ops.es2fast.native_gemm_nn(g, weight, out, False)
    return out


def _add_weight_gradient(dw: Tensor, g: Tensor, x: Tensor, first: bool) -> None:
    torch.ops.es2fast.native_gemm_tn(g, x, dw, not first)


def _weight_gradient(g: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    dw = torch.empty(g.shape[1], x.shape[1], dtype=dtype)
    torch.ops.es2fast.native_gemm_tn(g, x, dw, False)
    return dw


NATIVE_GEMMS = Gemms(_logits_into, _input_gradient, _add_weight_gradient, _weight_gradient)
