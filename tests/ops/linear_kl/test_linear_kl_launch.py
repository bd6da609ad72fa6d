"""What the Triton launchers launch is what bench/compile_report.py compiles.

The real launchers run on CPU tensors with a driver that says sm_90; Triton's cache hook tells how
each call was specialized and stops it before anything is compiled.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bench.compile_report import Case, cases

triton = pytest.importorskip("triton", reason="the kernels need triton")
if triton.knobs.runtime.interpret:
    pytest.skip("the interpreter specializes nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

from es2fast.ops.linear_kl import triton as kernels  # noqa: E402
from es2fast.ops.linear_kl.chunked import KLProblem, run_chunked  # noqa: E402
from es2fast.ops.linear_kl.rows import KLSpec  # noqa: E402
from es2fast.ops.linear_kl.triton_sharded import sharded_row_pass  # noqa: E402
from es2fast.ops.scratch import logit_rows  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Driver:
    """As much of a driver as specializing asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Launch:
    """One specialization: argument types, constants, what is divisible by 16, options."""

    signature: tuple
    constants: tuple
    aligned: frozenset
    options: tuple


@pytest.fixture
def launches(monkeypatch):
    """Collects Launch objects, by kernel, of whatever is launched in the test."""
    found: list[Launch] = []

    def hook(*, compile: dict[str, Any], fn: Any, **_: Any) -> bool:
        names = fn.jit_function.arg_names
        constants = {names[i[0]]: v for i, v in compile["constants"].items()}
        (attributes,) = compile["configs"]
        aligned = {names[i[0]] for i, a in attributes.items() if ["tt.divisibility", 16] in a}
        chosen = json.loads(compile["specialization_data"])["options"]
        assert chosen["enable_fp_fusion"] is True
        options = tuple(chosen[k] for k in ("num_warps", "num_stages", "maxnreg"))
        signature = {k: v for k, v in compile["signature"].items() if v != "constexpr"}
        found.append(_launch(signature, constants, aligned, options))
        return True

    # Triton 3.10 switches it off by default: launchers have to ask.
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False, raising=False)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", hook)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return found


UNUSED = {
    "bt_ptr": "HAS_BT", "bs_ptr": "HAS_BS", "g_ptr": "NEED_GRAD", "low_ptr": "TWO_PARTS",
}  # fmt: skip # pointer: its switch


def _launch(signature: dict, constants: dict, aligned: set, options: tuple) -> Launch:
    """Without the types of pointers that the kernel does not touch: anything may stand there."""
    idle = {pointer for pointer, switch in UNUSED.items() if not constants.get(switch, True)}
    used = {name: kind for name, kind in signature.items() if name not in idle}
    return Launch(
        tuple(sorted(used.items())), tuple(sorted(constants.items())), frozenset(aligned), options
    )


@functools.cache
def all_cases() -> list[Case]:
    return cases(90)


def reported(label: str) -> Launch:
    """The case of the compile report, in the same form."""
    (case,) = [c for c in all_cases() if c.label.startswith(label)][:1]
    pointers = {n for n, kind in case.signature.items() if kind.startswith("*")}
    options = (case.num_warps, case.num_stages, case.max_registers)
    return _launch(case.signature, case.constants, pointers | set(case.aligned), options)


def problem(dtype: str, v: int, h: int, full: bool, shared: bool, **change: Any) -> KLProblem:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(DTYPES[dtype])

    bias = randn(v) if full else None
    direction = change.pop("direction", "forward")
    cap = change.pop("cap", 30.0)
    spec = KLSpec(direction, softcap=cap if change.pop("softcap", full) else None)
    exact, grad, n = change.pop("exact", False), change.pop("grad", False), 33 if v % 16 else 32
    return KLProblem(
        randn(n, h), randn(v, h), bias, randn(n, h), None if shared else randn(v, h),
        None if shared else bias, None, torch.ones(n), spec, 16, True, grad, grad, False, exact,
        buffer_bytes=change.pop("buffer_bytes", None),
    )  # fmt: skip


HEADS = ("", " softcap", " bias+softcap", " bias+softcap odd-V", " bias+wide-softcap odd-V")


@pytest.mark.parametrize("mode", ("", " no-grad", " two-parts"))
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", kernels.DIRECTION)
def test_row_kernel(launches, direction, dtype, head, mode):
    """G over the student's logits, in a buffer for all rows and in one for some of them."""
    if mode == " two-parts" and dtype != "bf16":
        pytest.skip("only a bfloat16 G has two parts")
    if "wide" in head and dtype == "fp32":
        pytest.skip("one kernel for every soft-cap")
    v = 2051 if "odd" in head else 2064
    options = dict(
        direction=direction, grad=mode != " no-grad", exact=mode == " two-parts",
        softcap="softcap" in head, cap=2000.0 if "wide" in head else 30.0,
    )  # fmt: skip
    for buffer_bytes in (0, 32 * v * 4, 10**9):
        p = problem(
            dtype, v, 16, "bias" in head, dtype == "fp32", buffer_bytes=buffer_bytes, **options
        )
        run_chunked(p, kernels.TRITON)
    assert set(launches) == {reported(f"row {direction} {dtype}{head}{mode}")}


@pytest.mark.parametrize("mode", ("", " no-grad", " two-parts"))
@pytest.mark.parametrize("head", ("", " bias+softcap odd-V"))
@pytest.mark.parametrize("direction", kernels.DIRECTION)
def test_row_kernel_in_parts(launches, direction, head, mode):
    """Whatever the number of rows: a last chunk compiles nothing new."""
    v = 2051 if head else 2064
    options = dict(direction=direction, grad=mode != " no-grad", exact=mode == " two-parts")
    p = problem("bf16", v, 16, bool(head), False, softcap=bool(head), **options)
    for rows in (16, 7, 1):
        zt, zs = (logit_rows(rows, v, torch.float32, torch.device("cpu")) for _ in "ts")
        sharded_row_pass(zt, zs, torch.ones(rows), None, p, lambda x: x[None], lambda x: x)
    parts = [f"statistics {direction}", f"gradient {direction}{mode}"]
    if direction == "jsd":
        parts = [parts[0], "values jsd", *(parts[1:] if p.need_grad else [])]
    assert set(launches) == {reported(f"sharded {part} bf16{head}") for part in parts}


@pytest.mark.parametrize("features", ("plain", "bias tail", "bias tail odd-V", "bias softcap tail"))
@pytest.mark.parametrize("head", ("shared", "two heads"))
@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
def test_fused_kernel(launches, dtype, head, features):
    h, v = (80 if "tail" in features else 64), (131 if "odd" in features else 256)
    bias, softcap = "bias" in features, "softcap" in features
    p = problem(dtype, v, h, bias, head == "shared", softcap=softcap)
    assert kernels._fused_reason(p) is None
    config = kernels.fused_config(90, softcap)
    w_t = p.weight if p.teacher_weight is None else p.teacher_weight
    stats = torch.empty(1, kernels.STATISTICS, p.rows)
    kernels.launch_fused(p, p.hidden, p.weight, p.teacher_hidden, w_t, stats, 256, config)
    label = f"fused forward {dtype} {head} {features} "
    wanted = reported(label + f"{config.block_m}x{config.block_n}")
    assert launches == [wanted]


@pytest.mark.parametrize("h", (65, 72))
def test_unaligned_rows_are_not_fused(h):
    assert "vectorized" in kernels._fused_reason(problem("bf16", 131, h, False, False))
