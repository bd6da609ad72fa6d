"""The bfloat16 GEMMs of every instruction set against fp64, whatever this machine has.

``gemm_bf16_driver.cpp`` is compiled with the very sources of the library: AMX's tile intrinsics are
emulated (``amx_emulated.h``), arm64 is compiled for and run in qemu. Speed is not a question here.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
COMPILE = ("-std=c++20", "-O2", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
AVX512 = ("-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16")
AMX = ("-mamx-tile", "-mamx-bf16")
ARM64_COMPILER, ARM64_CPU = "aarch64-linux-gnu-g++", "qemu-aarch64"


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def runs_avx512_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    return flags.exists() and "avx512_bf16" in flags.read_text()


def run(*command: str | Path) -> str:
    """What the command says; a failure of it fails the test."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build_driver(out: Path, compiler: str, kernels: tuple[str, ...], *options: str | Path) -> Path:
    names = ("gemm_bf16", *kernels)
    sources = (HERE / "gemm_bf16_driver.cpp", *(CSRC / f"{name}.cpp" for name in names))
    run(compiler, *COMPILE, *options, f"-I{CSRC}", *sources, "-o", out)
    return out


x86 = pytest.mark.skipif(not runs_avx512_bf16(), reason="this machine has no AVX512_BF16")


@pytest.fixture(scope="module")
def x86_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(
        tmp_path_factory.mktemp("x86") / "driver",
        "g++",
        ("gemm_bf16_avx512", "gemm_bf16_amx"),
        "-DES2FAST_X86",
        *AVX512,
        "-include",
        HERE / "amx_emulated.h",
    )


@needs("g++")
@x86
@pytest.mark.parametrize("name", ("AVX512_BF16", "AMX"))
def test_x86(x86_driver: Path, name: str) -> None:
    """Tails of every kind, operands that end where memory does, NaN beside and in them."""
    assert f"{name}: 104 cases, 0 failures" in run(x86_driver, name)


@needs("g++")
@x86
def test_x86_choice(x86_driver: Path) -> None:
    """What a chip with AMX would use cannot be told here, but that no other one does."""
    has_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text()
    chosen = run(x86_driver, "choose", "AVX512").strip()
    assert chosen == "AVX512_BF16" or (chosen == "AMX" and has_amx)
    assert run(x86_driver, "choose", "AVX2").strip() == "none"


@needs("g++", "objdump")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="its compiler is for another processor")
def test_amx_compiles_to_tile_instructions(tmp_path: Path) -> None:
    """The four tile shapes, and what configures and releases the tiles."""
    options = ("-DES2FAST_X86", *AVX512, *AMX, f"-I{CSRC}", "-c", CSRC / "gemm_bf16_amx.cpp")
    run("g++", *COMPILE, *options, "-o", tmp_path / "amx.o")
    code = run("objdump", "-d", tmp_path / "amx.o")
    assert code.count("tdpbf16ps") >= 4 + 2 + 2 + 1
    assert "ldtilecfg" in code and "tilerelease" in code


@needs(ARM64_COMPILER, ARM64_CPU)
def test_arm64(tmp_path: Path) -> None:
    """BFMMLA in qemu; a CPU without it is left to torch."""
    options = ("-DES2FAST_ARM64", "-march=armv8.2-a+bf16", "-static")
    driver = build_driver(tmp_path / "driver", ARM64_COMPILER, ("gemm_bf16_arm64",), *options)
    emulate = (ARM64_CPU, "-cpu", "max", driver)
    assert "BFMMLA: 104 cases, 0 failures" in run(*emulate, "BFMMLA")
    assert run(*emulate, "choose", "DEFAULT").strip() == "BFMMLA"
    assert run(ARM64_CPU, "-cpu", "cortex-a57", driver, "choose", "DEFAULT").strip() == "none"
