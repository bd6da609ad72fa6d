"""The native CPU library: its GEMMs, its threads, its instruction sets, and life without it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from es2fast.environment import native_kernels
from es2fast.ops import native
from es2fast.ops.tokens import cpu_chunk
from tests.ops.linear_kl.matrix import BF16, FP16, FP32, make_problem, relative, run
from tests.ops.moments.matrix import moments_of
from tests.ops.moments.matrix import run as run_moments

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(native.why_missing() is not None, reason=str(native.why_missing()))
SIZES = ((1, 1, 1), (5, 7, 9), (6, 64, 512), (13, 63, 33), (37, 130, 1025), (48, 192, 96))


@built
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_gemms_keep_float32(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """All three products, strided and not, added to and not, against float64."""
    torch.manual_seed(m)
    ops = torch.ops.es2fast

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    a, b = randn(m, k + 3)[:, :k], randn(n, k + 1)[:, 1:]
    out = torch.full((m, n + 5), float("nan"))[:, :n]
    ops.native_gemm_nt(a, b, out)
    assert relative(out, a.double() @ b.double().t()) < 1e-6
    b = randn(k, n + 1)[:, :n]
    for add in (False, True):
        out = torch.randn(m, n)
        expected = a.double() @ b.double() + (out.double() if add else 0)
        ops.native_gemm_nn(a, b, out, add)
        assert relative(out, expected) < 1e-6
        b_t = randn(m, n)
        out = torch.randn(k, n)
        expected = a.double().t() @ b_t.double() + (out.double() if add else 0)
        ops.native_gemm_tn(a, b_t, out, add)
        assert relative(out, expected) < 1e-6
    if dtype != FP16:
        rounded = torch.empty(k, n, dtype=BF16)
        ops.native_gemm_tn(a, b_t, rounded, False)
        ops.native_gemm_tn(a, b_t, out, False)
        assert torch.equal(rounded, out.to(BF16))


@built
@pytest.mark.parametrize("dtype", (FP32, BF16), ids=str)
def test_a_product_over_no_tokens_is_zero(dtype: torch.dtype) -> None:
    a, b = torch.empty(0, 5, dtype=dtype), torch.empty(0, 70, dtype=dtype)
    out = torch.full((5, 70), float("nan"))
    torch.ops.es2fast.native_gemm_tn(a, b, out, False)
    assert out.count_nonzero() == 0
    out.fill_(2.0)
    torch.ops.es2fast.native_gemm_tn(a, b, out, True)
    assert torch.equal(out, torch.full_like(out, 2.0))
    if dtype == BF16:
        rounded = torch.full((5, 70), float("nan"), dtype=BF16)
        torch.ops.es2fast.native_gemm_tn(a, b, rounded, False)
        assert rounded.count_nonzero() == 0


@built
def test_the_bfloat16_gemms_in_use_are_named() -> None:
    """One that fits the kernels' instruction set; `es2fast env` shows both."""
    if native.capability() == "AVX512":
        flags = Path("/proc/cpuinfo").read_text().split() if sys.platform == "linux" else []
        own = ("AMX", "AVX512_BF16") if "avx512_bf16" in flags else ("",)
        assert native.GEMM_BF16 in own
    else:
        assert native.GEMM_BF16 in ("BFMMLA", "")
    assert native_kernels().endswith(f"bfloat16 GEMMs: {native.GEMM_BF16 or 'none of our own'}")


@built
def test_gemm_refuses_what_it_cannot_take() -> None:
    a, out = torch.randn(4, 8), torch.empty(4, 4)
    for bad in (a.double(), a.long(), torch.randn(4, 7)):
        with pytest.raises(RuntimeError, match=r"^[ab]"):
            torch.ops.es2fast.native_gemm_nt(bad, a, out)
    for bad in (torch.empty(4, 5), torch.empty(4, 4).t()[:, ::2], out.bfloat16()):
        with pytest.raises(RuntimeError, match="out"):
            torch.ops.es2fast.native_gemm_nt(a, a, bad)


@built
@pytest.mark.parametrize("dtype", (FP32, BF16, FP16), ids=str)
def test_one_thread_and_two_give_the_same_bits(dtype: torch.dtype) -> None:
    problem = make_problem(dtype, n=70, h=130, v=1001, separate=True, chunk_tokens=32)
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outcomes.append(run(problem, "native"))
    finally:
        torch.set_num_threads(threads)
    one, two = outcomes
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.dx, two.dx) and torch.equal(one.dw, two.dw)


@built
def test_tasks_of_dx_grow_with_threads() -> None:
    """At H = 1024, four tasks per thread at least from 8 threads on, and of bfloat16 at any."""
    for threads in (1, 2, 4, 8, 16, 32, 64):
        rows = cpu_chunk(threads)
        bf16, fp32 = (
            torch.ops.es2fast.native_dx_tasks(rows, 1024, half, threads) for half in (True, False)
        )
        assert bf16 >= 4 * threads
        assert fp32 >= 4 * threads if threads > 4 else fp32 % threads == 0


