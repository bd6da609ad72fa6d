"""What the linear KL promises besides numbers: memory, refusals, the custom op, GEMMs of a GPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from es2fast import linear_kl_div
from es2fast.ops import gemms, native
from es2fast.ops.backends import choose_backend
from es2fast.ops.linear_kl import chunked as linear_kl_chunked
from es2fast.ops.linear_kl.rows import KLSpec
from es2fast.ops.tokens import saved_dtype
from tests.ops.linear_kl.matrix import BF16, FP16, FP32, make_problem

# --- memory ---------------------------------------------------------------------------------------

_MEMORY = """
import torch
from es2fast import linear_kl_div
from es2fast.ops import native
V, H, C = 16000, {width}, 32
w = torch.randn(V, H, requires_grad={trainable})
def peak(n):
    x, t = torch.randn(n, H, requires_grad=True), torch.randn(n, H)
    options = dict(direction="{direction}", reduction="{reduction}")
    linear_kl_div(x, w, t, chunk_tokens=C, **options).sum().backward()
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
peak(256)  # warm
small = peak(256)
print(peak(1024) - small, 768 * V * 4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(
    ("trainable", "direction", "reduction", "width"),
    (
        (False, "forward", "mean", 16),
        (True, "reverse", "mean", 16),  # the budget holds no two chunks of G
        (True, "jsd", "none", 16),
        (True, "forward", "mean", 160),  # it holds 80 rows of them
    ),
)
def test_memory_does_not_grow_with_tokens_times_vocabulary(trainable, direction, reduction, width):
    code = _MEMORY.format(
        trainable=trainable, direction=direction, reduction=reduction, width=width
    )
    # every tensor a mapping of its own: what malloc keeps of freed ones would count as ours
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    growth, logits = map(int, done.stdout.split())
    assert growth < 0.1 * logits, f"peak grew by {growth} bytes from N=256 to 1024"


# --- refusals -------------------------------------------------------------------------------------


def _refusals() -> dict[str, tuple[dict, str]]:
    x, w = torch.randn(5, 65), torch.randn(127, 65)
    grad = torch.randn(5, 65, requires_grad=True)
    return {
        "direction": (dict(direction="both"), "direction='both': expected one of"),
        "reduction": (dict(reduction="avg"), "reduction='avg'"),
        "temperature": (dict(temperature=0.0), "temperature=0.0"),
        "softcap": (dict(softcap=-1.0), "softcap=-1.0"),
        "scale": (dict(logit_scale=0.0), "logit_scale=0.0: expected a positive"),
        "hint": (dict(token_weights=torch.ones(5), max_valid_tokens=-1), "max_valid_tokens=-1"),
        "beta": (dict(direction="jsd", beta=1.0), "beta=1.0.*direction='forward'"),
        "vocab": (dict(vocab_size=128), "vocab_size=128: expected 1 to 127"),
        "heads": (dict(teacher_weight=w[:100]), "vocab_size"),
        "width": (dict(teacher_hidden=x[:, :60]), "teacher_hidden is 60 wide"),
        "tokens": (dict(teacher_hidden=x[:4]), "4: they must be the same tokens"),
        "dtype": (dict(hidden=x.half()), "cast one of them"),
        "device": (dict(weight=w.to("meta")), "weight is on meta and hidden on cpu"),
        "teacher's device": (
            dict(teacher_hidden=x.to("meta"), teacher_weight=w.to("meta")),
            "teacher_hidden on meta",
        ),
        "integer": (dict(hidden=x.long(), weight=w.long()), "torch.int64"),
        "three dimensions": (dict(hidden=x[None]), "flatten"),
        "teacher grad": (dict(teacher_hidden=grad), "teacher_hidden.detach()"),
        "teacher bias": (dict(teacher_bias=torch.zeros(127)), "without teacher_weight"),
        "bias shape": (dict(bias=torch.zeros(5)), "bias has shape"),
        "weights shape": (dict(token_weights=torch.ones(4)), r"expected \(5,\)"),
        "weights grad": (dict(token_weights=torch.ones(5, requires_grad=True)), "detach"),
        "hint alone": (dict(max_valid_tokens=3), "without token_weights"),
        "chunk": (dict(chunk_tokens=0), "chunk_tokens=0"),
        "buffer": (dict(grad_buffer_bytes=-1), "grad_buffer_bytes=-1"),
        "backend": (dict(backend="cuda"), "backend='cuda': expected one of"),
        "float64 on native": (
            dict(hidden=x.double(), weight=w.double(), teacher_hidden=x.double(), backend="native"),
            "backend='native' cannot run here: it computes in float32",
        ),
        "float64 on triton": (
            dict(hidden=x.double(), weight=w.double(), teacher_hidden=x.double(), backend="triton"),
            "backend='triton' cannot run here",
        ),
    }


@pytest.mark.parametrize("name", _refusals())
def test_refusal_names_the_argument_and_the_remedy(name):
    change, message = _refusals()[name]
    arguments = dict(
        hidden=torch.randn(5, 65), weight=torch.randn(127, 65), teacher_hidden=torch.randn(5, 65)
    )
    with pytest.raises(ValueError, match=message):
        linear_kl_div(**(arguments | change))


# --- the custom op --------------------------------------------------------------------------------


def test_custom_op_contract():
    problem = make_problem(n=3, h=8, v=20)
    arguments = (
        problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_(), None,
        problem.teacher_hidden, None, None, None, None, "forward", 0.5, 1.0, 1.0, None, 20,
        "mean", None, None, None, None, "torch", True, True, False,
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.es2fast.linear_kl.default, arguments, test_utils=tests)


# --- GEMMs and kernels of a GPU -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize("shared", (True, False), ids=("shared head", "two heads"))
def test_gemms_of_a_gpu_by_their_shape_functions(monkeypatch, dtype, shared):
    """The calls that only a GPU makes, on tensors without data: signatures, dtypes, strides.

    ``has_mixed_gemm`` is what says that 16-bit matrices multiply into float32 here.
    """
    for module in (gemms, linear_kl_chunked):
        monkeypatch.setattr(module, "has_mixed_gemm", lambda x: True)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    teacher_weight = None if shared else empty(131, 33)
    problem = linear_kl_chunked.KLProblem(
        empty(7, 65), empty(131, 65), empty(131), empty(7, 65 if shared else 33), teacher_weight,
        None, None, torch.empty(7, device="meta"), KLSpec(), 3, False, True, True, True,
    )  # fmt: skip
    for change, dw_dtype in (
        (dict(), saved_dtype(problem.weight)),
        (dict(buffer_bytes=6 * 131 * (2 if dtype == BF16 else 4)), FP32),
        (dict(buffer_bytes=0), FP32),
        (dict(exact=True, buffer_bytes=0), FP32),
    ):
        result = linear_kl_chunked.run_torch(dataclasses.replace(problem, **change))
        assert result.dx is not None and result.dw is not None and result.db is not None
        assert result.dx.shape == (7, 65) and result.dx.dtype == problem.saved_dtype
        assert result.dw.shape == (131, 65)
        assert result.dw.dtype == (FP32 if dtype == FP32 else dw_dtype)
        assert result.db.shape == (131,) and result.rows.shape == (7,)


def test_only_vectorized_rows_go_to_the_tile_fused_kernel():
    pytest.importorskip("triton")
    from es2fast.ops.linear_kl.triton import has_aligned_rows

    x = torch.empty(8, 96, dtype=BF16)
    assert has_aligned_rows(x) and has_aligned_rows(x[:, ::3])  # the second will be copied
    assert not has_aligned_rows(x[:, :95]) and not has_aligned_rows(x[:, 1:81])
    assert not has_aligned_rows(torch.empty(8, 97, dtype=BF16)[:, :96])


def test_default_backend_on_cpu_is_native_where_it_can_be():
    built = native.why_missing() is None
    assert choose_backend(None, hidden=torch.empty(1, 1)) == ("native" if built else "torch")
    assert choose_backend(None, hidden=torch.empty(1, 1, dtype=torch.float64)) == "torch"