@built
@pytest.mark.parametrize("width", [1, 5, 16, 576, 640, 896, 1024, 1536, 2048, 3584])
def test_few_threads_have_equal_shares_of_dx(width: int) -> None:
    """Columns are cut alike, but for the last ones; threads get as many tasks each."""
    tasks = torch.ops.es2fast.native_dx_tasks(256, width, False, 4)
    columns = -(-width // tasks)
    for threads in (1, 2, 4) if width > 64 else ():
        assert tasks % threads == 0
        assert tasks // threads * columns < 1.1 * width / threads
    a, b = torch.randn(7, 50), torch.randn(50, width)
    out = torch.empty(7, width)
    torch.ops.es2fast.native_gemm_nn(a, b, out, False)
    assert relative(out, a.double() @ b.double()) < 1e-6


@built
@pytest.mark.parametrize("dtype", (BF16, FP32), ids=str)
def test_many_threads_tile_dx_alike(dtype: torch.dtype) -> None:
    """Tiles of rows and columns, whole and partial, against float64."""
    threads = torch.get_num_threads()
    a, b = torch.randn(300, 700).to(dtype), torch.randn(700, 300).to(dtype)
    out = torch.empty(300, 300)
    try:
        torch.set_num_threads(8)
        torch.ops.es2fast.native_gemm_nn(a, b, out, False)
    finally:
        torch.set_num_threads(threads)
    assert relative(out, a.double() @ b.double()) < 1e-6


@built
def test_one_thread_and_two_give_the_same_moments_loss() -> None:
    problem = make_problem(BF16, n=70, h=130, v=1001, chunk_tokens=32)
    moments = moments_of(problem)  # made once, by torch's own GEMMs
    threads = torch.get_num_threads()
    try:
        outcomes = []
        for count in (1, 2):
            torch.set_num_threads(count)
            outcomes.append(run_moments(problem, "native", moments=moments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outcomes[0].loss, outcomes[1].loss)
    assert torch.equal(outcomes[0].dx, outcomes[1].dx)


@built
def test_operators_have_fakes() -> None:
    z, ones = torch.randn(3, 20), torch.ones(3)
    ids, probs = torch.zeros(3, 1, dtype=torch.int32), torch.full((3, 1), 0.1)
    a, ops = torch.randn(4, 8), torch.ops.es2fast
    calls = {
        ops.native_kl_rows: (z, z.clone(), None, None, ones, 0, 0.5, 1.0, 0.0, 0.0, False, True,
                             torch.empty(3, 20, dtype=BF16), torch.empty(3, 20, dtype=BF16)),
        ops.native_moment_rows: (z, ones, None, 1.0, ids, probs, True, False),
        ops.native_pair_distances: (torch.zeros(3, 20), ones, torch.ones(20), 1.5),
        ops.native_pair_rows: (z.square(), ones, torch.ones(20), 0, 4.0, 1.0, 1e-12, True),
        ops.native_few_pairs: (a, a[:3], torch.ones(4), ones, 0, 4.0, 1.0, 1e-12, True, False),
        ops.native_gemm_nt: (a, a, torch.empty(4, 4)),
        ops.native_gemm_nn: (a, a.t().contiguous(), torch.empty(4, 4), False),
        ops.native_gemm_tn: (a, a, torch.empty(8, 8), False),
    }  # fmt: skip
    for op, arguments in calls.items():
        tests = ("test_schema", "test_faketensor")
        torch.library.opcheck(op.default, arguments, test_utils=tests)


@built
@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_matrix_with_smaller_instruction_sets(capability: str) -> None:
    """The same kernels compiled for AVX2 and in plain C++, where this machine has more."""
    if native.capability() in ("DEFAULT", capability.upper()):
        pytest.skip(f"this machine runs {native.capability()} already")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    chosen = f"from es2fast.ops import native; assert native.capability() == {capability!r}.upper()"
    subprocess.run([sys.executable, "-c", chosen], cwd=ROOT, env=environment, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-W", "ignore", "-p", "no:cacheprovider"]
    for places, chosen in (
        (["linear_kl/test_linear_kl.py"], "options or sweep or apart or zero"),
        # torch compiles nothing in plain C++
        (["moments", "separation"], "not (compiled or far_apart)"),
    ):
        tests = [f"tests/ops/{place}" for place in places]
        done = subprocess.run(
            [*command, *tests, "-k", f"native and ({chosen})"],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]


def test_without_the_library_the_reason_and_the_remedy_are_told(tmp_path: Path) -> None:
    missing = native.load(tmp_path)
    assert missing is not None and "not built" in missing and "pip install" in missing
    (tmp_path / "_native.so").write_text("not a library")
    broken = native.load(tmp_path)
    assert broken is not None and "another torch" in broken and "pip install" in broken
    own = tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    (tmp_path / "_native.cpython-30-other.so").write_text("of another Python")
    own.write_text("chosen")
    assert own.name in str(native.load(tmp_path))  # tried in place of the first by name


def test_a_library_of_another_state_of_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = next(Path(native.__file__).parents[1].glob("_native*.so"), None)
    if built is None:
        pytest.skip("the native library was not built")
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    found = native.load(built.parent)
    assert found is not None and "another state of es2fast" in found and "pip install" in found


@pytest.mark.slow
def test_installation_without_a_compiler_succeeds(tmp_path: Path) -> None:
    environment = os.environ | {"CC": "false", "CXX": "false"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "-b",
        str(tmp_path),
        "-t",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.rglob("*.so"))
